"""Recipes given what cannot be used: one line, exit code 2, and everything is left as it was.

Other inputs fail the same way: any other path that a file system does not take, in any option; any other damage to any
file of a checkpoint; any other fault of the disk while something is written.
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from llmrec_peft import BehaviorLog, Domain
from llmrec_peft.config.schema import CONFIGS
from llmrec_peft.runs.id_files import read_ids
from llmrec_peft.runs.job_users import JobUsers
from llmrec_peft.runs.request_files import read_requests
from tests.conftest import ROOT

PATHS = {
    "lora": ("config", "domain", "data.path", "model.base", "output_dir"),
    "distill": ("teacher", "data.path", "output_dir"),
    "evaluate": ("config", "bundle", "output_dir"),
    "index": ("bundle", "retrieval", "output_dir"),
    "merge": ("bundle", "data.path", "output_dir"),
    "recommend": ("bundle", "users", "candidates", "output_dir"),
    "score": ("bundles", "items", "requests", "output"),
}
"""Options of each recipe that name a file or directory."""
OUTPUTS = ("output_dir", "output", "retrieval")
BAD = ("x" * 300, "a\0b", "LOOP", "PIPE", "FILE/below", "/".join(["d" * 200] * 30))
"""PIPE is for outputs alone; inputs get a device."""


def refused(main, args: list[str], capfd) -> str:
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(args)
    lines = capfd.readouterr().err.splitlines()
    assert stop.value.code == 2 and lines[-1].startswith("error: "), lines
    assert not any("Traceback" in line for line in lines)
    return lines[-1]


@pytest.mark.parametrize("name", PATHS)
def test_paths_that_no_file_system_takes(name, trained, data, recipe, arguments, tmp_path, capfd, monkeypatch):
    """Each option by itself is bad, all others can be used: so the bad one alone is what is refused."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FILE").write_text("")
    (tmp_path / "LOOP").symlink_to("LOOP")
    os.mkfifo(tmp_path / "PIPE")
    given = _usable(name, trained, data, arguments, tmp_path)
    before = sorted(os.listdir(tmp_path))
    for key in PATHS[name]:
        for value in BAD:
            value = "/dev/null" if value == "PIPE" and key not in OUTPUTS else value
            bad = json.dumps({"a": value}) if key in ("bundles", "items") else value
            line = refused(recipe(name), [f"--{option}={part}" for option, part in {**given, key: bad}.items()], capfd)
            assert key in line or value[:40] in line, (key, value, line)
            assert len(line) < 800
    assert sorted(os.listdir(tmp_path)) == before


def _usable(name: str, trained, data, arguments, place: Path) -> dict[str, object]:
    """Options that a recipe runs with."""
    if name == "lora":
        flags = arguments("lora", place / "out")
        pairs = zip(flags[:4:2], flags[1:4:2], strict=True)
        return {**{key[2:]: value for key, value in pairs}, **dict(flag[2:].split("=", 1) for flag in flags[4:])}
    bundle = trained("lora") / "bundle"
    ids = pq.read_table(data / "interactions.parquet")
    files = {"users": "user_id", "candidates": "item_id"}
    for file, column in files.items():
        csv = place / f"{file}.csv"
        csv.write_text(f"{column}\n{ids.column(column)[0].as_py()}\n")
    (place / "requests.jsonl").write_text('{"domain": "a", "history": [], "candidates": []}\n')
    every = {
        "teacher": bundle, "bundle": bundle, "data.path": data, "output_dir": place / "out",
        "retrieval": place / "index", "users": place / "users.csv", "candidates": place / "candidates.csv",
        "bundles": json.dumps({"a": str(bundle)}), "items": json.dumps({"a": str(data)}),
        "requests": place / "requests.jsonl", "output": place / "answers.jsonl",
    }  # fmt: skip
    wanted = {*PATHS[name]} | (set() if name == "score" else {"data.path"})
    return {key: every[key] for key in every if key in wanted}


@pytest.mark.parametrize("place", ["out", "retrieval", "retrieval/below"])
def test_results_inside_what_is_replaced_are_refused(place, trained, data, recipe, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").symlink_to("retrieval")
    flags = ["--bundle", str(trained("head") / "bundle"), "--data.path", str(data), "--retrieval", "retrieval"]
    assert "retrieval" in refused(recipe("index"), [*flags, "--output_dir", place], capfd)
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("value", ["true", "1.5", "[1]", "null"])
def test_ids_of_requests_are_texts_or_whole_numbers(value, tmp_path):
    path = tmp_path / "requests.jsonl"
    path.write_text(f'{{"domain": "a", "history": [], "candidates": [], "id": {value}}}\n')
    with pytest.raises(ValueError, match="request 0 of .* has id .*; it must be a text or a whole number"):
        list(read_requests(str(path)))


@pytest.mark.parametrize(
    ("name", "flag"),
    [("lora", "method.r=9999"), ("lora", "method.dropout=1.5"), ("lora", "method.alpha=0"), ("lora", "model.base="),
     ("lora", "method.init=x"), ("lora", "method.layers=[]"), ("adapter", "method.scale=0"),
     ("lora", "model.head_scale=-1")],
)  # fmt: skip
def test_a_bad_value_is_named_by_its_whole_key(name, flag, recipe, arguments, tmp_path, capfd):
    line = refused(recipe(name), [*arguments(name, tmp_path / "out"), f"--{flag}"], capfd)
    assert line.startswith(f"error: {flag.split('=')[0]} must be")


def test_distill_names_its_own_keys(trained, data, recipe, capfd):
    bundle = trained("head") / "bundle"
    flags = [f"--teacher={bundle}", f"--data.path={data}", f"--output_dir={bundle / 'x'}"]
    line = refused(recipe("distill"), flags, capfd)
    assert "teacher" in line and "model.base" not in line


# -- ids and moments as other programs write them --


@pytest.fixture
def numbered(data, tmp_path) -> BehaviorLog:
    """The log with ids 1, 2, 3, ... in place of its own."""
    for name in ("interactions", "items"):
        table = pq.read_table(data / f"{name}.parquet")
        for column in ("user_id", "item_id"):
            if column in table.column_names:
                codes = pc.index_in(table.column(column), value_set=pq.read_table(
                    data / ("items.parquet" if column == "item_id" else "interactions.parquet")
                ).column(column).unique())  # fmt: skip
                numbers = pc.cast(pc.add(codes, 1), pa.string())
                table = table.set_column(table.column_names.index(column), column, numbers)
        (tmp_path / "log").mkdir(exist_ok=True)
        pq.write_table(table, tmp_path / "log" / f"{name}.parquet")
    return BehaviorLog.read(tmp_path / "log")


@pytest.mark.parametrize(
    ("text", "ids"),
    [("1.0\n2.0", ["1", "2"]), ('1.0\n""\n77.0', ["1", "", "77"]), ("1\n2", ["1", "2"]), ("2.50\nx", ["2.50", "x"])],
)
def test_ids_that_pandas_wrote_with_a_fraction_are_met(text, ids, numbered, tmp_path, caplog):
    """Also float columns of parquet, and ids of items in `candidates`."""
    path = tmp_path / "users.csv"
    path.write_text(f"user_id\n{text}\n")
    users = JobUsers(numbered, Domain.from_yaml(ROOT / "recipes" / "configs" / "shop" / "domain.yaml"), str(path))
    assert [value or "" for value in users.ids.to_pylist()] == ids
    assert ("read without its .0" in caplog.text) == (".0" in text)
    assert ("none of the 2 users" in caplog.text) == (users.known == 0) == ("x" in text)
    found = read_ids(str(path), "candidates", "user_id", numbered.items.column("item_id"), "log 'x'")
    assert [value or "" for value in found.column("user_id").to_pylist()] == ids


def test_ids_with_and_without_a_fraction_are_named(numbered, tmp_path):
    path = tmp_path / "candidates.csv"
    path.write_text("item_id\n1\n2.0\n")
    with pytest.raises(ValueError, match=r"item_id of candidates .* has '2.0' where log 'x' has '2'"):
        read_ids(str(path), "candidates", "item_id", numbered.items.column("item_id"), "log 'x'")


@pytest.mark.parametrize(
    ("until", "words"),
    [(1600000000000, "milliseconds"), (1600000000000000, "microseconds"), (1.6e18, "nanoseconds"), (1.7e13, "unit")],
)
def test_a_moment_in_another_unit_is_refused(until, words, trained, data, recipe, tmp_path, capfd):
    flags = [f"--bundle={trained('head') / 'bundle'}", f"--data.path={data}", f"--output_dir={tmp_path / 'out'}"]
    line = refused(recipe("recommend"), [*flags, f"--until={until}"], capfd)
    assert "until" in line and words in line and "looks like" in line


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_every_recipe_refuses_hostile_files(name, recipe, tmp_path, capfd):
    path = tmp_path / "c.yaml"
    for text in ("[" * 3000, "a: &a [*a, *a]", "output_dir: [9]\noutput_dir: x", "data: {path: " + "9" * 5000 + "}"):
        path.write_text(text)
        assert "c.yaml" in refused(recipe(name), ["--config", str(path)], capfd)


def digests(out: Path) -> dict[str, str]:
    return {str(p.relative_to(out)): hashlib.sha256(p.read_bytes()).hexdigest() for p in out.rglob("*") if p.is_file()}


LAST = "checkpoints/checkpoint-4/"
DAMAGES = {
    "config cut": ("config.yaml", lambda old: old[:40] + b"\0"),
    "config no mapping": ("config.yaml", lambda old: b"- 1"),
    "config empty": ("config.yaml", lambda old: b""),
    "streams cut": ("checkpoints/streams.json", lambda old: old[:9]),
    "streams deep": ("checkpoints/streams.json", lambda old: b"[" * 3000),
    "streams of other types": ("checkpoints/streams.json", lambda old: b'{"streams": [1], "launch": {}}'),
    "state cut": (LAST + "trainer_state.json", lambda old: old[:100]),
    "state a list": (LAST + "trainer_state.json", lambda old: b"[1]"),
    "state without end": (LAST + "trainer_state.json", lambda old: b'{"global_step": ' + b"9" * 5000 + b"}"),
    "state of other keys": (LAST + "trainer_state.json", lambda old: b'{"steps": 4}'),
    "state of other types": (LAST + "trainer_state.json", lambda old: b'{"global_step": "four"}'),
    "weights cut": (LAST + "model.safetensors", lambda old: old[: len(old) // 2]),
    "weights empty": (LAST + "model.safetensors", lambda old: b""),
    "weights of a huge header": (LAST + "model.safetensors", lambda old: b"\xff" * 7 + old[7:]),
    "optimizer cut": (LAST + "optimizer.pt", lambda old: old[: len(old) // 2]),
    "optimizer a pickle": (LAST + "optimizer.pt", lambda old: b"cos\nsystem\n(S'true'\ntR."),
    "scheduler empty": (LAST + "scheduler.pt", lambda old: b""),
    "random state cut": (LAST + "rng_state.pth", lambda old: old[:50]),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_run_is_not_resumed_and_not_touched(name, trained, recipe, arguments, tmp_path, capfd):
    out = tmp_path / "out"
    shutil.copytree(trained("lora"), out)
    file, damage = DAMAGES[name]
    (out / file).write_bytes(damage((out / file).read_bytes()))
    before = digests(out)
    line = refused(recipe("lora"), [*arguments("lora", out), "--train.resume=true"], capfd)
    assert "train.resume" in line and str(out) in line
    assert digests(out) == before


def test_a_checkpoint_of_another_model_is_one_line(trained, recipe, arguments, tmp_path, capfd):
    """It can be read, and does not fit: seen once the model is there."""
    out = tmp_path / "out"
    shutil.copytree(trained("lora"), out)
    import torch

    place = out / LAST / "optimizer.pt"
    state = torch.load(place, weights_only=True)
    state["param_groups"][0]["params"] = [0]
    torch.save(state, place)
    assert "checkpoint-4 cannot be used" in refused(
        recipe("lora"), [*arguments("lora", out), "--train.resume=true"], capfd
    )


def test_a_directory_by_the_name_of_a_checkpoint_is_passed_over(tmp_path):
    from llmrec_peft.training.resume import last_checkpoint

    for name in ("checkpoint-9", "checkpoint-best", "checkpoint-\u0663", "checkpoint-"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "complete").write_text("")
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-9")


WRITE = """
import resource, sys
from tests.recipes.conftest import load_recipe
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
load_recipe(sys.argv[2]).main(sys.argv[3:])
"""


@pytest.mark.slow
@pytest.mark.parametrize("limit", [1 << 10, 8 << 10, 40 << 10])
def test_files_that_cannot_be_written_are_one_line(limit, arguments, tmp_path):
    """A limit on a file's size stands for a full disk: any file of the run may be the one that does not fit."""
    out = tmp_path / "out"
    command = [sys.executable, "-c", WRITE, str(limit), "lora", *arguments("lora", out), "--train.report_to=[]"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != limit
    if done.returncode:
        assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr[-3000:]
        assert "error: " in done.stderr, done.stderr[-3000:]  # behind a progress bar, on its line
        assert not (out / "bundle").exists() or (out / "bundle" / "behavior.json").is_file()
        assert not (out / "metrics.json").exists()
