"""Parse JSON and YAML from outside, within limits on bytes, depth and numbers.

No other module of the package calls `json.load`, `json.loads` or a YAML loader on a file or text from outside. The
functions raise the error class that the caller passes, with a one-line message. Nothing here needs torch or Arrow.
"""

from __future__ import annotations

import json
import re
import stat
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn

from llmrec_peft.errors import DataError, LLMRecError, one_line
from llmrec_peft.messages import quoted, shortened

MAX_JSON_BYTES = 64 << 20
"""Most bytes of a JSON file: the largest tokenizer.json in use has about 35 MB."""
MAX_YAML_BYTES = 1 << 20
"""Most bytes of a YAML file: its loader is slow, and configurations are small."""
MAX_DEPTH = 100
"""Most levels of nested lists and mappings."""
MAX_DIGITS = 40
"""Most digits of a whole number: every such number is also a finite float."""
MAX_ALIASES = 1000
"""Most aliases in one YAML document."""
MAX_MERGED = 10_000
"""Most keys of a YAML mapping, including those merged by `<<`."""
MAX_NODES = 4_000_000
"""Most values in one document: Gemma's tokenizer.json has 2,200,000. A YAML alias counts as all its values."""

_HALF_PAIR = re.compile("[\ud800-\udfff]")
_LONG_NUMBER = re.compile(rf"\d{{{MAX_DIGITS + 1}}}")


def read_bytes(path: str | Path, *, error: type[LLMRecError] = DataError, limit: int, pipes: bool = False) -> bytes:
    """Bytes of a file, `limit` at most.

    Memory stays within the limit even if the file grows meanwhile, is sparse, or is a device. Pipes are refused unless
    `pipes`, since reading one without a writer never ends.

    Raises:
        error: no such file, not a regular file, a path that no file system takes, or more bytes than the limit.
    """
    try:
        return _bytes_of(path, limit, pipes)
    except (OSError, ValueError) as fault:  # ValueError: NUL in the path
        raise error(f"cannot read {shortened(path)} ({_reason(fault)}); give an existing file") from None


def _bytes_of(path: str | Path, limit: int, pipes: bool) -> bytes:
    """Bytes of a file. Raises OSError or ValueError."""
    path = Path(path)
    mode = path.stat().st_mode
    if not (stat.S_ISREG(mode) or (pipes and stat.S_ISFIFO(mode))):
        raise OSError("not a regular file")
    with path.open("rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise OSError(f"it has more than {limit:,} bytes, the most that is read")
    return content


def _reason(fault: Exception) -> str:
    return getattr(fault, "strerror", None) or one_line(fault)


def read_json(
    path: str | Path,
    *,
    error: type[LLMRecError] = DataError,
    limit: int = MAX_JSON_BYTES,
    advice: str = "write the file again",
) -> Any:
    """The value in a JSON file that this or another toolkit wrote.

    Raises:
        error: not readable, not UTF-8, not JSON, too large or too deep, a number that is not finite, half a surrogate
            pair in a text, or a key twice in one mapping.
    """
    return parse_json(read_bytes(path, error=error, limit=limit), str(path), error=error, advice=advice, strict=True)


def read_mapping(
    path: str | Path,
    *,
    error: type[LLMRecError] = DataError,
    limit: int = MAX_JSON_BYTES,
    advice: str = "write the file again",
) -> dict[str, Any]:
    """`read_json` of a file that must hold a mapping."""
    value = read_json(path, error=error, limit=limit, advice=advice)
    if not isinstance(value, dict):
        raise error(f"{path} holds a {type(value).__name__} where a mapping belongs; {advice}")
    return value


def parse_json(
    text: str | bytes,
    where: str,
    *,
    error: type[LLMRecError] = DataError,
    advice: str = "correct it there",
    strict: bool = False,
) -> Any:
    """The value of a JSON text; `where` names it in messages, such as `line 7 of x.jsonl`.

    Depth and digits are always limited. `strict`, for manifests, also refuses NaN, infinities, half surrogate pairs and
    repeated keys in one mapping.

    Raises:
        error: not UTF-8, not JSON, or beyond a limit.
    """
    try:
        text = text.decode("utf-8-sig") if isinstance(text, bytes) else text
        value = json.loads(text, object_pairs_hook=_mapping_once if strict else None)
    except _RepeatedKey as fault:
        raise error(f"{where} has the key {quoted(fault.key, 100)} twice in one mapping; {advice}") from None
    except json.JSONDecodeError as fault:
        kind = "readable JSON" if strict else "JSON"
        raise error(f"{where} is not {kind}: {fault.msg} (line {fault.lineno}); {advice}") from None
    except UnicodeDecodeError as fault:
        kind = "readable JSON in UTF-8" if strict else "UTF-8"
        raise error(f"{where} is not {kind}: {one_line(fault)}; {advice}") from None
    except RecursionError:
        raise error(f"{where} nests deeper than {MAX_DEPTH} levels; {advice}") from None
    except ValueError:  # Python reads no whole number of more than 4,300 digits
        raise error(f"{where} holds a whole number of more than {MAX_DIGITS} digits; {advice}") from None
    # Most lines of a log skip the walk: with so few brackets a text cannot be too deep.
    if strict or text.count("[") + text.count("{") > MAX_DEPTH or _LONG_NUMBER.search(text):
        check_tree(value, where, error=error, advice=advice, strict=strict)
    return value


class _RepeatedKey(Exception):
    """A repeated key in one mapping."""

    def __init__(self, key: Any) -> None:
        super().__init__(str(key))
        self.key = key


def _mapping_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _RepeatedKey(key)
            seen.add(key)
    return found


def read_yaml(path: str | Path, *, error: type[LLMRecError], what: str | None = None, kind: str = "") -> Any:
    """The value in a YAML file of plain values.

    Args:
        what: names it in messages in place of its path.
        kind: kind of file in messages, such as `domain file`.

    Raises:
        error: not readable, not UTF-8, not YAML, too large or too deep, or a key twice in one mapping.
    """
    where = what or shortened(path)
    try:
        content = _bytes_of(path, MAX_YAML_BYTES, pipes=True)
    except (OSError, ValueError) as fault:
        thing = f"the {kind}" if kind else "it"
        raise error(f"{where}: cannot read {thing} ({_reason(fault)}); give an existing YAML file") from None
    return parse_yaml(content, f"{where}: a {kind}" if kind else f"{where}:", error=error)


def parse_yaml(
    text: str | bytes,
    where: str,
    *,
    error: type[LLMRecError],
    advice: str = "correct it there",
    dates: bool = True,
) -> Any:
    """The value of a YAML text of plain values; without `dates`, these are texts.

    Raises:
        error: not UTF-8, not YAML, beyond a limit, or a key twice in one mapping.
    """
    import yaml

    try:
        text = text.decode("utf-8-sig") if isinstance(text, bytes) else text
        value = yaml.load(text, Loader=_yaml_loader(dates))  # a subclass of SafeLoader
    except _RepeatedKey as fault:
        raise error(f"{where} has the key {quoted(fault.key, 100)} twice in one mapping; {advice}") from None
    except RecursionError:
        raise error(f"{where} nests deeper than {MAX_DEPTH} levels; {advice}") from None
    # ValueError: a date or a whole number that Python does not take; TypeError: a key that is a list
    except (yaml.YAMLError, ValueError, TypeError) as fault:
        raise error(f"{where} must be YAML in UTF-8; {' '.join(str(fault).split())[:300]}; {advice}") from None
    check_tree(value, where, error=error, advice=advice)
    return value


@lru_cache(maxsize=2)
def _yaml_loader(dates: bool) -> type:
    """PyYAML's SafeLoader that refuses repeated keys, and aliases beyond a limit.

    Merge keys (`<<`) copy mappings: without the limit, a few of them grow exponentially before any value is checked.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        aliases = 0

        def compose_node(self, parent: Any, index: Any) -> Any:
            self.aliases += self.check_event(yaml.AliasEvent)
            if self.aliases > MAX_ALIASES:
                raise yaml.YAMLError(f"more than {MAX_ALIASES:,} aliases")
            return super().compose_node(parent, index)

        def compose_mapping_node(self, anchor: Any) -> Any:
            node, seen = super().compose_mapping_node(anchor), set()
            for key_node, _ in node.value:
                if isinstance(key_node, yaml.ScalarNode):
                    merges = key_node.tag == "tag:yaml.org,2002:merge"
                    key = key_node.value if merges else self.construct_object(key_node)
                    if key in seen:
                        raise _RepeatedKey(key)
                    seen.add(key)
            return node

        def flatten_mapping(self, node: Any) -> None:
            super().flatten_mapping(node)
            if len(node.value) > MAX_MERGED:
                raise yaml.YAMLError(f"merge keys (<<) make a mapping of more than {MAX_MERGED:,} keys")

    if not dates:
        timestamp = "tag:yaml.org,2002:timestamp"
        Loader.yaml_implicit_resolvers = {
            first: [pair for pair in pairs if pair[0] != timestamp]
            for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
        }
    return Loader


def check_tree(
    value: Any, where: str, *, error: type[LLMRecError] = DataError, advice: str = "correct it", strict: bool = False
) -> None:
    """Raise `error` if a value of lists, mappings, texts and numbers is beyond a limit of this module.

    Args:
        strict: also refuse numbers that are not finite and half surrogate pairs.
    """

    def refuse(reason: str) -> NoReturn:
        raise error(f"{where} {reason}; {advice}")

    waiting, seen = [(value, 0)], 0
    while waiting:
        node, depth = waiting.pop()
        seen += 1
        if depth > MAX_DEPTH:
            refuse(f"nests deeper than {MAX_DEPTH} levels")
        if seen > MAX_NODES:
            refuse(f"holds more than {MAX_NODES:,} values")
        if isinstance(node, dict):
            waiting += [(part, depth + 1) for pair in node.items() for part in pair]
        elif isinstance(node, list | tuple):
            waiting += [(part, depth + 1) for part in node]
        elif isinstance(node, int) and abs(node) >= 10**MAX_DIGITS:
            refuse(f"holds a whole number of more than {MAX_DIGITS} digits")
        elif strict and isinstance(node, float) and not abs(node) < float("inf"):
            refuse(f"holds the number {node}, which is not finite")
        elif strict and isinstance(node, str) and has_surrogates(node):
            refuse("holds half a surrogate pair, which is not a character")


def has_surrogates(text: str) -> bool:
    """Whether a text holds half of a surrogate pair, which is not a character."""
    return _HALF_PAIR.search(text) is not None
