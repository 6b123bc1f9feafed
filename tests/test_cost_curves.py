"""The cost curves count what they say, measure every point, and write all down; speeds are not judged here."""

import argparse
import gc
import importlib
import json
import weakref
from pathlib import Path

import numpy as np
import pytest

from llmrec_peft import Domain
from llmrec_peft.data.layout import PREFIX
from llmrec_peft.models.base import load_config, load_tokenizer
from llmrec_peft.runs.split_streams import build_split_streams

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
DOMAIN = BENCHMARKS.parent / "recipes" / "configs" / "movies" / "domain.yaml"
RATE = 2e9
POINTS = {"context": [0, 3], "targets": [1, 2, 4], "candidates": [1, 6], "rank": [2, 16], "layers": [1, 2]}
# What else the options say, so that floors can be counted by hand: weights of a layer of the tiny base (query, output,
# key, value, three of the MLP) with two norms, and the numbers that rank 1 adds to it.
LAYER, LORA = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64 + 2 * 32, 2 * 64 + 2 * 48 + 3 * 96
HEAD = 2 * 32

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # PEFT asks the base for an attribute that Transformers has renamed.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]


@pytest.fixture
def curves(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    module = importlib.import_module("cost_curves")
    monkeypatch.setattr(module, "matmul_rate", lambda sizes: {size: RATE / size for size in sizes})
    # Each point collects garbage, and need not look through all that the tests have imported.
    gc.freeze()
    yield module
    gc.unfreeze()


@pytest.fixture
def arguments(log_directory, tiny_base, tmp_path):
    """Of a short run on a tiny base and log; a step is one window."""
    points = [word for name, xs in POINTS.items() for word in (f"--{name}", *map(str, xs))]
    return [
        *(
            "--data",
            str(log_directory),
            "--base",
            str(tiny_base("llama")),
            *points,
            "--window",
            "3",
            "4",
            "--rounds",
            "2",
        ),
        *("--step-tokens", "1", "--tokens", "60", "--max-length", "2048", "--matmul-sizes", "2", "1"),
        *("--output", str(tmp_path / "out" / "cost_curves.json")),
    ]


def test_every_point_is_measured_and_counted(curves, arguments, tmp_path, capsys):
    result = curves.main(arguments)
    text = (tmp_path / "out" / "cost_curves.json").read_text()
    written = json.loads(text)
    assert {"command", "date", "seed", "machine", "versions", "settings", "minutes"} <= written.keys()
    assert written["curves"] == result["curves"] and str(tmp_path) not in text
    found = {
        name: {point["x"]: point["rounds"] for point in curve["points"]} for name, curve in result["curves"].items()
    }
    assert {name: list(points) for name, points in found.items()} == POINTS
    assert all(len(rounds) == 2 for points in found.values() for rounds in points.values())
    # One window a step: as many targets as the point asks for, and the same ones with more history.
    for name, count in (("context", 4), ("rank", 4), ("layers", 4)):
        assert {entry["count"] for rounds in found[name].values() for entry in rounds} == {count}
    assert [entry["count"] for rounds in found["targets"].values() for entry in rounds] == [1, 1, 2, 2, 4, 4]
    assert all(a["tokens"] < b["tokens"] for a, b in zip(found["context"][0], found["context"][3], strict=True))
    # All points of a round see the same windows, and another round others.
    tokens = [entry["tokens"] for entry in found["rank"][2]]
    assert tokens == [entry["tokens"] for entry in found["layers"][1]] and tokens[0] != tokens[1]
    for layers, rounds in found["layers"].items():
        weights = layers * LAYER + 32
        assert rounds[0]["flops_per_token"] == 4 * weights + 6 * (16 * layers * LORA + HEAD)
        assert rounds[0]["attention_flops"] == 3 * 4 * 32 * layers * rounds[0]["tokens"] * (rounds[0]["tokens"] + 1) / 2
    for rank, rounds in found["rank"].items():
        assert rounds[0]["flops_per_token"] == 4 * (2 * LAYER + 32) + 6 * (rank * 2 * LORA + HEAD)
    one, six = (found["candidates"][x][0] for x in (1, 6))
    assert one["flops_per_token"] == six["flops_per_token"] == 2 * (2 * LAYER + 32)
    assert 60 < one["tokens"] < six["tokens"] < 6 * one["tokens"]
    for rounds in (rounds for points in found.values() for rounds in points.values()):
        for entry in rounds:
            assert entry["matmul_flops_per_s"] == RATE
            assert entry["share"] < entry["share_with_attention"]
            assert entry["per_s"] == pytest.approx(entry["count"] / entry["seconds"])
            assert entry["peak_mib"] is None or entry["peak_mib"] >= entry["rest_mib"] > 50
    shown = capsys.readouterr().out
    # All points once, then again.
    order = [line.split(":")[0] for line in shown.splitlines() if line.startswith("round")]
    once = [f"{name} {x}" for name, xs in POINTS.items() for x in xs]
    assert order == [f"round {number}, {point}" for number in (1, 2) for point in once]
    assert "with attention" in shown and curves.CURVES["rank"][0] in shown
    for name in POINTS:
        assert (tmp_path / "out" / f"cost_{name}.png").stat().st_size > 10_000


def test_the_page_shows_a_table_and_the_plot_of_each_curve(curves, arguments, tmp_path):
    curves.main([*arguments, "--curves", "rank", "context", "--rounds", "1"])
    assert sorted(path.name for path in (tmp_path / "out").glob("*.png")) == ["cost_context.png", "cost_rank.png"]
    pages, result = importlib.import_module("results_page"), tmp_path / "out" / "cost_curves.json"
    found = json.loads(result.read_text())
    page = pages.page(tmp_path / "out")
    assert "## What a target costs" in page and "cost_layers" not in page
    for name in ("context", "rank"):
        # Beside the page, and in the repository's own place on the committed one.
        assert f"(out/cost_{name}.png)" in page
        assert f"(../benchmarks/results/cost_{name}.png)" in pages.cost_curves(found)
        for point in found["curves"][name]["points"]:
            assert f"| {point['x']} | {point['per_s']['median']:.2f} (" in page
    found["curves"]["rank"]["points"][0]["peak_mib"] = None
    assert "not known" in pages.cost_curves(found)
    curves.plot(found["curves"]["rank"], tmp_path / "gap.png")
    assert "not known" in curves.table(found)


def test_floors_are_what_the_operations_take(curves):
    entry = {"count": 30, "tokens": 1000, "flops_per_token": 5e8, "attention_flops": 1e11, "per_s": 6.0,
             "matmul_flops_per_s": 1e11}  # fmt: skip
    # 5e11 operations take 5 s, and 1e11 more one second.
    assert curves.floors(entry) == pytest.approx(
        {"floor_per_s": 6, "floor_with_attention_per_s": 5, "share": 1, "share_with_attention": 1.2}
    )


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_attention_counts_the_pairs_that_the_mask_allows(curves, small_log, tiny_base, kind):
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
        assert curves.attention_of(stream.position_ids, config, training=False) == 2 * 4 * 32 * pairs
        assert curves.attention_of(stream.position_ids, config, training=True) == 3 * 2 * 4 * 32 * pairs


def test_windows_have_just_the_history_and_the_events_asked_for(curves, small_log, tiny_base):
    rule = {"stream": {"context": 3, "targets": 4, "max_length": 2048}}
    domain = Domain.from_dict({**Domain.from_yaml(DOMAIN).to_dict(), **rule})
    log = small_log()
    streams = build_split_streams(log, domain, load_tokenizer(str(tiny_base("llama")))).train
    chosen = curves.fitting(streams, 3, 4)
    assert 0 < len(chosen) < len(streams)
    for number in range(len(streams)):
        # Every row of this log has a label, so that all earlier rows of the user are history.
        first = int(streams.target_rows[streams.target_offsets[number]])
        earlier = first - int(log.user_offsets[log.user_codes[first]])
        assert (number in chosen) == (earlier >= 3 and len(streams[number].labels) == 4)


def test_one_classifier_is_in_memory_at_a_time(curves, tiny_base, tmp_path):
    options = argparse.Namespace(seed=0, learning_rate=1e-3, micro_tokens=400)
    sides = curves.Sides(options, Domain.from_yaml(DOMAIN), tmp_path)
    base = str(tiny_base("llama"))
    first = weakref.ref(sides.get(base, 2).classifier)
    assert sides.get(base, 2).classifier is first()
    second = weakref.ref(sides.get(base, 4).classifier)
    assert first() is None and second() is not None
    sides.drop()
    assert second() is None


@pytest.mark.parametrize(
    "words, message",
    [
        (["--rounds", "0"], "--rounds must be at least 1, got 0"),
        (["--context", "5", "-1"], "--context must be at least 0, got -1"),
        (["--rank", "0"], "--rank must be at least 1, got 0"),
        (["--layers", "2", "3"], "--layers must be at most 2, the layers the base has, got 3"),
        (["--candidates", "25"], "--candidates must be at most 24, the items the log has, got 25"),
        (["--window", "3", "0"], "--window must be a context from 0 and targets from 1, got 3 0"),
        (["--context", "60"], "no training window has 60 history events and 4 to answer; ask for fewer"),
        (["--max-length", "2049"], "base has 2048 positions but max_length is 2049"),
        (["--tokens", "100000"], "no user of this log has a history of so many tokens; lower --tokens"),
        (["--data", "nowhere"], "nowhere is no directory"),
    ],
)
def test_what_cannot_be_measured_is_named_in_one_line(curves, arguments, tmp_path, capsys, words, message):
    name = words[0][2:]
    chosen = name if name in POINTS else "candidates"
    with pytest.raises(SystemExit) as stopped:
        curves.main([*arguments, "--curves", chosen, *words])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_the_quick_form_has_the_arguments_that_this_takes(curves, tmp_path):
    steps = importlib.import_module("run_all").plan("DIR", DOMAIN, tmp_path)
    script, *words = steps["cost_curves"]
    options = curves.parse(words)
    assert script == "benchmarks/cost_curves.py" and options.curves == list(POINTS) and options.rounds == 1
    assert Path(options.output) == tmp_path / "results" / "cost_curves.json"
