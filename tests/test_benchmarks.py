"""The benchmarks run, compare equal work, and say so; their speeds are not judged here."""

import importlib
import json

import numpy as np
import pytest
import torch

from benchmarks import cost_curves, measuring, plots, results_page, train_speed, training
from llmrec_peft import Domain
from llmrec_peft.data.layout import PREFIX
from llmrec_peft.models.base import load_config, load_tokenizer
from llmrec_peft.runs.split_streams import build_split_streams
from tests.conftest import ROOT

DOMAIN = ROOT / "recipes" / "configs" / "movies" / "domain.yaml"
LAYER = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64 + 2 * 32
"""Weights of a layer of the tiny base: query, output, key, value, three of the MLP, two norms."""
LORA = 2 * 64 + 2 * 48 + 3 * 96
"""Numbers that rank 1 adds to a layer."""

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # PEFT asks the base for an attribute that Transformers has renamed.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]


@pytest.fixture
def run(tiny_base, log_directory, tmp_path):
    """`run(module, *words)`: the result of a run on a tiny base and log; its file is result.json."""
    base = str(tiny_base("llama"))

    def short(name: str, *words: str) -> dict:
        module, _, command = name.partition(" ")
        return importlib.import_module(f"benchmarks.{module}").main(
            [*([command] if command else []), "--data", str(log_directory), "--domain", str(DOMAIN)]
            + ["--base", base, "--output", str(tmp_path / "result.json"), *words]
        )

    return short


SMALLEST = {
    "train_speed compare": "--rounds 1 --batch-size 2 --peer-targets 2 --peer-batch-sizes 1 --matmul-sizes 32",
    "train_speed profile": "--rounds 1 --tokens 400 --matmul-sizes 32",
    "train_speed curves": "--rounds 1 --context 0 --targets 2 --candidates 2 --rank 2 --layers 1 --window 3 4 "
    "--step-tokens 1 --tokens 60 --max-length 2048 --matmul-sizes 32",
    "score_speed history": "--rounds 1 --candidates 4 --tokens 60",
    "score_speed bank": "--rounds 1 --requests 2 --candidates 2 --domains 2",
    "quality.protocol": "--no-text --bootstrap 5",
    "quality.negatives": "--bootstrap 5 --domain negatives.yaml",
    "quality.few_shot": "--targets 8 --seeds 0 --history 5 --window 4 --seen 8 --bootstrap 5 --test-targets 8",
}
"""What needs no process of its own and no run of a recipe."""


@pytest.mark.parametrize("name", SMALLEST)
def test_smallest_form(name, run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    negatives = "negatives: {per_positive: 1, label: dislike}\n"
    (tmp_path / "negatives.yaml").write_text(DOMAIN.read_text(encoding="utf-8") + negatives, encoding="utf-8")
    result = run(name, *SMALLEST[name].split())
    text = (tmp_path / "result.json").read_text(encoding="utf-8")
    assert {"command", "date", "seed", "machine", "versions", "settings", "minutes"} <= json.loads(text).keys()
    assert result["command"].startswith(f"python -m benchmarks.{name} --data log --domain recipes/configs/movies/")
    assert str(tmp_path) not in text and len(capsys.readouterr().out) > 100


def test_commands_in_results_show_no_place_outside_the_repository(tmp_path):
    words = ["--data", str(tmp_path / "movies"), "--domain", str(DOMAIN), "--other", str(tmp_path / "y.yaml")]
    script = str(ROOT / "benchmarks" / "quality" / "protocol.py")
    assert measuring.command(script, [*words, "--rounds", "2", f"llm={tmp_path / 'llm'}"]) == (
        "python -m benchmarks.quality.protocol --data movies --domain recipes/configs/movies/domain.yaml "
        "--other y.yaml --rounds 2 llm=OUT/llm"
    )


# -- a step's speed --------------------------------------------------------------------------------


@pytest.mark.slow
def test_both_sides_train_on_the_same_targets(run, monkeypatch, capsys):
    words = ["--rounds", "2", "--batch-size", "2", "--peer-targets", "3", "--peer-batch-sizes", "1", "2",
             "--matmul-sizes", "32"]  # fmt: skip
    result = run("train_speed compare", *words)
    assert result["logits_max_difference"] <= 1e-4 and len(result["rounds"]) == 2
    for entry in result["rounds"]:
        assert entry["plain"]["targets"] == 3 and entry["stream"]["steps"] == 1
        # Padding is never negative, and each side computed at least the tokens that it was given.
        assert all(entry[side]["computed_tokens"] >= entry[side]["tokens"] > 0 for side in ("stream", "plain"))
        assert entry["stream"]["tokens_per_target"] < entry["plain"]["tokens_per_target"]
        assert entry["ratio"] == entry["stream"]["targets_per_s"] / entry["plain"]["targets_per_s"]
    assert result["base_parameters"] == 2 * LAYER + 32
    assert result["flops_per_token"] == 4 * result["base_parameters"] + 6 * result["trained_parameters"]
    (entry,) = run("train_speed compare", *words, "--rounds", "1", "--peer-targets", "1000")["rounds"]
    assert entry["plain"]["targets"] == entry["stream"]["targets"]
    original = train_speed.plain_logits
    monkeypatch.setattr(train_speed, "plain_logits", lambda *args: original(*args) + torch.tensor([0.0, 2e-4]))
    with pytest.raises(SystemExit) as stopped:
        run("train_speed compare", *words)
    assert stopped.value.code == 2 and "logits on the same targets differ by 0.0002" in capsys.readouterr().err


@pytest.mark.slow
def test_profile_counts_a_step_and_its_ceiling(run, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(train_speed, "matmul_rate", lambda sizes: 1e9 * max(sizes))
    words = ["--rounds", "2", "--matmul-sizes", "1", "2", "--tokens", "400"]
    result = run("train_speed profile", *words)
    assert 0 < result["tokens"] <= 400 and result["matmul_flops_per_s"]["median"] == 2e9
    flops, tokens = result["flops"], result["tokens"]
    assert flops["weights"] == tokens * (4 * (2 * LAYER + 32) + 6 * (2 * 16 * LORA + 2 * 32))
    assert flops["attention"] == 3 * 4 * 32 * 2 * tokens * (tokens + 1) / 2
    assert result["ceiling"] == pytest.approx(flops["weights"] / sum(flops.values()))
    assert sum(result["profile"].values()) == pytest.approx(1) and result["one_mask"] is None
    # A candidate sees its window before it, not the other candidates.
    (tmp_path / "domain.yaml").write_text(DOMAIN.read_text() + "negatives: {per_positive: 1, label: dislike}\n")
    candidates = run("train_speed profile", *words, "--domain", str(tmp_path / "domain.yaml"))
    tokens, fast, slow = candidates["tokens"], candidates["seconds"], candidates["one_mask"]["seconds"]
    ratio = candidates["one_mask"]["ratio"]
    assert slow["min"] / fast["max"] <= ratio["min"] <= ratio["max"] <= slow["max"] / fast["min"]
    assert 0 < candidates["flops"]["attention"] < 3 * 4 * 32 * 2 * tokens * (tokens + 1) / 2
    with pytest.raises(SystemExit):
        run("train_speed profile", "--tokens", "1")
    assert "no window has 1 tokens or fewer" in capsys.readouterr().err


@pytest.mark.slow
def test_profile_sorts_operations_by_kind():
    times = {"aten::mm": 5.0, "aten::addmm_": 1.0, "aten::_flash_attention_backward": 2.5, "aten::mul": 1.0,
             "aten::bmm": 0.5}  # fmt: skip
    assert train_speed.by_kind(times, True) == pytest.approx({"products": 0.6, "attention": 0.3, "rest": 0.1})
    assert train_speed.by_kind(times, False) == pytest.approx({"products": 0.65, "attention": 0.25, "rest": 0.1})
    with pytest.raises(ValueError, match="no time"):
        train_speed.by_kind({"aten::mm": 0.0}, True)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_attention_counts_the_pairs_that_the_mask_allows(small_log, tiny_base, kind):
    rules = {"simultaneous": "isolate", "stream": {"context": 3, "targets": 4, "max_length": 2048},
             "negatives": {"per_positive": 2, "sampling": "popularity", "label": "dislike"}}  # fmt: skip
    domain, base = Domain.from_dict({**Domain.from_yaml(DOMAIN).to_dict(), **rules}), str(tiny_base(kind))
    streams, config = build_split_streams(small_log(), domain, load_tokenizer(base)).train, load_config(base)
    windows = [streams[number] for number in range(len(streams))]
    assert max(stream.segment.max() for stream in windows) > 4
    for stream in windows:
        query, key = stream.segment[:, None], stream.segment[None, :]
        pairs = int(np.tril((key == PREFIX) | (key == query)).sum())
        # Two layers of width 32; scores and their sum with the values, two operations each.
        assert training.attention_flops(stream.position_ids, config, training=False) == 2 * 4 * 32 * pairs
        assert training.attention_flops(stream.position_ids, config, training=True) == 3 * 2 * 4 * 32 * pairs


# -- curves ----------------------------------------------------------------------------------------

POINTS = {"context": [0, 3], "targets": [1, 2, 4], "candidates": [1, 6], "rank": [2, 16], "layers": [1, 2]}
CURVES = [word for name, xs in POINTS.items() for word in (f"--{name}", *map(str, xs))]
CURVES += ["--window", "3", "4", "--rounds", "2", "--step-tokens", "1", "--tokens", "60", "--max-length", "2048",
           "--matmul-sizes", "2", "1"]  # fmt: skip


@pytest.mark.slow
def test_every_point_of_the_curves_is_measured_and_counted(run, monkeypatch, tmp_path):
    monkeypatch.setattr(cost_curves, "matmul_rate", lambda sizes: 2e9)
    result = run("train_speed curves", *CURVES)
    found = {
        name: {point["x"]: point["rounds"] for point in curve["points"]} for name, curve in result["curves"].items()
    }
    assert {name: list(points) for name, points in found.items()} == POINTS
    # One window a step: as many targets as the point asks for, and the same ones with more history.
    for name in ("context", "rank", "layers"):
        assert {entry["count"] for rounds in found[name].values() for entry in rounds} == {4}
    assert [entry["count"] for rounds in found["targets"].values() for entry in rounds] == [1, 1, 2, 2, 4, 4]
    assert all(a["tokens"] < b["tokens"] for a, b in zip(found["context"][0], found["context"][3], strict=True))
    # All points of a round see the same windows, and another round others.
    tokens = [entry["tokens"] for entry in found["rank"][2]]
    assert tokens == [entry["tokens"] for entry in found["layers"][1]] and tokens[0] != tokens[1]
    for layers, (first, _) in found["layers"].items():
        assert first["flops_per_token"] == 4 * (layers * LAYER + 32) + 6 * (16 * layers * LORA + 2 * 32)
        assert first["attention_flops"] == 3 * 4 * 32 * layers * first["tokens"] * (first["tokens"] + 1) / 2
    for rank, (first, _) in found["rank"].items():
        assert first["flops_per_token"] == 4 * (2 * LAYER + 32) + 6 * (rank * 2 * LORA + 2 * 32)
    one, six = (found["candidates"][x][0] for x in (1, 6))
    assert one["flops_per_token"] == six["flops_per_token"] == 2 * (2 * LAYER + 32)
    assert 60 < one["tokens"] < six["tokens"] < 6 * one["tokens"]
    for entry in (entry for points in found.values() for rounds in points.values() for entry in rounds):
        assert entry["share"] < entry["share_with_attention"]
        assert entry["per_s"] == pytest.approx(entry["count"] / entry["seconds"])
        assert entry["peak_mib"] is None or entry["peak_mib"] >= entry["rest_mib"] > 50
    result["curves"]["rank"]["points"][0]["peak_mib"] = None
    page = results_page.cost_curves(result)
    assert "not known" in page and all(f"benchmarks/results/cost_{name}.png" in page for name in POINTS)
    (tmp_path / "cost_curves.json").write_text(json.dumps(result))
    plots.draw(tmp_path / "cost_curves.json")
    assert all((tmp_path / f"cost_{name}.png").stat().st_size > 10_000 for name in POINTS)


@pytest.mark.slow
def test_floors_are_what_the_operations_take():
    entry = {"count": 30, "tokens": 1000, "flops_per_token": 5e8, "attention_flops": 1e11, "per_s": 6.0,
             "matmul_flops_per_s": 1e11}  # fmt: skip
    # 5e11 operations take 5 s, and 1e11 more one second.
    assert cost_curves.floors(entry) == pytest.approx(
        {"floor_per_s": 6, "floor_with_attention_per_s": 5, "share": 1, "share_with_attention": 1.2}
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "words, message",
    [
        ("--rounds 0", "--rounds must be at least 1, got 0"),
        ("--context 5 -1", "--context must be at least 0, got -1"),
        ("--rank 0", "--rank must be at least 1, got 0"),
        ("--layers 2 3", "--layers must be at most 2, the layers the base has, got 3"),
        ("--candidates 25", "--candidates must be at most 24, the items the log has, got 25"),
        ("--context 60", "no training window has 60 history events and 4 targets; ask for fewer"),
        ("--max-length 2049", "base has 2048 positions but max_length is 2049"),
        ("--tokens 100000", "no user of this log has a history of so many tokens; lower --tokens"),
        ("--data nowhere", "nowhere"),
    ],
)
def test_what_cannot_be_measured_is_named_in_one_line(run, tmp_path, capsys, words, message):
    name = words.split()[0][2:]
    with pytest.raises(SystemExit) as stopped:
        run("train_speed curves", *CURVES, "--curves", name if name in POINTS else "candidates", *words.split())
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and message in error and error.count("\n") == 1
    assert not (tmp_path / "result.json").exists()


# -- memory ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_memory_of_training(run):
    (row, _) = run("memory train", "--only", "head", "--zero", "0", "--micro-tokens", "400")["rows"]
    assert row["method"] == "head" and row["measured_mib"] > 0 and row["processes"][0]["steps"] == 2
    (again, _) = run("memory train", "--again")["rows"]
    assert again == row
