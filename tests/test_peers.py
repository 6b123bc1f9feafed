"""The peers of the benchmarks do what they say, and are compared on the same targets; their speeds are not judged."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.quality.peers import compare, plain, swift
from benchmarks.quality.peers.streams import draw_spread_over_users
from llmrec_peft import Domain
from llmrec_peft.models.head import first_tokens
from llmrec_peft.runs.split_streams import build_split_streams
from tests.conftest import ROOT

DOMAIN = ROOT / "recipes" / "configs" / "movies" / "domain.yaml"
OUTCOMES = {"dislike": " no\n", "like": " yes\n"}
TEXTS = ["Heat (Action, Crime) ->", "Movies one viewer rated:\nToy Story (Animation) -> yes\nHeat (Action, Crime) ->"]
SYSTEMS = ("plain", "instruction", "streams")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("one_thread"),
    # PEFT asks the base for an attribute that Transformers has renamed.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]


@pytest.fixture
def model(tiny_base):
    """A language model with LoRA that is not where it started, its tokenizer, and the tokens of its label words."""
    model, tokenizer = plain.load_instruction(str(tiny_base("llama")), r=4, alpha=8)
    with torch.no_grad():
        for value in model.parameters():
            if value.requires_grad:
                value.add_(0.1 * torch.randn(value.shape, generator=torch.Generator().manual_seed(0)))
    return model, tokenizer, first_tokens(tokenizer, OUTCOMES)


def last_logits(model, tokenizer, text: str) -> torch.Tensor:
    """Logits over the vocabulary after one prompt, alone and without padding."""
    model.eval()
    with torch.no_grad():
        return model(input_ids=torch.tensor([tokenizer(text)["input_ids"]])).logits[0, -1]


def test_instruction_scores_with_the_softmax_of_the_two_label_words(model):
    model, tokenizer, words = model
    assert [tokenizer.decode([token]) for token in words] == [" no", " yes"]
    prompts = plain.PromptDataset(TEXTS, [0, 1], tokenizer, words)
    found = plain.word_probabilities(model, [(ids, [len(ids) - 1]) for ids in prompts.prompts], words)
    for text, row in zip(TEXTS, found, strict=True):
        no, yes = (last_logits(model, tokenizer, text)[token].double() for token in words)
        assert row[1].item() == pytest.approx((yes.exp() / (no.exp() + yes.exp())).item(), abs=1e-5)
        assert row.sum().item() == pytest.approx(1, abs=1e-5)


def test_instruction_learns_the_label_word_alone_over_the_whole_vocabulary(model, tmp_path):
    model, tokenizer, words = model
    prompts = plain.PromptDataset(TEXTS, [1, 0], tokenizer, words)
    assert [label for label in prompts[1]["labels"] if label != -100] == [words[0]]
    trainer, _ = plain.plain_trainer(
        model, tokenizer, prompts, tmp_path, batch_size=2, train_sampling_strategy="sequential"
    )
    (batch,) = trainer.get_train_dataloader()
    assert (batch["labels"] != -100).sum() == 2 and (batch["attention_mask"] == 0).any()
    with torch.no_grad():
        loss = trainer.compute_loss(model, batch, num_items_in_batch=torch.tensor(2))
    wanted = [
        -last_logits(model, tokenizer, text).log_softmax(-1)[words[label]].item()
        for text, label in zip(TEXTS, [1, 0], strict=True)
    ]
    assert loss.item() == pytest.approx(np.mean(wanted), rel=1e-5)


# -- curves ----------------------------------------------------------------------------------------------------------

FAST = [{"seconds": s, "targets": n, "auc": a} for s, n, a in ((0, 0, 0.5), (10, 100, 0.7), (20, 200, 0.9))]
SLOW = [{"seconds": s, "targets": n, "auc": a} for s, n, a in ((0, 0, 0.6), (16, 50, 0.5), (40, 80, 0.75))]


def test_curves_are_read_at_the_end_of_the_shortest():
    at, found = compare.side_by_side({"fast": FAST, "slow": SLOW}, 0.8)
    assert at == {"seconds": 20, "targets": 80, "auc": 0.8}
    fast, slow = found["fast"], found["slow"]
    assert fast["auc_at_equal_seconds"] == 0.9
    assert slow["auc_at_equal_seconds"] == pytest.approx(0.5 + 0.25 * 4 / 24)
    assert fast["auc_at_equal_targets"] == pytest.approx(0.66)
    assert slow["auc_at_equal_targets"] == 0.75
    assert fast["seconds_to_auc"] == pytest.approx(15)
    assert slow["seconds_to_auc"] is None


def test_time_to_an_auc_is_that_of_the_first_crossing():
    assert compare.seconds_to(FAST, 0.7) == 10
    assert compare.seconds_to(SLOW, 0.6) == 0
    assert compare.seconds_to(SLOW, 0.7) == pytest.approx(16 + 24 * 0.8)
    fallen = [*FAST, {"seconds": 30, "targets": 300, "auc": 0.6}, {"seconds": 40, "targets": 400, "auc": 0.95}]
    assert compare.seconds_to(fallen, 0.8) == pytest.approx(15)


def test_a_curve_tells_nothing_outside_its_points():
    assert compare.auc_at(FAST[1:], "seconds", 5) is None
    assert compare.auc_at(FAST, "seconds", 21) is None
    assert compare.auc_at(FAST, "seconds", 20) == 0.9


# -- side by side ----------------------------------------------------------------------------------------------------


@pytest.fixture
def arguments(log_directory, tiny_base, tmp_path):
    """Of a short comparison on a tiny base and log."""
    return [
        *("--data", str(log_directory), "--domain", str(DOMAIN), "--base", str(tiny_base("llama"))),
        *("--seconds", "1000"),
        *("--steps", "2", "--validation", "14", "--pool", "40", "--context", "3", "--targets", "4"),
        *("--peer-batch", "4", "--learning-rate", "0.01", "--output", str(tmp_path / "out" / "peers.json")),
    ]


def test_all_systems_predict_the_same_validation_targets(arguments, tmp_path, capsys):
    result = compare.main(arguments)
    assert result["systems"].keys() == set(SYSTEMS) and result["validation"]["targets"] == 14
    for entry in result["systems"].values():
        # Before the first step, once a target is trained on, and at the end.
        assert [point["steps"] for point in entry["curve"]][-1] == 2 and entry["curve"][0]["steps"] == 0
        assert entry["peak_rss_mib"] is None or entry["peak_rss_mib"] > 100
        assert entry["targets_per_s"] == entry["targets"] / entry["seconds"]
        assert all(0 <= point["auc"] <= 1 for point in entry["curve"])
    systems = result["systems"]
    assert systems["plain"]["targets"] == systems["instruction"]["targets"] == result["compared_at"]["targets"] == 8
    # Streams train on the windows' targets with fewer tokens than prompts need, the instruction peer with one more.
    assert systems["streams"]["tokens_per_target"] < systems["plain"]["tokens_per_target"]
    assert systems["instruction"]["tokens_per_target"] == systems["plain"]["tokens_per_target"] + 1
    # Streams start from the words' rows, and so from the predictions of the untrained language model.
    assert systems["streams"]["curve"][0]["logloss"] == pytest.approx(systems["instruction"]["curve"][0]["logloss"])
    ends = [systems[name]["curve"][-1]["auc"] for name in ("streams", "plain")]
    gap = systems["plain"]["streams_minus_this_at_the_end"]["auc"]["value"]
    assert gap == pytest.approx(ends[0] - ends[1])
    text = (tmp_path / "out" / "peers.json").read_text()
    assert {"command", "date", "seed", "machine", "versions", "settings"} <= json.loads(text).keys()
    assert str(tmp_path) not in text
    assert (tmp_path / "out" / "peers.png").stat().st_size > 10_000
    assert "not reached" in capsys.readouterr().out


def test_validation_targets_come_from_as_many_users_as_there_are(small_log, tiny_tokenizer):
    streams = build_split_streams(small_log(), Domain.from_yaml(DOMAIN), tiny_tokenizer).valid
    users = streams.log.user_codes[streams.target_rows]
    count = len(np.unique(users))
    for seed in (0, 1):
        assert len(np.unique(users[draw_spread_over_users(streams, count, seed)])) == count
    assert sorted(draw_spread_over_users(streams, 10_000, 0)) == list(range(streams.num_targets))


def test_batches_of_the_peers_hold_prompts_of_like_length():
    lengths = np.random.default_rng(0).integers(10, 500, 400)
    order = compare.batch_order(lengths, 8, seed=0)
    assert sorted(order) == list(range(400))
    batches = lengths[order].reshape(-1, 8)
    assert np.mean(batches.max(1) / batches.mean(1)) < 1.1
    assert (np.diff(batches.mean(1)) > 0).any() and (np.diff(batches.mean(1)) < 0).any()


# -- ms-swift --------------------------------------------------------------------------------------------------------


def test_swift_gets_one_user_message_and_a_label_a_line(tmp_path):
    swift.write_rows(tmp_path / "rows.jsonl", ["a\u2028\nb ->", "é ->"], [1, 0])
    lines = (tmp_path / "rows.jsonl").read_text().split("\n")
    assert [json.loads(line) for line in lines[:2]] == [
        {"messages": [{"role": "user", "content": "a\u2028\nb ->"}], "label": 1},
        {"messages": [{"role": "user", "content": "é ->"}], "label": 0},
    ]
    assert lines[2:] == [""]


def test_swift_is_run_with_the_settings_of_the_others():
    words = swift.sft_arguments(
        "BASE", "F.jsonl", "OUT", labels=2, batch_size=4, accumulation=2, save_steps=5, learning_rate=5e-4, r=16,
        alpha=32, seed=3, max_length=700,
    )  # fmt: skip
    assert words[0] == "sft" and len(words) % 2 == 1
    options = dict(zip(words[1::2], words[2::2], strict=True))
    wanted = {
        "--model": "BASE", "--model_type": "llama", "--template": "dummy", "--task_type": "seq_cls",
        "--num_labels": "2", "--tuner_type": "lora", "--dataset": "F.jsonl", "--torch_dtype": "float32",
        "--use_cpu": "true", "--split_dataset_ratio": "0", "--lora_rank": "16", "--lora_alpha": "32",
        "--lora_dropout": "0", "--target_modules": "all-linear", "--per_device_train_batch_size": "4",
        "--gradient_accumulation_steps": "2", "--learning_rate": "0.0005", "--lr_scheduler_type": "constant",
        "--num_train_epochs": "1", "--dataset_shuffle": "false", "--gradient_checkpointing": "false",
        "--save_steps": "5", "--seed": "3", "--max_length": "700",
    }  # fmt: skip
    assert wanted.items() <= options.items()


def test_swift_is_timed_by_its_own_log(tmp_path):
    rows = [
        {"loss": 0.7, "global_step/max_steps": "1/2", "train_speed(s/it)": 6.0},
        {"loss": 0.6, "global_step/max_steps": "2/2", "train_speed(s/it)": 5.5},
        {"train_runtime": 12.0, "global_step/max_steps": "2/2", "train_speed(s/it)": 6.2},
        {"model_parameter_info": "PeftModel"},
    ]
    (tmp_path / "logging.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert swift.read_seconds(tmp_path / "logging.jsonl") == {1: 6.0, 2: 11.0}


def test_swift_says_what_it_said_when_it_fails(tmp_path):
    program = tmp_path / "bin" / "swift"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\necho no such model: $2; exit 3\n")
    program.chmod(0o755)
    (tmp_path / "bin" / "python").symlink_to(Path(swift.sys.executable).resolve())
    assert swift.ensure_environment(tmp_path) == program.parent.resolve()
    with pytest.raises(RuntimeError, match=r"exit code 3:\nno such model: BASE"):
        swift.run_swift(program.parent, ["sft", "BASE"], tmp_path)


def test_swift_predicts_by_the_adapter_that_it_saved(tiny_base, tmp_path):
    base = str(tiny_base("llama"))
    model, tokenizer = plain.load_plain(base, 2, r=4, alpha=8)
    with torch.no_grad():
        for value in model.parameters():
            if value.requires_grad:
                value.add_(0.1 * torch.randn(value.shape, generator=torch.Generator().manual_seed(0)))
    prompts = plain.PromptDataset(TEXTS, [0, 1], tokenizer)
    wanted = plain.plain_logits(model, tokenizer, prompts).softmax(1).numpy()
    model.save_pretrained(tmp_path)
    found = swift.adapter_probabilities(base, tmp_path, prompts, tokenizer, 2, batch_size=1)
    assert found == pytest.approx(wanted, abs=1e-6)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "task_type": "CAUSAL_LM"}))
    with pytest.raises(ValueError, match="no LoRA of SEQ_CLS but LORA of CAUSAL_LM"):
        swift.adapter_probabilities(base, tmp_path, prompts, tokenizer, 2, batch_size=1)
