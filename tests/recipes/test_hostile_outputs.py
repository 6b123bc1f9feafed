"""Where recipes may write, full disks, and what killed processes leave."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import warnings
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llmrec_peft import BehaviorLog, files
from llmrec_peft.checkpoints.bundle import save_bundle
from llmrec_peft.checkpoints.loading import load_trained
from llmrec_peft.errors import ConfigError
from llmrec_peft.files import move_into_place, replacing, scratch_directory, sweep, write_text
from llmrec_peft.retrieval.retrieval_index import RetrievalIndex
from llmrec_peft.runs.output_paths import check_output_directory, check_output_file
from llmrec_peft.runs.result_files import check_results, write_results
from llmrec_peft.scoring.bank import DomainBank
from tests.conftest import ROOT
from tests.recipes.test_directories import contents, refused


@contextmanager
def file_size_limit(size: int):
    """Writes beyond `size` bytes of one file fail with a real error of the system, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# -- places: what fails the same way is any output that is, holds, or lies in what is read or whole --


@pytest.fixture
def places(tmp_path, monkeypatch) -> Path:
    """A log, a bundle, an export and a base by their files, and a link to the log."""
    for name in ("log/interactions.csv", "bundle/behavior.json", "export/serving.json", "base/config.json",
                 "base/model.safetensors", "free/other.txt"):  # fmt: skip
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "log")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "out",
    ["log", "log/out", "link", "link/x/y", "free/../log", ".", "..", "bundle", "bundle/x", "export/x", "base/x"],
)  # fmt: skip
def test_outputs_over_what_is_read_are_refused(out, places):
    with pytest.raises(ConfigError, match="choose") as caught:
        check_output_directory(out, {"data.path": "log"})
    assert "\n" not in str(caught.value)
    for inner in ("free", "free/new", "new/../new2", "logs"):
        check_output_directory(inner, {"data.path": "log", "base": "smollm2-135m", "bundle": None})


def test_an_input_that_the_output_would_replace_is_refused(places):
    check_output_directory("run", {"teacher": "bundle"}, writes=("bundle",))
    with pytest.raises(ConfigError, match=r"teacher bundle would be replaced by bundle of output_dir \."):
        check_output_directory(".", {"teacher": "bundle"}, writes=("bundle",))
    for path in ("log", "log/interactions.csv", "link/interactions.csv", "log/answers.jsonl", "bundle/answers.jsonl"):
        with pytest.raises(ConfigError, match="choose|name a file"):
            check_output_file(path, {"requests": "log/interactions.csv", "items.a": "log"})
    check_output_file("free/answers.jsonl", {"requests": "log/interactions.csv", "items.a": "log"})


@pytest.mark.parametrize("place", ["bundle", "bundle/eval", "data", "data/out"])
@pytest.mark.parametrize("name", ["evaluate", "merge", "index", "recommend"])
def test_recipes_refuse_such_outputs_first(name, place, trained, data, recipe, capfd):
    bundle = trained("head") / "bundle"
    out = {"bundle": bundle, "bundle/eval": bundle / "eval", "data": data, "data/out": data / "out"}[place]
    before = contents(trained("head")), contents(data)
    flags = ["--bundle", str(bundle), "--data.path", str(data), "--output_dir", str(out)]
    line = refused(recipe(name), flags, capfd)
    assert str(out) in line and "choose another" in line.replace("a directory of its own", "another")
    assert (contents(trained("head")), contents(data)) == before


def test_a_run_does_not_write_into_its_own_data(recipe, arguments, data, trained, tmp_path, capfd):
    (tmp_path / "link").symlink_to(data)
    before = contents(data)
    for out in (data, data / "out", data.parent, tmp_path / "link" / "x", trained("head") / "bundle"):
        assert "output_dir" in refused(recipe("head"), arguments("head", out), capfd)
    assert contents(data) == before


@pytest.mark.parametrize(
    ("name", "file"), [("recommend", "recommendations.parquet"), ("recommend", "errors.jsonl"),
                       ("evaluate", "metrics.json"), ("evaluate", "predictions.parquet")]
)  # fmt: skip
@pytest.mark.parametrize("content", [b"mine", b"", b'{"mine": 1}', None])
def test_a_foreign_result_is_not_replaced(name, file, content, trained, data, recipe, tmp_path, capfd):
    if content is None:
        pq.write_table(pa.table({"mine": [1]}), tmp_path / file)
    else:
        (tmp_path / file).write_bytes(content)
    before = contents(tmp_path)
    flags = ["--bundle", str(trained("head") / "bundle"), "--data.path", str(data), "--output_dir", str(tmp_path)]
    assert f"holds {file}" in refused(recipe(name), flags, capfd)
    assert contents(tmp_path) == before


# -- swap --


def test_swap_reads_requests_first_and_finds_its_base(trained, data, recipe, tmp_path, capfd, monkeypatch):
    bundle, path = trained("head") / "bundle", tmp_path / "requests.jsonl"
    flags = ["--bundles", json.dumps({"a": str(bundle)}), "--items", json.dumps({"a": str(data)})]
    flags += ["--requests", str(path)]
    path.write_text('{"domain": "a", "history": [], "candidates": []}\n')
    recipe("score")(flags)
    assert "1 requests" in capfd.readouterr().out
    for output in (path, bundle / "behavior.json", bundle / "answers.jsonl", data / "answers.jsonl"):
        assert "output" in refused(recipe("score"), [*flags, "--output", str(output)], capfd)
    monkeypatch.setattr(DomainBank, "load", None)  # no base is loaded for a bad request
    for line in ('{"domain": "b", "history": [], "candidates": []}', '{"domain": "a"}', "{"):
        path.write_text('{"domain": "a", "history": [], "candidates": []}\n' + line + "\n")
        refused(recipe("score"), flags, capfd)


FOREIGN = {
    "text": b"mine", "empty": b"", "half a line": b'{"id": 0, "domain": ', "deep": b"[" * 3000, "no UTF-8": b"\xff\xfe",
    "another's": b'{"id": 0, "domain": "a"}\n', "a list": b'["id", "domain", "labels", "probabilities"]\n',
    "a table": None, "link": "file", "link to nothing": "nothing", "loop": "OUT", "pipe": "",
}  # fmt: skip
"""Also sockets, devices, and any other file."""


@pytest.mark.parametrize("kind", FOREIGN)
def test_score_replaces_only_predictions_of_its_own(kind, trained, data, recipe, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(DomainBank, "load", None)  # nothing is loaded for it
    path, out, content = tmp_path / "requests.jsonl", tmp_path / "OUT", FOREIGN[kind]
    path.write_text('{"domain": "a", "history": [], "candidates": []}\n')
    (tmp_path / "file").write_text(ANSWER)
    if content == "":
        os.mkfifo(out)
    elif isinstance(content, str):
        out.symlink_to(content)
    elif content is None:
        pq.write_table(pa.table({"id": [1]}), out)
    else:
        out.write_bytes(content)
    before = _identity(out)
    flags = ["--bundles", json.dumps({"a": str(trained("head") / "bundle")}), "--items", json.dumps({"a": str(data)})]
    line = refused(recipe("score"), [*flags, f"--requests={path}", f"--output={out}"], capfd)
    assert "output" in line and "OUT" in line and "choose another" in line
    assert _identity(out) == before and (tmp_path / "file").read_text() == ANSWER


def _identity(path: Path) -> tuple[int, ...]:
    found = os.lstat(path)
    return found.st_ino, found.st_mode, found.st_size, found.st_mtime_ns


ANSWER = '{"id": 0, "domain": "a", "labels": ["x", "y"], "probabilities": []}\n'


def test_score_replaces_its_own_predictions(trained, data, recipe, tmp_path):
    path, out = tmp_path / "requests.jsonl", tmp_path / "answers.jsonl"
    path.write_text('{"domain": "a", "history": [], "candidates": [], "id": "new"}\n')
    out.write_text(ANSWER)
    flags = ["--bundles", json.dumps({"a": str(trained("head") / "bundle")}), "--items", json.dumps({"a": str(data)})]
    recipe("score")([*flags, f"--requests={path}", f"--output={out}"])
    assert json.loads(out.read_text())["id"] == "new"


@pytest.mark.parametrize("kind", ["link", "link to nothing", "loop", "pipe", "directory"])
def test_a_writer_replaces_regular_files_alone(kind, tmp_path):
    """The last guard of every file that is written: also devices and sockets, in any output directory."""
    out = tmp_path / "out"
    (tmp_path / "file").write_text("mine")
    {"pipe": os.mkfifo, "directory": os.mkdir}.get(
        kind, lambda path: os.symlink({"link": "file", "loop": "out"}.get(kind, "nothing"), path)
    )(out)
    before = _identity(out)
    with pytest.raises(FileExistsError, match="not replaced"), replacing(out):
        raise AssertionError("nothing may be written")
    assert _identity(out) == before and sorted(os.listdir(tmp_path)) == ["file", "out"]


def test_a_link_to_a_directory_is_filled_and_stays(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    for text in ("one", "two"):
        with scratch_directory(tmp_path / "link") as scratch:
            write_text(text, scratch / "file")
            move_into_place(scratch, tmp_path / "link")
        assert (tmp_path / "link").is_symlink() and contents(tmp_path / "real") == {"file": text.encode()}
    assert sorted(os.listdir(tmp_path)) == ["link", "real"]


def test_earlier_results_are_distinguished_from_foreign_files(tmp_path):
    """Also any other table with users and items, and any other metrics of a split."""
    columns = ["split", "user_id", "item_id", "timestamp", "label", "p_a", "p_b"]
    ranked = ["user_id", "item_id", "timestamp", "items", "candidates", "llm_above", "llm_tied"]
    metrics = {"auc": 0.5, "ndcg@10": None, "targets": 4}
    own = [
        ("metrics.json", {"test": metrics}), ("metrics.json", {"valid": metrics, "ranking": {}}),
        ("metrics.json", dict.fromkeys(("test", "fused_minus", "targets", "users", "fusion", "evidence", "kept"), {})),
        ("metrics.json", dict.fromkeys(
            ("test", "fused_minus", "targets", "users", "fusion", "retrieval_index", "written"), {}
        )),
        ("predictions.parquet", columns), ("ranking.parquet", ranked),
        ("ranking.parquet", [name for name in ranked if name != "candidates"]),
    ]  # fmt: skip
    foreign = [
        ("metrics.json", {"test": {"auc": 0.5}}), ("metrics.json", {"test": metrics, "model": "mine"}),
        ("metrics.json", {"test": metrics | {"my score": 1}}), ("metrics.json", {"test": metrics | {"f1": "high"}}),
        ("metrics.json", {"train": metrics, "test": metrics}), ("metrics.json", {"test": {}}),
        ("predictions.parquet", ["user_id", "item_id"]), ("predictions.parquet", columns[:5]),
        ("predictions.parquet", [*columns, "mine"]), ("ranking.parquet", ["user_id", "item_id", "timestamp", "items"]),
        ("ranking.parquet", [*ranked, "mine"]), ("ranking.parquet", columns),
    ]  # fmt: skip
    for number, (name, content) in enumerate(own + foreign):
        place = tmp_path / str(number) / name
        place.parent.mkdir()
        if isinstance(content, dict):
            write_text(json.dumps(content), place)
        else:
            pq.write_table(pa.table({column: [1] for column in content}), place)
        if number < len(own):
            check_results(place.parent, {})
            (place.parent / "link").symlink_to(name)
            (place.parent / "link").rename(place)  # a link by the name, which leads to itself
        with pytest.raises(ConfigError, match=f"holds {name}, which no recipe of this kind wrote"):
            check_results(place.parent, {})


# -- full disks: what fails the same way is any write that ends early --


@pytest.mark.parametrize("size", [300, 20_000, pytest.param(60_000, marks=pytest.mark.slow)])
def test_a_full_disk_during_a_run_is_one_line(size, recipe, arguments, tmp_path, capfd):
    out = tmp_path / "out"
    with file_size_limit(size):
        line = refused(recipe("head"), arguments("head", out), capfd)
    assert "cannot be" in line and "File too large" in line or "written" in line
    assert not list(out.rglob(".*")) and not (out / "metrics.json").exists()
    for checkpoint in out.glob("checkpoints/checkpoint-*"):
        assert (checkpoint / "complete").is_file()


@pytest.mark.parametrize("name", ["evaluate", "index"])
def test_a_full_disk_at_the_end_of_a_measurement_is_one_line(name, trained, data, recipe, tmp_path, capfd, monkeypatch):
    out, place = tmp_path / "out", tmp_path / "retrieval"
    flags = ["--bundle", str(trained("head") / "bundle"), "--data.path", str(data), "--output_dir", str(out)]
    flags += ["--retrieval", str(place), "--bootstrap", "0"] if name == "index" else []
    write, save = files.write_parquet, RetrievalIndex.save

    def full(*args, **options):
        with file_size_limit(200):
            return (write if isinstance(args[0], pa.Table) else save)(*args, **options)

    monkeypatch.setattr(sys.modules["llmrec_peft.runs.result_files"], "write_parquet", full)
    monkeypatch.setattr(RetrievalIndex, "save", full)
    assert "cannot be written" in refused(recipe(name), flags, capfd)
    assert not place.exists() and not (out / "metrics.json").exists()
    assert not list(tmp_path.rglob(".*")) and not list(out.rglob("*.parquet"))


# -- what killed processes leave: any temporary file or directory, and what had stepped aside --


KILLED = """
import os, signal
from pathlib import Path
from llmrec_peft import files
place = Path({place!r})
def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)
if {kind!r} == "file":
    with files.replacing(place) as partial:
        partial.write_text("half")
        die()
with files.scratch_directory(place) as scratch:
    (scratch / "half").write_text("half")
    if {kind!r} == "directory":
        die()
    replace, calls = os.replace, []
    os.replace = lambda *names: die() if calls else (calls.append(1), replace(*names))
    files.move_into_place(scratch, place)
"""


@pytest.mark.parametrize("kind", ["file", "directory", "moving"])
def test_what_a_killed_process_left_is_swept(kind, tmp_path):
    place = tmp_path / "a*[b] -old-"
    if kind == "moving":
        place.mkdir()
        write_text("old", place / "old")
    code = KILLED.format(place=str(place), kind=kind)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == -signal.SIGKILL
    left = list(tmp_path.iterdir())
    assert left and place not in left
    sweep(tmp_path, "other")
    assert list(tmp_path.iterdir()) == left
    sweep(tmp_path, place.name)
    assert [path.name for path in tmp_path.iterdir()] == ([place.name] if kind == "moving" else [])
    assert kind != "moving" or contents(place) == {"old": b"old"}


def _killed_at(number: int, write) -> bool:
    """Whether a process that calls `write` was killed where it would move its file or directory `number` into place."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of threads: the child runs none of theirs
        child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    replace, left = os.replace, number

    def die(*names):
        nonlocal left
        left -= 1
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(*names)

    try:
        os.replace = die
        write()
    finally:
        os._exit(0)


@pytest.mark.parametrize("before", ["nothing", "an earlier one"])
@pytest.mark.parametrize("what", ["bundle", "index", "results"])
@pytest.mark.usefixtures("one_thread")
def test_killed_and_written_again_it_is_whole(what, before, trained, data, tmp_path):
    """What evaluate, fuse and training end with, killed before any of its moves; also any other writer of files.py."""
    write = _writer(what, trained, data)
    write(tmp_path / "whole")
    whole = contents(tmp_path / "whole")
    for number in range(1, 9):
        place = tmp_path / f"{number}" / "out"
        place.parent.mkdir()
        if before != "nothing":
            write(place)
        died = _killed_at(number, lambda place=place: write(place))
        if not died:
            break
        named = {name: data for name, data in contents(place).items() if not name.startswith(".")}
        assert named.items() <= whole.items()
        write(place)
        assert contents(place) == whole and os.listdir(place.parent) == ["out"]
    assert number > 2 and not died


def _writer(what: str, trained, data):
    """A function that writes one kind of output into a directory."""
    if what == "results":
        table = pa.table({"user_id": ["a"] * 1000})
        return lambda place: write_results(place, {"test": {"targets": 1}}, {"predictions": table, "ranking": table})
    log = BehaviorLog.read(data)
    if what == "index":
        found = RetrievalIndex.fit(log, np.arange(len(log)), np.ones(len(log), np.int64))
        return found.save
    bundle = load_trained(trained("head") / "bundle")
    return lambda place: save_bundle(place, bundle.classifier, bundle.tokenizer, bundle.domain)


def test_what_lives_or_is_foreign_is_not_swept(tmp_path):
    foreign = (".mine.partial", ".mine.previous.partial", ".x-older", "x.12345678.partial", ".x.part")
    for name in foreign:
        (tmp_path / name).write_text("mine")
    with scratch_directory(tmp_path / "x") as scratch, replacing(tmp_path / "y") as partial:
        sweep(tmp_path)
        with scratch_directory(tmp_path / "x") as second:
            assert scratch.is_dir() and partial.is_file() and second != scratch
        move_into_place(scratch, tmp_path / "x")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*foreign, "x", "y"])


def test_a_killed_conversion_is_swept_by_the_next(tmp_path, monkeypatch):
    from llmrec_peft.models import gguf as converter

    monkeypatch.setenv("LLMREC_PEFT_CACHE", str(tmp_path / "cache"))
    gguf = tmp_path / "tiny.gguf"
    gguf.write_bytes(b"GGUF")
    monkeypatch.setattr(
        converter, "_convert", lambda source, name, scratch: write_text("whole", scratch / "config.json")
    )
    bases = tmp_path / "cache" / "bases"
    target = converter.convert_once(gguf, "tiny")
    left = bases / f".{target.name}.0123abcd.partial"
    left.mkdir()
    assert converter.convert_once(gguf, "tiny") == target and list(bases.iterdir()) == [target]
    files.shutil.rmtree(target)
    left.mkdir()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(converter, "_convert", full)
    with pytest.raises(ValueError, match="converted base .*No space left.*; make room"):
        converter.convert_once(gguf, "tiny")
    assert list(bases.iterdir()) == []
