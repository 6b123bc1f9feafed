"""The benchmarks run, compare equal work, and say so; their speeds are not judged here."""

import importlib
import json
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
DOMAIN = BENCHMARKS.parent / "recipes" / "configs" / "movies" / "domain.yaml"
TRAIN_SPEED = ["--rounds", "2", "--batch-size", "2", "--peer-targets", "3", "--peer-batch-sizes", "1", "2"]


@pytest.fixture
def train_speed(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("train_speed")


@pytest.fixture
def run(train_speed, tiny_base, log_directory, tmp_path):
    """`run(*arguments)`: the result of a short run on a tiny base and log; its file is result.json."""

    def short(*arguments: str) -> dict:
        return train_speed.main(
            ["--data", str(log_directory), "--base", str(tiny_base("llama")), "--output", str(tmp_path / "result.json")]
            + [*TRAIN_SPEED, "--matmul-sizes", "32", *arguments]
        )

    return short


def test_train_speed_measures_both_sides_on_the_same_targets(run, tmp_path, capsys):
    result = run()
    assert result["answers_max_difference"] <= 1e-4
    assert len(result["rounds"]) == 2
    for entry in result["rounds"]:
        assert entry["plain"]["targets"] == 3
        assert entry["stream"]["steps"] == 1
        # Padding is never negative, and each side computed at least the tokens that it was given.
        assert all(entry[side]["computed_tokens"] >= entry[side]["tokens"] > 0 for side in ("stream", "plain"))
        assert entry["stream"]["tokens_per_target"] < entry["plain"]["tokens_per_target"]
        assert entry["ratio"] == entry["stream"]["targets_per_s"] / entry["plain"]["targets_per_s"]
    # Two layers of hidden size 32 (4 heads, 2 key-value heads, MLP of 64), three norms apart from what trains.
    linear = 2 * (32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 64)
    assert result["base_parameters"] == linear + 5 * 32
    assert result["flops_per_token"] == 4 * result["base_parameters"] + 6 * result["trained_parameters"]
    text = (tmp_path / "result.json").read_text()
    written = json.loads(text)
    assert written["summary"]["ratio"]["median"] == result["summary"]["ratio"]["median"]
    assert {"command", "date", "seed", "machine", "versions", "settings"} <= written.keys()
    assert str(tmp_path) not in text
    shown = capsys.readouterr().out
    assert "stream / plain" in shown and "padding" in shown


def test_train_speed_trains_all_targets_on_request(run):
    result = run("--peer-targets", "0", "--rounds", "1", "--batch-size", "1", "--peer-batch-sizes", "4")
    (entry,) = result["rounds"]
    assert entry["plain"]["targets"] == entry["stream"]["targets"]


def test_train_speed_refuses_sides_that_answer_differently(run, train_speed, monkeypatch, tmp_path, capsys):
    original = train_speed.plain_logits
    monkeypatch.setattr(train_speed, "plain_logits", lambda *args: original(*args) + torch.tensor([0.0, 2e-4]))
    with pytest.raises(SystemExit) as stopped:
        run()
    assert stopped.value.code == 2
    assert "logits on the same targets differ by 0.0002" in capsys.readouterr().err
    assert not (tmp_path / "result.json").exists()


def test_train_speed_says_how_to_get_the_log(train_speed, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        train_speed.main(["--data", str(tmp_path / "nowhere")])
    assert stopped.value.code == 2
    assert "python -m llmrec_peft.data.download ml-latest-small" in capsys.readouterr().err


def test_batch_tokens_measures_every_size(run, train_speed, tiny_base, tmp_path):
    data = tmp_path / "log"
    batch_tokens = importlib.import_module("batch_tokens")
    result = batch_tokens.main(
        ["--data", str(data), "--base", str(tiny_base("llama")), "--output", str(tmp_path / "result.json")]
        + ["--rounds", "1", "--windows", "2", "--train", "300", "900", "--evaluate", "500"]
    )
    assert result["train"].keys() == {300, 900} and result["evaluate"].keys() == {500}
    assert all(entry["targets_per_s"]["min"] > 0 for entry in result["train"].values())


@pytest.fixture
def invariance(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("invariance")


@pytest.mark.slow
def test_invariance_holds_for_the_package_and_not_for_the_plain_trainer(invariance, log_directory, tiny_base, tmp_path):
    output = tmp_path / "result.json"
    result = invariance.main(
        ["--data", str(log_directory), "--domain", str(DOMAIN), "--base", str(tiny_base("llama"))]
        + ["--methods", "lora", "head", "--launchers", "accumulate2", "ddp", "--steps", "1"]
        + ["--learning-rate", "0.01", "--output", str(output)]
    )
    cells = result["cells"]
    assert cells.keys() == {"lora", "lora, weighted", "lora, listwise", "head", "plain"}
    assert all(row.keys() == {"one", "accumulate2", "ddp"} for row in cells.values())
    assert result["failures"] == []
    assert len(set(result["data"]["targets"])) > 1
    for name in ("accumulate2", "ddp"):
        # The plain gradient counts twice, so one step of SGD goes twice as far.
        assert cells["plain"][name]["first_step"] == pytest.approx(2 * cells["plain"]["one"]["first_step"], rel=1e-3)
        assert cells["plain"][name]["max"] > 1e-3
    assert str(tmp_path) not in output.read_text()
    # The same cells under a tolerance that rounding alone exceeds: each that differs is named.
    strict = invariance.failures(cells, 1e-12)
    assert any(line.startswith("lora x ddp: differs by") for line in strict)
    assert not any(line.startswith("plain") for line in strict)


ONE = {"max": 0.0, "mean": 0.0, "moved_max": 2e-2, "moved": 1.0}


@pytest.mark.parametrize(
    "one, other, line",
    [
        (ONE, {"max": 2e-5, "mean": -1e-6}, "lora x ddp: differs by 2.0e-05 at most and -1.0e-06 in the mean"),
        (ONE, {"max": float("nan"), "mean": float("nan")}, "lora x ddp: differs by nan"),
        ({**ONE, "moved_max": 1e-4}, {"max": 0.0, "mean": 0.0}, "lora x one: moves weights by 1.0e-04 at most"),
        ({**ONE, "moved_max": float("nan")}, {"max": 0.0, "mean": 0.0}, "lora x one: moves weights by nan at most"),
        ({"refused": "no"}, {"refused": "no"}, "lora x one: is refused"),
    ],
)
def test_invariance_names_the_cell_that_does_not_hold(invariance, one, other, line):
    (found,) = invariance.failures({"lora": {"one": one, "ddp": other}}, 1e-5)
    assert found.startswith(line)


def test_invariance_passes_over_the_plain_trainer_and_what_is_refused(invariance):
    cells = {
        "qlora": {"one": ONE, "zero3": {"refused": "no"}},
        "plain": {"one": ONE, "zero3": {"max": 1.0, "mean": 1.0}},
    }
    assert invariance.failures(cells, 1e-5) == []


def test_invariance_takes_the_worst_of_the_ranks(invariance):
    cells = [{"max": number} for number in (1e-8, 3e-5, 2e-5)]
    assert invariance.worst(cells) == {"max": 3e-5}
    assert str(invariance.worst([{"max": 3e-5}, {"max": float("nan")}, {"max": 1.0}])) == "{'max': nan}"


def test_invariance_compares_signed_numbers_and_keeps_what_is_no_number(invariance):
    worker = importlib.import_module("invariance_worker")
    one, other = {"a": torch.zeros(3), "b": torch.zeros(1)}, {"a": torch.tensor([1.0, -3.0, 0.0]), "b": torch.ones(1)}
    assert worker.differences(one, other) == {"max": 3.0, "mean": -0.25, "numbers": 4}
    other["a"][2] = torch.nan
    assert str(worker.differences(one, other)["max"]) == "nan"
    with pytest.raises(SystemExit):
        worker.differences(one, {"a": one["a"]})


def test_step_profile_counts_a_step_and_its_ceiling(monkeypatch, tiny_base, log_directory, tmp_path, capsys):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    step_profile, measuring = (importlib.import_module(name) for name in ("step_profile", "measuring"))
    monkeypatch.setattr(step_profile, "matmul_rate", lambda sizes: {size: 1e9 * size for size in sizes})
    arguments = ["--data", str(log_directory), "--base", str(tiny_base("llama")), "--rounds", "2", "--matmul-sizes",
                 "1", "2", "--output", str(tmp_path / "step.json")]  # fmt: skip
    result = step_profile.main([*arguments, "--tokens", "400"])
    assert (tmp_path / "step.json").is_file() and 0 < result["tokens"] <= 400
    assert result["matmul_flops_per_s"]["median"] == 2e9
    flops, tokens = result["flops"], result["tokens"]
    # Two layers of hidden size 32 (4 heads, 2 key-value heads, MLP of 64), five norms; LoRA of rank 16 and the head.
    base = 2 * (32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 64) + 5 * 32
    trained = 2 * 16 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 64)) + 2 * 32
    assert flops["weights"] == tokens * (4 * base + 6 * trained)
    assert flops["attention"] == 3 * 4 * 32 * 2 * tokens * (tokens + 1) / 2
    assert result["ceiling"] == pytest.approx(flops["weights"] / sum(flops.values()))
    wanted = sum(flops.values()) / flops["weights"]
    assert result["matmul_share_with_attention"]["max"] / result["matmul_share"]["max"] == pytest.approx(wanted)
    assert all(share > 0 for share in result["profile"].values())
    assert sum(result["profile"].values()) == pytest.approx(1)
    # Each pair of a query and a key at or before it: one multiply-add a number for the score, one for the value.
    pairs = sum(key <= query for length in (3, 5) for query in range(length) for key in range(length))
    assert measuring.attention_flops([3, 5], 8, 2, training=False) == pairs * 2 * (2 * 8) * 2
    assert measuring.attention_flops([3, 5], 8, 2) == 3 * measuring.attention_flops([3, 5], 8, 2, training=False)
    # Windows with candidates go through too: what a candidate sees is its window before it, not the other candidates.
    (tmp_path / "domain.yaml").write_text(DOMAIN.read_text() + "negatives: {per_positive: 1, label: dislike}\n")
    candidates = step_profile.main([*arguments, "--tokens", "400", "--domain", str(tmp_path / "domain.yaml")])
    tokens = candidates["tokens"]
    assert result["one_mask"] is None
    fast, slow, ratio = candidates["seconds"], candidates["one_mask"]["seconds"], candidates["one_mask"]["ratio"]
    assert slow["min"] / fast["max"] <= ratio["min"] <= ratio["max"] <= slow["max"] / fast["min"]
    assert 0 < candidates["flops"]["attention"] < 3 * 4 * 32 * 2 * tokens * (tokens + 1) / 2
    with pytest.raises(SystemExit) as ended:
        step_profile.main([*arguments, "--tokens", "1"])
    assert ended.value.code == 2 and "no window has 1 tokens or fewer" in capsys.readouterr().err


def test_step_profile_sorts_operations_by_kind(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    by_kind = importlib.import_module("step_profile").by_kind
    times = {"aten::mm": 5.0, "aten::addmm_": 1.0, "aten::_flash_attention_backward": 2.5, "aten::mul": 1.0,
             "aten::bmm": 0.5}  # fmt: skip
    assert by_kind(times, in_blocks=True) == pytest.approx({"products": 0.6, "attention": 0.3, "rest": 0.1})
    assert by_kind(times, in_blocks=False) == pytest.approx({"products": 0.65, "attention": 0.25, "rest": 0.1})
    with pytest.raises(ValueError, match="no time"):
        by_kind({"aten::mm": 0.0}, in_blocks=True)


def test_commands_in_results_show_no_place_outside_the_repository(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    command = importlib.import_module("measuring").command
    words = ["--data", str(tmp_path / "movies"), "--domain", str(DOMAIN), "--other", str(tmp_path / "y.yaml")]
    assert command(str(tmp_path / "bank.py"), [*words, "--rounds", "2"]) == (
        "python benchmarks/bank.py --data movies --domain recipes/configs/movies/domain.yaml --other y.yaml --rounds 2"
    )
    assert command("bank.py", []) == "python benchmarks/bank.py"
