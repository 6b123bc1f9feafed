"""Few-shot runs train both systems on exactly the targets asked for, and score them on the same test targets."""

import copy
import json

import numpy as np
import pytest
import torch

from benchmarks import results_page
from benchmarks.quality import few_shot
from llmrec_peft import Domain
from llmrec_peft.data.streams import IndependentPrompts, StreamSubset
from llmrec_peft.runs.split_streams import build_split_streams
from tests.conftest import ROOT

DOMAIN = ROOT / "recipes" / "configs" / "movies" / "domain.yaml"

# PEFT asks the base for an attribute that Transformers has renamed.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]


@pytest.fixture
def streams(small_log, tiny_tokenizer):
    """`streams(**changes)`: the small log's streams in windows of at most 4 targets after at most 2 events."""

    def build(**changes):
        domain = Domain.from_yaml(DOMAIN).to_dict()
        domain |= {"stream": {**domain["stream"], "context": 2, "targets": 4}, **changes}
        return build_split_streams(small_log(), Domain.from_dict(domain), tiny_tokenizer)

    return build


@pytest.fixture
def arguments(log_directory, tiny_base, tmp_path):
    """Of a run on the small log and a tiny base."""
    return [
        *("--data", str(log_directory), "--base", str(tiny_base("llama")), "--targets", "8", "16", "--seeds", "0", "1"),
        *("--history", "5", "--window", "4", "--seen", "16", "--batch-size", "2", "--learning-rate", "0.01"),
        *("--bootstrap", "20", "--test-targets", "20", "--output", str(tmp_path / "result.json")),
    ]


def test_windows_drawn_hold_the_requested_targets(streams, capsys):
    train = streams().train
    parts = [few_shot.draw(train, 16, seed) for seed in (0, 0, 1)]
    assert parts[0].windows.tolist() == parts[1].windows.tolist() != parts[2].windows.tolist()
    for part in parts:
        assert sum(len(part[number].labels) for number in range(len(part))) == 16
        assert len(set(few_shot.users_of(part))) == 4
    with pytest.raises(SystemExit):
        few_shot.draw(train, 4000, 0)
    assert "draws no 4000 training targets" in capsys.readouterr().err


def test_test_windows_come_from_as_many_users_as_there_are(streams):
    test = streams(stream={"context": 5, "targets": 1}).test
    has = np.bincount(test.log.user_codes[test.target_rows])
    drawn = np.bincount(few_shot.users_of(few_shot.draw_test(test, 24)), minlength=len(has))
    assert drawn.sum() == 24 < has.sum()
    # A user has one target fewer than another only where the turn ends, or where it has no more.
    assert ((drawn >= drawn.max() - 1) | (drawn == has)).all() and drawn.max() < has.max()
    everything = few_shot.draw_test(test, 10_000)
    assert few_shot.numbers_of(everything).tolist() == list(range(test.num_targets))


def test_prompts_are_what_the_windows_say_of_the_same_targets(streams):
    windows = few_shot.draw(streams().train, 16, 0)
    prompts, labels = few_shot.prompts_of(windows)
    expected = [
        (stream.input_ids[: marker + 1].tolist(), label)
        for stream in (windows[number] for number in range(len(windows)))
        for marker, label in zip(stream.markers, stream.labels, strict=True)
    ]
    assert list(zip(prompts, labels, strict=True)) == expected and len(expected) == 16
    # At most 2 + 3 events before a target, each with one arrow.
    arrows = [windows.parent.vocabulary.tokenizer.decode(ids).count(" ->") for ids in prompts]
    assert max(arrows) == 6 and min(arrows) <= 3


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("changes", [{}, {"simultaneous": "isolate", "stream": {"context": 5, "targets": 12}}])
def test_instruction_predicts_inside_a_window_as_after_each_prompt(streams, tiny_base, changes):
    test = streams(**changes).test
    test = StreamSubset(test, np.arange(len(test)))
    has_candidates = [bool((test[number].segment > 0).any()) for number in range(len(test))]
    assert any(has_candidates) == bool(changes)
    model, tokenizer = few_shot.load_instruction(str(tiny_base("llama")), r=4, alpha=8)
    with torch.no_grad():
        for value in model.parameters():
            if value.requires_grad:
                value.add_(0.1 * torch.randn(value.shape, generator=torch.Generator().manual_seed(0)))
    words = few_shot.first_tokens(tokenizer, test.parent.domain.outcomes)
    assert [tokenizer.decode([token]) for token in words] == [" no", " yes"]
    rows = few_shot.rows_of(test)
    assert len(rows) < test.parent.num_targets and sum(len(places) for _, places in rows) == test.parent.num_targets
    found = few_shot.word_probabilities(model, rows, words)
    alone = IndependentPrompts(test)
    for number, row in enumerate(found):
        with torch.no_grad():
            logits = model(input_ids=torch.from_numpy(alone[number].input_ids)[None].long()).logits[0, -1, words]
        assert row.numpy() == pytest.approx(logits.softmax(0).numpy(), abs=1e-5)


@pytest.mark.usefixtures("one_thread")
def test_both_systems_train_on_and_predict_the_same_targets(arguments, monkeypatch, tmp_path, capsys):
    seen = {"streams": [], "instruction": []}

    def of_streams(model, args, windows, *rest):
        seen["streams"].append((few_shot.prompts_of(windows), few_shot.numbers_of(windows).size))
        return trainers[0](model, args, windows, *rest)

    def of_instruction(model, tokenizer, prompts, *given, **settings):
        words = few_shot.first_tokens(tokenizer, Domain.from_yaml(DOMAIN).outcomes)
        labels = [words.index(row["labels"][-1]) for row in prompts.rows]
        seen["instruction"].append(((prompts.prompts, labels), len(prompts)))
        return trainers[1](model, tokenizer, prompts, *given, **settings)

    trainers = few_shot.behavior_trainer, few_shot.plain_trainer
    monkeypatch.setattr(few_shot, "behavior_trainer", of_streams)
    monkeypatch.setattr(few_shot, "plain_trainer", of_instruction)
    result = few_shot.main(arguments)
    assert seen["streams"] == seen["instruction"]
    assert [size for _, size in seen["streams"]] == [8, 8, 16, 16]
    assert result["test"]["targets"] >= 20 and result["test"]["users"] > 5
    # The last of four targets of a window follows five events.
    assert (result["domain"]["stream"]["context"], result["domain"]["stream"]["targets"]) == (2, 4)
    streams, instruction = (result["runs"][name] for name in ("streams", "instruction"))
    for runs in (streams, instruction):
        assert [len(runs[key]) for key in ("0", "8", "16")] == [1, 2, 2]
        values = {one["metrics"]["logloss"]["value"] for found in runs.values() for one in found}
        assert len(values) == 5 and np.isfinite(list(values)).all()
        assert runs["0"][0]["seconds"] == 0 < runs["8"][0]["seconds"]
        # 16 targets are seen: in two passes of one step each, or in one pass of two steps.
        assert [(one["passes"], one["steps"]) for one in runs["8"] + runs["16"]] == [(2, 2), (2, 2), (1, 2), (1, 2)]
        assert runs is not streams or runs["16"][0]["tokens_of_a_pass"] < instruction["16"][0]["tokens_of_a_pass"]
    # Both start from the same predictions, and end with others.
    for metric in few_shot.METRICS:
        before = streams["0"][0]["metrics"][metric]["value"]
        assert before == pytest.approx(instruction["0"][0]["metrics"][metric]["value"], abs=1e-5)
    assert streams["16"][0]["metrics"] != instruction["16"][0]["metrics"]
    gaps = result["streams_minus_instruction"]["runs"]
    assert list(gaps) == ["8", "16"]
    for key, found in gaps.items():
        for one, other, gap in zip(streams[key], instruction[key], found, strict=True):
            values = [run["metrics"]["auc"]["value"] for run in (one, other, gap)]
            assert values[2] == pytest.approx(values[0] - values[1])
    for name, sizes in result["summary"].items():
        for key, values in sizes.items():
            found = [run["metrics"]["auc"]["value"] for run in result["runs"][name][key]]
            assert values["auc"]["median"] == pytest.approx(np.median(found))
    text = (tmp_path / "result.json").read_text()
    assert {"command", "date", "seed", "machine", "versions", "settings", "minutes"} <= json.loads(text).keys()
    assert str(tmp_path) not in text
    assert "| 16 | instruction tuning" in capsys.readouterr().out
    check_page(results_page, json.loads(text))


def check_page(pages, result: dict) -> None:
    """Every size has a row for each system, and the gap stands below."""
    result = copy.deepcopy(result)
    result["summary"]["instruction"]["8"]["auc"] = {"median": 0.1234, "min": 0.1, "max": 0.2}
    result["streams_minus_instruction"]["runs"]["16"][1]["metrics"]["gauc"] = {"value": 0.1, "low": -0.2, "high": 0.3}
    text = pages.few_shot(result)
    above, below = text.split("Streams minus instruction tuning")
    rows = [line for line in above.splitlines() if line.startswith("| ")][2:]
    assert [row.split(" | ")[1] for row in rows[:-1]] == [pages.PEERS["streams"], pages.PEERS["instruction"]] * 3
    assert "0.123 (0.100 to 0.200)" in rows[3] and rows[3].startswith("| 8 | instruction")
    assert "20 or more" not in text
    gaps = [line.split(" | ") for line in below.splitlines() if line.startswith("| ")][2:]
    assert [gap[:2] for gap in gaps] == [["| 8", "0"], ["| 8", "1"], ["| 16", "0"], ["| 16", "1"]]
    assert gaps[3][3] == "+0.100 [-0.200, +0.300] |"
    first = result["streams_minus_instruction"]["runs"]["8"][0]["metrics"]["auc"]["value"]
    assert gaps[0][2].startswith(f"{first:+.3f}")


@pytest.mark.parametrize(
    "changes, message",
    [
        (["--window", "3"], "8 targets are no whole number of windows of 3"),
        (["--history", "2"], "follows 3 events or more, and --history is 2"),
        (["--seen", "0"], "--seen must be at least 1, got 0"),
        (["--data", "nowhere"], "nowhere"),
    ],
)
def test_wrong_options_end_with_one_line(arguments, capsys, changes, message):
    with pytest.raises(SystemExit) as ended:
        few_shot.main([*arguments, *changes])
    said = capsys.readouterr().err
    assert ended.value.code == 2 and message in said and said.count("\n") == 1
