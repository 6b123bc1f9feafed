"""JSON and YAML from outside: what is refused, and that it takes one line.

Other inputs fail the same way: a TOML or INI file given as YAML, a JSON file of a compressed archive, a directory.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from llmrec_peft.data.values import replace_surrogates
from llmrec_peft.documents import MAX_DEPTH, parse_json, parse_yaml, read_bytes, read_json, read_mapping, read_yaml
from llmrec_peft.errors import BundleError, ConfigError, DataError, input_errors

BAD_JSON = {
    "deep": "[" * 3000 + "]" * 3000,
    "a little too deep": "[" * (MAX_DEPTH + 2) + "]" * (MAX_DEPTH + 2),
    "digits": '{"a": ' + "9" * 5000 + "}",
    "fewer digits": '{"a": ' + "9" * 400 + "}",
    "cut": '{"a": [1, 2',
    "bytes": b'{"a": "\xff"}',
    "empty": "",
}
BAD_YAML = {
    "deep": "[" * 3000 + "]" * 3000,
    "digits": "a: " + "9" * 5000,
    "cycle": "&a [*a]",
    "laughs": "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n"
    + "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 10)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)),
    "date": "a: 2020-13-45",
    "tag": "!!python/object/apply:os.system [true]",
    "list as key": "? [1, 2]\n: 3",
    "bytes": b"a: \xff",
}


@pytest.mark.parametrize("name", BAD_JSON)
def test_bad_json_is_one_line(name: str) -> None:
    with pytest.raises(BundleError) as caught:
        parse_json(BAD_JSON[name], "line 3 of x", error=BundleError)
    assert str(caught.value).startswith("line 3 of x ") and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", BAD_YAML)
def test_bad_yaml_is_one_line(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_yaml(BAD_YAML[name], "c.yaml", error=ConfigError)
    assert str(caught.value).startswith("c.yaml") and "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ['{"a": NaN}', '{"a": [Infinity]}', '{"\\ud83d": 1}', '{"a": 1e999}'])
def test_manifests_hold_finite_numbers_and_whole_characters(text: str, tmp_path: Path) -> None:
    parse_json(text, "data")
    (tmp_path / "m.json").write_text(text)
    with pytest.raises(BundleError, match="not finite|surrogate"):
        read_json(tmp_path / "m.json", error=BundleError)


def test_values_are_read_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"a": [1, 2.5, "caf\xc3\xa9", null, 12345678901234567890]}')
    assert read_mapping(tmp_path / "a.json") == {"a": [1, 2.5, "café", None, 12345678901234567890]}
    (tmp_path / "a.yaml").write_text("a: &x [1, yes]\nb: *x\n")
    assert read_yaml(tmp_path / "a.yaml", error=ConfigError) == {"a": [1, True], "b": [1, True]}


def test_a_list_is_no_mapping(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("[1]")
    with pytest.raises(DataError, match="list where a mapping belongs"):
        read_mapping(tmp_path / "a.json")


def test_no_path_hangs_or_fills_memory(tmp_path: Path) -> None:
    sparse = tmp_path / "sparse.json"
    with sparse.open("wb") as file:
        file.truncate(4 << 30)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    paths = [sparse, tmp_path / "pipe", tmp_path / "loop", "/dev/zero", "a\0b", "x" * 300, tmp_path, tmp_path / "none"]
    for path in paths:
        with pytest.raises(BundleError) as caught:
            read_bytes(path, error=BundleError, limit=1000)
        assert "\n" not in str(caught.value) and "\0" not in str(caught.value)


def test_half_surrogates_are_replaced() -> None:
    assert replace_surrogates("a\ud83d b") == "a\ufffd b"
    assert replace_surrogates("\ud83d\ude00 café") == "\U0001f600 café"


def test_every_message_of_ours_is_one_printable_line() -> None:
    """Whatever a message quotes: keys with line breaks, NUL, terminal escapes, half surrogates, megabytes."""
    text = str(DataError("key 'a\n\0b\x1b[31m\ud83d\u2028' is unknown"))
    assert text == "key 'a\\n\\x00b\\x1b[31m\\ud83d\\u2028' is unknown"
    assert len(str(BundleError("x" * 10**6))) == 2000
    assert str(DataError("café → 日本語")) == "café → 日本語"


def test_the_door_keeps_our_errors_and_turns_others_into_one_line() -> None:
    with pytest.raises(DataError, match="^ours$"), input_errors(BundleError, "log x", "look"):
        raise DataError("ours")
    for raised in (KeyError("k"), OverflowError("too\nlarge"), MemoryError(), OSError(28, "No space left", "/x/y")):
        with pytest.raises(DataError, match="^log x .*; look$") as caught, input_errors(DataError, "log x", "look"):
            raise raised
        assert caught.value.__cause__ is raised
