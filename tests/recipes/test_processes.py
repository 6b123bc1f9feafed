"""Recipes on two processes: the same files as on one, whole after a kill, and one line for what cannot run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file

from llmrec_peft.data.simulate import write_simulated_shop
from tests.conftest import ROOT

pytestmark = pytest.mark.launch
HERE = Path(__file__).parent
LORA = ROOT / "recipes" / "lora.py"
PROBABILITIES = ("p_skip", "p_click")
# Six steps with dropout and three checkpoints: what a resumed run has to find again.
LONGER = ["--train.max_steps=6", "--train.eval_steps=0", "--train.save_steps=2", "--method.dropout=0.1"]


REFUSED_FROM_THE_START = ("batch", "data", "missing", "settings", "versions", "target_modules")


def adapter(out: Path) -> dict[str, np.ndarray]:
    return load_file(out / "bundle" / "adapter_model.safetensors")


def steps_of(out: Path) -> set[int]:
    return {int(path.parent.name.split("-")[1]) for path in out.glob("checkpoints/checkpoint-*/complete")}


def read_cases(done, directory: Path, cases: list[dict]) -> dict[str, list[dict]]:
    assert done.returncode == 0, done.stderr[-3000:]
    return {
        case["name"]: [json.loads((directory / f"{case['name']}.{rank}.json").read_text("utf-8")) for rank in (0, 1)]
        for case in cases
    }


def refused_cases(arguments, stale: Path, place: Path) -> list[dict]:
    """What two processes cannot run; `stale` is a run of one process that was broken off."""
    other = write_simulated_shop(place / "other", users=24, items=30, sessions=3, seed=9)
    packages = place / "packages" / "peft-0.0.1.dist-info"
    packages.mkdir(parents=True)
    (packages / "METADATA").write_text("Metadata-Version: 2.1\nName: peft\nVersion: 0.0.1\n")

    def case(name: str, *flags: str, out: Path | None = None, **more) -> dict:
        given = [*arguments("lora", out or place / name), *flags]
        return {"name": name, "recipe": "lora", "arguments": given, **more}

    return [
        case("batch", "--train.batch_size=5"),
        case("data", of_rank_1=[f"--data.path={other}"]),
        case("missing", of_rank_1=[f"--data.path={place / 'nowhere'}"]),
        case("settings", of_rank_1=["--train.learning_rate=0.5"]),
        case("versions", path=str(packages.parent)),
        case("target_modules", "--method.target_modules=[nope]"),
        case("stale", "--train.resume=true", out=stale),
        case("resumed", "--train.resume=true", "--train.learning_rate=0.5", out=stale),
    ]


def evaluate_arguments(bundle: Path, data: Path, mode: str) -> list[str]:
    flags = ["--bundle", str(bundle), "--data.path", str(data), "--mode", mode]
    return [*flags, "--limit", "17", "--batch_tokens", "300"]


@pytest.fixture(scope="module")
def with_ddp(launch, arguments, trained, data, tmp_path_factory) -> SimpleNamespace:
    """What all tests under DDP read: a launch that is killed in a save, and one that runs every other recipe.

    `place` holds the outputs by name, `found` exit codes and error lines by case and rank, `killed` the first launch.
    A launch takes seconds to import its libraries, hence two and no more.
    """
    place = tmp_path_factory.mktemp("with-ddp")
    killed, given = place / "killed", [*arguments("lora", place / "killed"), *LONGER]
    done = launch("ddp", HERE / "run_and_die.py", "lora", "0", "4", "marker", *given)
    left = SimpleNamespace(done=done, steps=steps_of(killed), files={path.name for path in killed.rglob("*")})
    stale = place / "stale"
    shutil.copytree(trained("lora"), stale)
    shutil.rmtree(stale / "bundle")
    (stale / "metrics.json").unlink()
    evaluate = [*evaluate_arguments(trained("lora") / "bundle", data, "stream"), "--output_dir", str(place / "stream")]
    runs = {  # the resumed run first: nothing of an unbroken one can reach it
        "killed": [*given, "--train.resume=true"],
        "unbroken": [*arguments("lora", place / "unbroken"), *LONGER],
        "lora": arguments("lora", place / "lora"),
    }
    cases = [{"name": name, "recipe": "lora", "arguments": words} for name, words in runs.items()]
    cases += [{"name": "stream", "recipe": "evaluate", "arguments": evaluate}]
    cases += refused_cases(arguments, stale, place)
    done = launch("ddp", HERE / "run_recipes.py", str(place), json.dumps(cases))
    found = read_cases(done, place, cases)
    for name in (*runs, "stream"):
        assert [entry["code"] for entry in found[name]] == [0, 0], found[name]
    return SimpleNamespace(place=place, found=found, killed=left)


@pytest.fixture(scope="module")
def run(launch, arguments, request, tmp_path_factory):
    """`run(launcher, method)`: what the recipe left on two processes."""

    def make(launcher: str, method: str) -> Path:
        if (launcher, method) == ("ddp", "lora"):
            return request.getfixturevalue("with_ddp").place / "lora"
        out = tmp_path_factory.mktemp(f"{launcher}-{method}") / "out"
        done = launch(launcher, ROOT / "recipes" / f"{method}.py", *arguments(method, out))
        assert done.returncode == 0, done.stderr[-3000:]
        return out

    return make


@pytest.mark.parametrize(
    ("launcher", "method"),
    [
        ("ddp", "lora"),
        *(pytest.param("zero3", method, marks=pytest.mark.slow) for method in ("lora", "adapter", "head", "full")),
        *(pytest.param(name, "lora", marks=pytest.mark.slow) for name in ("zero1", "zero2")),
        pytest.param("zero2", "qlora", marks=pytest.mark.slow),
    ],
)
def test_two_processes_leave_what_one_leaves(launcher, method, run, trained, recipe, data, tmp_path):
    one, two = trained(method), run(launcher, method)
    whole, ours = adapter(one), adapter(two)
    assert {name: value.shape for name, value in ours.items()} == {name: value.shape for name, value in whole.items()}
    assert max(np.abs(ours[name] - whole[name]).max() for name in whole) < 1e-5
    left, right = (pq.read_table(out / "predictions.parquet") for out in (one, two))
    assert left.drop(PROBABILITIES).equals(right.drop(PROBABILITIES))
    for name in PROBABILITIES:
        assert np.abs(left[name].to_numpy() - right[name].to_numpy()).max() < 1e-4
    left, right = (json.loads((out / "metrics.json").read_text("utf-8")) for out in (one, two))
    for split in ("before", "before_test", "valid", "test"):
        assert left[split] == pytest.approx(right[split], abs=1e-4)
    assert right["cost"]["training targets"] == left["cost"]["training targets"]
    assert "2 process" in right["cost"]["device"]
    # The bundle by itself gives the answers of the run.
    recipe("evaluate")(["--bundle", str(two / "bundle"), "--data.path", str(data), "--output_dir", str(tmp_path / "e")])
    again = pq.read_table(tmp_path / "e" / "predictions.parquet")
    kept = pq.read_table(two / "predictions.parquet", filters=[("split", "=", "test")])
    assert np.abs(again["p_click"].to_numpy() - kept["p_click"].to_numpy()).max() < 1e-4


@pytest.mark.parametrize("mode", ["stream", pytest.param("independent", marks=pytest.mark.slow)])
def test_evaluation_on_two_processes_leaves_the_file_of_one(mode, launch, trained, recipe, data, request, tmp_path):
    arguments = evaluate_arguments(trained("lora") / "bundle", data, mode)
    recipe("evaluate")([*arguments, "--output_dir", str(tmp_path / "one")])
    if mode == "stream":
        place = request.getfixturevalue("with_ddp").place / "stream"
    else:
        place = tmp_path / "two"
        done = launch("ddp", ROOT / "recipes" / "evaluate.py", *arguments, "--output_dir", str(place))
        assert done.returncode == 0, done.stderr[-3000:]
    one, two = (pq.read_table(out / "predictions.parquet") for out in (tmp_path / "one", place))
    assert len(one) >= 17 and one.drop(PROBABILITIES).equals(two.drop(PROBABILITIES))
    for name in PROBABILITIES:
        assert np.abs(one[name].to_numpy() - two[name].to_numpy()).max() < 1e-5


# -- kill and resume ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def unbroken(launch, arguments, tmp_path_factory):
    """`unbroken(launcher)`: a run of `LONGER` on two processes that nothing broke off."""
    made: dict[str, Path] = {}

    def make(launcher: str) -> Path:
        if launcher not in made:
            out = tmp_path_factory.mktemp(f"unbroken-{launcher}") / "out"
            done = launch(launcher, LORA, *arguments("lora", out), *LONGER)
            assert done.returncode == 0, done.stderr[-3000:]
            made[launcher] = out
        return made[launcher]

    return make


def check_same_end(unbroken: Path, out: Path) -> None:
    whole, ours = adapter(unbroken), adapter(out)
    assert whole.keys() == ours.keys() and all((whole[name] == ours[name]).all() for name in whole)
    tables = [pq.read_table(place / "predictions.parquet") for place in (unbroken, out)]
    assert tables[0].equals(tables[1])
    metrics = [json.loads((place / "metrics.json").read_text("utf-8")) for place in (unbroken, out)]
    assert all(metrics[0][name] == metrics[1][name] for name in ("before", "valid", "test"))


def test_a_process_killed_in_a_save_is_resumed_under_ddp(with_ddp):
    """kill -9 of one process, on which its launcher ends the other; the half checkpoint never counts."""
    killed = with_ddp.killed
    assert killed.done.returncode != 0 and "SIGKILL" in killed.done.stderr
    assert "checkpoint-4" in killed.files and killed.steps == {2}
    assert not killed.files & {"metrics.json", "bundle"}
    check_same_end(with_ddp.place / "unbroken", with_ddp.place / "killed")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "rank", "before"),
    [
        *(("ddp", *point) for point in ((0, "optimizer"), (1, "state"))),
        *(("zero1", *point) for point in ((0, "state"), (1, "optimizer"))),
        *(("zero2", *point) for point in ((1, "state"), (0, "marker"))),
        *(("zero3", *point) for point in ((0, "optimizer"), (1, "state"))),
    ],
)
def test_a_process_killed_in_a_save_is_resumed(launcher, rank, before, unbroken, launch, arguments, tmp_path):
    out = tmp_path / "out"
    given = [*arguments("lora", out), *LONGER]
    done = launch(launcher, HERE / "run_and_die.py", "lora", str(rank), "4", before, *given)
    assert done.returncode != 0 and "SIGKILL" in done.stderr
    assert (out / "checkpoints" / "checkpoint-4").is_dir() and steps_of(out) == {2}
    assert not (out / "metrics.json").exists() and not (out / "bundle").exists()
    done = launch(launcher, LORA, *given, "--train.resume=true")
    assert done.returncode == 0, done.stderr[-3000:]
    check_same_end(unbroken(launcher), out)


# -- what cannot run ---------------------------------------------------------------------------


def check_refused(found: list[dict], *named: str) -> None:
    """Both processes end with 2, and one of them says why, in one line."""
    assert [entry["code"] for entry in found] == [2, 2], found
    said = [line for entry in found for line in entry["said"].splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and all(word in said[0] for word in named), said


def test_what_two_processes_cannot_run_is_refused_on_both(with_ddp, trained):
    """One launch refuses them all: after each refusal the processes are still in step."""
    found, place = with_ddp.found, with_ddp.place
    check_refused(found["batch"], "train.batch_size 5", "2 processes", "use 6")
    check_refused(found["data"], "fingerprint", "process 0", "process 1", "same data and base")
    check_refused(found["missing"], "nowhere", "process 1 of 2")
    check_refused(found["settings"], "train.learning_rate", "0.0005", "0.5", "process 1")
    check_refused(found["versions"], "the version of peft", "0.0.1", "process 1")
    check_refused(found["target_modules"], "target_modules")
    check_refused(found["stale"], "1 process", "2 processes with DDP", "launch the same way")
    check_refused(found["resumed"], "train.learning_rate", "0.5")
    assert not any((place / name).exists() for name in REFUSED_FROM_THE_START)
    assert steps_of(place / "stale") == steps_of(trained("lora"))


@pytest.mark.slow  # test_launch_checks.py holds the rule
def test_zero3_refuses_four_bits(launch, arguments, tmp_path):
    cases = [{"name": "qlora", "recipe": "qlora", "arguments": arguments("qlora", tmp_path / "out")}]
    done = launch("zero3", HERE / "run_recipes.py", str(tmp_path), json.dumps(cases))
    found = read_cases(done, tmp_path, cases)
    check_refused(found["qlora"], "qlora", "ZeRO-3", "zero2.yaml")
    assert not (tmp_path / "out").exists()
