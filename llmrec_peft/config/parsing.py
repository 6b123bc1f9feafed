"""Reads a configuration class from YAML files and flags: the one place that parses either.

Files apply first, in the order given, then `--domain`, then dotted flags, wherever they stand on the command line:

    llmrec train lora --config FILE.yaml --domain DOMAIN.yaml --train.max_steps 200 --domain.stream.targets 10

jsonargparse checks types and formats `--help`. Reading files and refusing unknown keys is done here: files have the
limits of documents.py, a domain is one value, and the message on an unknown key names the closest known one.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import sys
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml

from llmrec_peft.boundary import exit_on_error
from llmrec_peft.config.renamed_keys import new_name, with_new_names
from llmrec_peft.config.shipped import locate
from llmrec_peft.data.domain import Domain
from llmrec_peft.documents import parse_yaml, read_yaml
from llmrec_peft.errors import ConfigError
from llmrec_peft.fields import describe, section
from llmrec_peft.messages import shortened

__all__ = ["config_to_yaml", "exit_on_error", "parse_config", "read_config"]

Config = TypeVar("Config")


def parse_config(
    config_class: type[Config], args: Sequence[str] | None = None, *, prog: str | None = None, epilog: str | None = None
) -> Config:
    """Read a command's configuration from `args` (the command line if None).

    An invalid configuration ends the program with one line on standard error and exit code 2. `--print_config` prints
    the resolved configuration as YAML, `--help` prints the options; both end the program with exit code 0.

    Args:
        prog, epilog: name of the command and last paragraph in `--help`.
    """
    arguments = list(sys.argv[1:] if args is None else args)
    printing = "--print_config" in arguments
    with exit_on_error():
        config = read_config(
            config_class, [word for word in arguments if word != "--print_config"], prog=prog, epilog=epilog
        )
        if printing:
            print(config_to_yaml(config), end="")
    if printing:
        raise SystemExit(0)
    return config


def read_config(
    config_class: type[Config], args: Sequence[str], *, prog: str | None = None, epilog: str | None = None
) -> Config:
    """Read a configuration from command-line arguments.

    Raises:
        ConfigError: an unknown key (with the closest known one), a value of the wrong type or out of range, a missing
            key, or a file that is missing or not YAML.
        DomainError: the domain cannot be used.
    """
    files, domain_file, flags = _take_files(list(args), has_domain=_has_domain(config_class))
    keys = _Keys.of(config_class)
    content: dict[str, Any] = {}
    for path in files:
        _merge(content, _read_file(locate(path, "recipes/configs"), keys))
    if domain_file is not None:
        content["domain"] = Domain.from_yaml(locate(domain_file, "recipes/configs")).to_dict()
    flags = [_renamed(flag, keys) for flag in flags]
    for flag in flags:
        if flag.startswith("--") and flag != "--help":
            keys.check(flag[2:].split("=", 1)[0].rstrip("+"), "the command line", prefix="--")
    return _build(config_class, _parse(config_class, content, flags, keys, prog, epilog))


def _renamed(flag: str, keys: _Keys) -> str:
    """A flag by the present name of its key."""
    name, equals, value = flag.partition("=")
    return f"--{new_name(name[2:], keys.all, 'the command line')}{equals}{value}" if name.startswith("--") else flag


def config_to_yaml(config: Any) -> str:
    """Return a configuration as YAML, its domain in place, that `--config` reads back as the same configuration."""
    return yaml.dump(dataclasses.asdict(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


class _Dumper(yaml.SafeDumper):
    """Writes texts with line breaks in quotes: in YAML's folded style, " yes" and " yes\\n" look the same."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"' if "\n" in text else None)


_Dumper.add_representer(str, _represent_text)


def _take_files(args: list[str], has_domain: bool) -> tuple[list[str], str | None, list[str]]:
    """Split arguments into --config files, the last --domain file, and all others."""
    files: list[str] = []
    domains: list[str] = []
    taken = {"--config": files} | ({"--domain": domains} if has_domain else {})
    rest: list[str] = []
    position = 0
    while position < len(args):
        name, equals, value = args[position].partition("=")
        if name in taken:
            if not equals:
                position += 1
                value = args[position] if position < len(args) else ""
            if not value or value.startswith("--"):
                raise ConfigError(f"{name} must be followed by a YAML file, not {value!r}; name one")
            taken[name].append(value)
        else:
            rest.append(args[position])
        position += 1
    return files, (domains[-1] if domains else None), rest


@dataclasses.dataclass(frozen=True)
class _Keys:
    """Dotted names of a configuration class.

    types: type of each value. sections: dataclasses in it. mappings: values that map the user's own names; in flags,
    their entries are dotted too.
    """

    types: dict[str, Any]
    sections: set[str]
    mappings: set[str]

    @classmethod
    def of(cls, config_class: type) -> _Keys:
        types = dict(_keys(config_class))
        mappings = {
            name for name, hint in types.items() if any(typing.get_origin(part) is dict for part in _parts(hint))
        }
        return cls(types, set(_sections(config_class)), mappings)

    @property
    def all(self) -> set[str]:
        """Names of values and sections."""
        return self.types.keys() | self.sections

    def check(self, key: str, where: str, prefix: str = "") -> None:
        """Raise ConfigError for an unknown key, with the closest known one."""
        # An entry of a mapping (domain.outcomes.like) is known by the mapping's own key.
        if key in self.types or any(key.startswith(f"{name}.") for name in self.mappings):
            return
        close = difflib.get_close_matches(key, sorted(self.types), n=1, cutoff=0.6)
        if not close:
            # A key without its section (`--max_steps`) still has the name of a known key.
            last = key.rsplit(".", 1)[-1]
            ends = {name.rsplit(".", 1)[-1]: name for name in sorted(self.types, reverse=True)}
            close = [ends[name] for name in difflib.get_close_matches(last, list(ends), n=1, cutoff=0.8)]
        advice = f"did you mean {prefix}{close[0]}?" if close else "--help lists the keys"
        raise ConfigError(f"{where}: unknown key {prefix}{shortened(key)}; {advice}")


def _read_file(path: str, keys: _Keys) -> dict[str, Any]:
    """Read one --config file, with its domain in place."""
    content = read_yaml(path, error=ConfigError, what=f"--config {shortened(path)}")
    content = {} if content is None else content
    if not isinstance(content, dict):
        raise ConfigError(
            f"--config {shortened(path)}: must be a mapping of keys, not {type(content).__name__}; see --help"
        )
    where = shortened(path)
    content = with_new_names(content, keys.all, where)
    domain = content.pop("domain", None) if "domain" in keys.sections else None
    _check_mapping(content, keys, where)
    if isinstance(domain, str):
        content["domain"] = Domain.from_yaml(Path(path).parent / domain).to_dict()
    elif domain is not None:
        # Through Domain, so that a domain in place obeys the same rules as one in a file of its own.
        content["domain"] = Domain.from_dict(domain, source=f"{where}: domain").to_dict()
    return content


def _check_mapping(content: Mapping[str, Any], keys: _Keys, where: str, prefix: str = "") -> None:
    """Raise ConfigError for an unknown key of a file, or a section that is not a mapping."""
    for name, value in content.items():
        key = f"{prefix}{name}"
        if key not in keys.sections:
            keys.check(key, where)
        elif isinstance(value, dict):
            _check_mapping(value, keys, where, f"{key}.")
        else:
            raise ConfigError(f"{where}: {key} must be a mapping of its keys, not {shortened(repr(value))}; see --help")


def _merge(base: dict[str, Any], over: Mapping[str, Any]) -> None:
    for key, value in over.items():
        # A domain is one thing: its outcomes must not be mixed with another's.
        if key != "domain" and isinstance(value, dict) and isinstance(base.get(key), dict):
            _merge(base[key], value)
        else:
            base[key] = value


def _parse(
    config_class: type, content: dict[str, Any], flags: list[str], keys: _Keys, prog: str | None, epilog: str | None
) -> dict[str, Any]:
    """Check types and apply flags over the content of files; the one use of jsonargparse."""
    from jsonargparse import ArgumentParser, Namespace, set_loader, set_parsing_settings

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    set_loader(_LOADER, _load_flag, exceptions=(ConfigError,))
    parser = ArgumentParser(
        prog=prog, description=config_class.__doc__, epilog=epilog, exit_on_error=False, allow_abbrev=False,
        parser_mode=_LOADER,
    )  # fmt: skip
    files = parser.add_argument_group("files and printing")
    files.add_argument(
        "--config",
        metavar="FILE.yaml",
        help="Read options from a file, local or shipped (llmrec configs); flags override it.",
    )
    if _has_domain(config_class):
        files.add_argument(
            "--domain", metavar="FILE.yaml", help="Domain file; overrides the domain of the --config file."
        )
    files.add_argument("--print_config", action="store_true", help="Print the resolved configuration and exit.")
    _add_arguments(parser, config_class)
    try:
        parsed = parser.parse_args(flags, namespace=Namespace(_flat(content, keys)) if content else None)
    except Exception as error:  # ArgumentError, or any exception of a library that cannot read a value
        _refuse(str(error), keys.types)
    return parsed.as_dict()


_LOADER = "llmrec_peft"
"""Name by which jsonargparse knows `_load_flag`."""


def _load_flag(text: str) -> Any:
    """The value of a flag, in YAML within the limits of documents.py; `{title}` is a text and no mapping."""
    value = parse_yaml(text, "the value", error=ConfigError, dates=False)
    return text if isinstance(value, dict) and value and all(part is None for part in value.values()) else value


def _add_arguments(parser: Any, config_class: type, prefix: str = "") -> None:
    """Add the values of one dataclass as a group, then those of the dataclasses in it."""
    hints = typing.get_type_hints(config_class)
    # Where annotations are texts, jsonargparse runs the module's imports for type checking: Arrow and torch.
    vars(config_class)["__init__"].__annotations__.update(hints)
    nested = [item.name for item in dataclasses.fields(config_class) if dataclasses.is_dataclass(hints[item.name])]
    group = parser.add_argument_group((config_class.__doc__ or "").split("\n")[0].strip(" ."))
    group.add_class_arguments(config_class, prefix or None, as_group=False, skip=set(nested), fail_untyped=True)
    for name in nested:
        _add_arguments(parser, hints[name], f"{prefix}.{name}" if prefix else name)


def _flat(content: Mapping[str, Any], keys: _Keys, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one with dotted keys, but for values that are mappings themselves."""
    flat: dict[str, Any] = {}
    for name, value in content.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and key not in keys.mappings:
            flat.update(_flat(value, keys, f"{key}."))
        else:
            flat[key] = value
    return flat


def _refuse(message: str, types: Mapping[str, Any]) -> NoReturn:
    """Raise ConfigError with the fault that jsonargparse found, in one line."""
    missing = re.search(r"following arguments are required: (.*)", message)
    if missing:
        key = missing[1].split(", ")[0]
        given = "--domain FILE.yaml" if key.startswith("domain.") else f"--{key} VALUE"
        name = "domain" if key.startswith("domain.") else key
        raise ConfigError(f"{name} is required and missing; give {given} or set it in the --config file")
    wrong = re.search(r'Parser key "([^"]+)":', message)
    value = re.search(r"(?:Got|Given) value: (.*)", message)
    if wrong and value and wrong[1] in types:
        requirement = describe(types[wrong[1]])
        raise ConfigError(
            f"{wrong[1]} must be {requirement}, not {shortened(value[1])!r}; change it in the configuration"
        )
    raise ConfigError(f"the command line: {shortened(' '.join(message.split()), 400)}; --help lists the keys")


def _keys(config_class: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted name, type) of all values of a configuration class."""
    hints = typing.get_type_hints(config_class)
    for item in dataclasses.fields(config_class):
        if dataclasses.is_dataclass(hints[item.name]):
            yield from _keys(hints[item.name], f"{prefix}{item.name}.")
        else:
            yield f"{prefix}{item.name}", hints[item.name]


def _parts(hint: Any) -> tuple[Any, ...]:
    """Members of a union, or the type itself."""
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def _sections(config_class: type, prefix: str = "") -> Iterator[str]:
    """Yield the dotted names of the dataclasses in a configuration class."""
    hints = typing.get_type_hints(config_class)
    for item in dataclasses.fields(config_class):
        if dataclasses.is_dataclass(hints[item.name]):
            yield f"{prefix}{item.name}"
            yield from _sections(hints[item.name], f"{prefix}{item.name}.")


def _has_domain(config_class: type) -> bool:
    return any(item.name == "domain" for item in dataclasses.fields(config_class))


def _build(kind: type, values: Mapping[str, Any], name: str = "") -> Any:
    """Make the dataclasses from plain mappings; each checks its own values. `name` is the section's."""
    if kind is Domain:
        return Domain.from_dict({key: value for key, value in values.items() if not key.startswith("__")})
    hints = typing.get_type_hints(kind)
    made = {}
    for item in dataclasses.fields(kind):
        hint = hints[item.name]
        if dataclasses.is_dataclass(hints[item.name]):
            made[item.name] = _build(hint, values.get(item.name) or {}, f"{name}.{item.name}".strip("."))
        else:
            made[item.name] = values[item.name]
    with section(name):
        return kind(**made)
