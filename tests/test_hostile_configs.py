"""Configurations from outside: every number has bounds, and whatever a value is, the refusal takes one line.

Other inputs fail the same way: any other number beyond its bounds, any other type in a value's place, any other YAML of
aliases, merge keys or brackets, any other pattern that a backtracking matcher would try for ever.
"""

from __future__ import annotations

import dataclasses
import errno
import os
import random
import re
import subprocess
import sys
import time
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from llmrec_peft.boundary import exit_on_error
from llmrec_peft.checkpoints.loading import load_classifier
from llmrec_peft.config.parsing import read_config
from llmrec_peft.config.schema import CONFIGS, LoraConfig, RecommendConfig
from llmrec_peft.data.domain import Domain
from llmrec_peft.data.download import main as download
from llmrec_peft.documents import parse_json, parse_yaml
from llmrec_peft.errors import ConfigError, DataError, DomainError, LLMRecError
from llmrec_peft.fields import annotations_of, check_fields
from llmrec_peft.memory.__main__ import main as memory
from llmrec_peft.memory.memory_options import MemoryConfig
from llmrec_peft.models.tuning_options import METHODS, matching_names, method_options
from tests.conftest import ROOT

DOMAIN = {"name": "d", "event": "{title}", "outcomes": {"no": " no\n", "yes": " yes\n"}}
FLAGS = {
    "distill": {"teacher": "t", "data": {"path": "x"}},
    "evaluate": {"bundle": "b", "data": {"path": "x"}},
    "index": {"bundle": "b", "data": {"path": "x"}},
    "merge": {"bundle": "b", "output_dir": "o"},
    "recommend": {"bundle": "b", "data": {"path": "x"}, "output_dir": "o"},
    "score": {"bundles": {"a": "b"}, "requests": "r"},
}
HOSTILE = [
    None, True, 0, -1, 10**39, -(10**39), 1e308, 1e-320, float("nan"), float("inf"), -float("inf"), "", " ", "\0",
    "\ud83d", "x" * 5000, "9" * 5000, "{", "{}", "{title:", "(", "(a+)+$", "null", "1e5", "\u202e\u200b", b"x", [],
    [[]], {}, {"": {}}, {1: 2}, {"a": None}, ["a", 1, None], [float("nan")], [0.5] * 3, ["\0"], [["a"]] * 2, object(),
]  # fmt: skip


def settings(name: str) -> dict:
    """A valid configuration of a recipe, as its YAML file holds it."""
    return FLAGS.get(name, {"data": {"path": "x"}, "domain": DOMAIN})


def written(tmp_path: Path, content: object, name: str = "c.yaml") -> list[str]:
    path = tmp_path / name
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content, allow_unicode=False), "utf-8")
    return ["--config", str(path)]


def classes() -> set[type]:
    """All configuration classes, with those inside them."""
    waiting, found = [*CONFIGS.values(), MemoryConfig, Domain, *METHODS.values()], set()
    while waiting:
        kind = waiting.pop()
        if kind not in found:
            found.add(kind)
            waiting += [hint for hint, _ in annotations_of(kind).values() if dataclasses.is_dataclass(hint)]
    return found


def numbers_in(hint: object) -> bool:
    return hint in (int, float) or any(numbers_in(part) for part in typing.get_args(hint))


def test_every_number_has_a_lower_and_an_upper_bound():
    assert len(classes()) > 25
    for kind in classes():
        for name, (hint, metadata) in annotations_of(kind).items():
            if numbers_in(hint):
                bounds = metadata["bounds"]
                assert -float("inf") < bounds.low < bounds.high < float("inf"), (kind, name)
                assert not bounds.hold(float("nan")) and not bounds.hold(float("inf")), (kind, name)


def test_a_number_without_bounds_cannot_be_checked():
    @dataclasses.dataclass
    class Unbounded:
        rate: float = 1.0

    Unbounded.__annotations__["rate"] = float
    with pytest.raises(TypeError, match="without bounds"):
        check_fields(Unbounded())


@pytest.mark.parametrize(
    ("name", "flag", "named"),
    [
        ("lora", "train.seed=4294967296", "train.seed must be at most 4,294,967,295, not 4294967296"),
        ("lora", "train.learning_rate=1e300", "train.learning_rate must be at most 100"),
        ("lora", "method.r=10000000", "r must be at most 4096"),
        ("lora", "domain.negatives.per_positive=1000000000", "negatives.per_positive must be at most 1000; got"),
        ("lora", "evaluation.bootstrap=1000000000", "evaluation.bootstrap must be at most 100,000"),
        ("lora", "train.class_weights=[1, .inf]", "train.class_weights must be a list, each a finite number"),
        ("lora", "method.layers=[99999999999]", "layers must be a list, each at most 10,000"),
        ("lora", "train.seed=true", "train.seed must be a whole number"),
        ("lora", "train.seed=" + "9" * 5000, "train.seed"),
        ("lora", "train.class_weights=" + "[" * 3000 + "]" * 3000, "train.class_weights must be"),
        ("lora", "output_dir=a\0b", "output_dir must be a text without NUL characters"),
        ("lora", "output_dir=a\udc80b", "output_dir must be a text of whole characters"),
        ("distill", "student.width=1000000000", "student.width must be at most 8192"),
        ("recommend", "quotas={popularity: .nan}", "quotas must be a mapping, each part a finite number"),
        ("recommend", "context={hour: 1e300}", "context must be a mapping, each part"),
    ],
)
def test_numbers_and_texts_beyond_their_bounds_are_named(name, flag, named, tmp_path):
    with pytest.raises(LLMRecError) as caught:
        read_config(CONFIGS[name], [*written(tmp_path, settings(name)), f"--{flag}"])
    message = str(caught.value)
    assert named in message and len(message) < 700 and "\n" not in message


def objects() -> Iterator[object]:
    """A valid object of each configuration class."""
    for name, kind in CONFIGS.items():
        waiting = [_made(kind, settings(name))]
        while waiting:
            made = waiting.pop()
            yield made
            waiting += [part for part in vars(made).values() if dataclasses.is_dataclass(part)]
    yield MemoryConfig()
    yield from (method_options(name, {}) for name in METHODS)


def _made(kind: type, values: dict) -> object:
    if kind is Domain:
        return Domain.from_dict(values)
    fields = {item.name: item for item in dataclasses.fields(kind)}
    made = {}
    for name, (hint, _) in annotations_of(kind).items():
        if name in values:
            made[name] = _made(hint, values[name]) if dataclasses.is_dataclass(hint) else values[name]
        elif fields[name].default is not dataclasses.MISSING:
            made[name] = fields[name].default
        elif fields[name].default_factory is not dataclasses.MISSING:
            made[name] = fields[name].default_factory()
    return kind(**made)


def test_any_value_in_any_place_is_taken_or_refused_in_one_line():
    """In Python, where no parser stands before the classes: every field of every class, every hostile value."""
    tried, seen = 0, set()
    for made in objects():
        if type(made) in seen:
            continue
        seen.add(type(made))
        for item in dataclasses.fields(made):
            for value in HOSTILE:
                tried += 1
                try:
                    dataclasses.replace(made, **{item.name: value})
                except LLMRecError as error:
                    assert "\n" not in str(error) and len(str(error)) < 12_000, (type(made), item.name)
    assert tried > 4000


def test_random_mutations_of_files_are_taken_or_refused(tmp_path):
    rng = random.Random(16)
    values = [value for value in HOSTILE if type(value) not in (object, bytes) and value != "\ud83d"]
    for number in range(36):
        name = rng.choice(sorted(CONFIGS))
        content = yaml.safe_load(yaml.safe_dump(settings(name)))
        for _ in range(rng.randint(1, 2)):
            keys = [key for key, _ in _flat(CONFIGS[name])] + ["new", "train", "domain", "data", "method"]
            place, *rest = rng.choice(keys).split(".")
            part = content
            for key in rest:
                part = part.setdefault(place, {}) if isinstance(part.get(place, {}), dict) else part
                place = key
            part[place] = rng.choice(values)
        with_flag = [f"--{rng.choice(keys)}={rng.choice([v for v in values if isinstance(v, str)])}"] * (
            number % 3 == 0
        )
        try:
            read_config(CONFIGS[name], [*written(tmp_path, content), *with_flag])
        except LLMRecError as error:
            assert len(str(error).splitlines()) <= 1 or len(str(error)) < 12_000


def _flat(kind: type, prefix: str = "") -> Iterator[tuple[str, object]]:
    for name, (hint, _) in annotations_of(kind).items():
        yield f"{prefix}{name}", hint
        if dataclasses.is_dataclass(hint):
            yield from _flat(hint, f"{prefix}{name}.")


LAUGHS = "{x0: &x0 [1, 1], " + ", ".join(f"x{n + 1}: &x{n + 1} [*x{n}, *x{n}]" for n in range(60)) + "}"
MERGES = "x0: &x0 {k0: 1}\n" + "".join(
    f"x{n + 1}: &x{n + 1} {{k{n + 1}: 1, <<: [{', '.join([f'*x{n}'] * 9)}]}}\n" for n in range(12)
)
FILES = {
    "deep": "[" * 3000 + "]" * 3000,
    "deep mappings": "{a: " * 3000 + "}" * 3000,
    "digits": "train: {seed: " + "9" * 5000 + "}",
    "laughs": LAUGHS,
    "merges": MERGES,
    "twice": "train: {seed: 1, max_steps: 3, seed: 2}",
    "twice at the top": "train: {seed: 1}\ntrain: {seed: 2}",
    "twice by value": "{1: a, 0x1: b}",
    "no mapping": "- 1",
    "null byte": 'output_dir: "a\\0b"',
}


@pytest.mark.parametrize("name", FILES)
def test_hostile_files_are_refused_at_once(name, tmp_path):
    began = time.process_time()
    with pytest.raises(ConfigError) as caught:
        read_config(LoraConfig, [*written(tmp_path, settings("lora"), "valid.yaml"), *written(tmp_path, FILES[name])])
    assert "\n" not in str(caught.value) and time.process_time() - began < 10
    if "twice" in name:
        assert "twice in one mapping" in str(caught.value)
    if name != "null byte":
        with pytest.raises(DomainError):
            Domain.from_yaml(tmp_path / "c.yaml")


def test_flags_are_read_within_the_limits_of_files(tmp_path):
    """They grow exponentially where a loader of the parser's own reads them: this took minutes."""
    began = time.process_time()
    with pytest.raises(ConfigError, match="context must be a mapping"):
        read_config(RecommendConfig, [*written(tmp_path, settings("recommend")), f"--context={LAUGHS}"])
    assert time.process_time() - began < 10


def test_a_merge_key_brings_what_its_mapping_overrides():
    text = "a: &a {x: 1, y: 2}\nb: {<<: *a, x: 3}"
    assert parse_yaml(text, "t", error=ConfigError)["b"] == {"x": 3, "y": 2}


@pytest.mark.parametrize("text", ['{"a": 1, "a": 2}', '{"b": [{"a": 1, "c": 0, "a": 1}]}', '{"": 1, "": 1}'])
def test_manifests_say_each_key_once(text):
    assert parse_json(text, "data")
    with pytest.raises(DataError, match="twice in one mapping"):
        parse_json(text, "m.json", strict=True)


@pytest.mark.parametrize("pattern", ["(", "a)", "[z-a]", r"(a)\1", "(?=a)", "*"])
def test_an_invalid_pattern_is_named(pattern):
    with pytest.raises(ConfigError, match="target_modules must be all-linear, a list of names or a regular expression"):
        method_options("lora", {"target_modules": pattern})


@pytest.mark.parametrize("pattern", ["(a+)+$", "(a|a)*b", "(.*a){20}", "(a?){30}a{30}c"])
def test_a_pattern_is_matched_in_linear_time(pattern):
    method_options("lora", {"target_modules": pattern})
    began = time.process_time()
    matching_names(pattern, ["a" * 60 + "!"] * 100)
    assert time.process_time() - began < 1


def test_a_pattern_is_stored_as_the_names_that_it_matched(tiny_base):
    made = load_classifier(
        str(tiny_base("llama")), {"outcomes": DOMAIN["outcomes"]}, method="lora", target_modules=r".*\.(q|v)_proj"
    )
    named = made.method_options.target_modules
    assert isinstance(named, list) and len(named) == 4 and all(name.endswith(("q_proj", "v_proj")) for name in named)


OWN_TEXTS = {
    "loading.py", "adapter_checks.py",  # what PEFT makes, as JSON has it
    "end_token.py",  # a post-processor's own state, and a file that was just written
    "safetensors_header.py",  # a header that was just written
    "json_records.py",  # entries of an array, by JSONDecoder, one at a time
}  # fmt: skip
"""Files that parse JSON which this package itself made, or within limits of their own; no two files have one name."""


def test_one_module_parses_json_and_yaml():
    parses = re.compile(r"\bjson\.(loads?|JSONDecoder)\b|map\(json\.loads|yaml\.\w*load|yaml\.\w*Loader\b")
    package = ROOT / "llmrec_peft"
    found = {path.name for path in package.rglob("*.py") if parses.search(path.read_text("utf-8"))}
    assert found == {"documents.py", *OWN_TEXTS}


MACHINE = {
    "space": (OSError(errno.ENOSPC, "x", "/a/b"), "/a/b: No space left on device; free some space"),
    "rights": (PermissionError(errno.EACCES, "x", "/a/b"), "/a/b: Permission denied; choose a place"),
    "long": (OSError(errno.ENAMETOOLONG, "x", "n" * 300), "...n"),
    "two": (OSError(errno.EXDEV, "x", "a", None, "b"), "a to b: Invalid cross-device link"),
    "files": (OSError(errno.EMFILE, "x"), "Too many open files; let a process open more"),
    "no number": (OSError("cannot\nreach it"), "cannot reach it; correct it"),
    "memory": (MemoryError(), "not enough memory"),
    "torch memory": (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "not enough memory"),
    "pipe": (BrokenPipeError(errno.EPIPE, "x"), "Broken pipe"),
}


@pytest.mark.parametrize("name", MACHINE)
def test_what_the_machine_refuses_is_one_line(name, capsys):
    error, said = MACHINE[name]
    with pytest.raises(SystemExit) as stop, exit_on_error():
        raise error
    line = capsys.readouterr().err
    assert stop.value.code == 2 and line.startswith("error: ") and said in line and line.count("\n") == 1


def test_safetensors_wraps_what_the_machine_refuses(capsys):
    from safetensors import SafetensorError

    with pytest.raises(SystemExit), exit_on_error():
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert "No space left on device; free some space" in capsys.readouterr().err


def test_an_interrupt_is_one_line_and_a_bug_keeps_its_traceback(capsys):
    with pytest.raises(SystemExit) as stop, exit_on_error():
        raise KeyboardInterrupt
    assert stop.value.code == 130 and capsys.readouterr().err == "error: interrupted\n"
    for bug in (KeyError("k"), RuntimeError("x"), TypeError("y")):
        with pytest.raises(type(bug)), exit_on_error():
            raise bug


def test_a_reader_that_goes_away_is_one_line():
    """`recipes/lora.py --print_config | true`: the pipe's reader ends before anything is printed."""
    code = "import sys; from llmrec_peft.config.schema import *; input(); parse_config(LoraConfig)"
    command = [sys.executable, "-c", code, "--config", str(ROOT / "recipes/configs/shop/lora.yaml"), "--print_config"]
    read, write = os.pipe()
    process = subprocess.Popen([*command, "--data.path=x"], stdin=subprocess.PIPE, stdout=write, stderr=subprocess.PIPE)
    os.close(read)
    os.close(write)
    _, said = process.communicate(b"\n")
    assert process.returncode == 2 and said.count(b"\n") == 1 and b"Broken pipe" in said


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (["--config", "/dev/null/x"], "cannot read it"), (["--labels", "1" + "0" * 30], "labels must be at most"),
        (["--base", "a\0b"], "base must be a text without NUL"), (["--lora.alpha", ".nan"], "alpha must be a finite"),
    ],
)  # fmt: skip
def test_the_estimator_has_the_same_boundary(args, named, capsys):
    with pytest.raises(SystemExit) as stop:
        memory(args)
    line = capsys.readouterr().err
    assert stop.value.code == 2 and named in line and line.count("\n") == 1


@pytest.mark.parametrize("directory", ["a\0b", "x" * 300, "FILE/below"])
def test_the_download_has_the_same_boundary(directory, tmp_path, capsys):
    (tmp_path / "FILE").write_text("")
    assert download(["ml-100k", "--directory", directory.replace("FILE", str(tmp_path / "FILE"))]) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: ") and line.count("\n") == 1
