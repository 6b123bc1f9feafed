"""Parts of a run by themselves: what the fingerprint of its streams sees, its ranking metrics, and its clock."""

from __future__ import annotations

import itertools
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.numpy
from safetensors.numpy import load_file

from llmrec_peft.data.domain import Domain
from llmrec_peft.evaluation.stream_metrics import choose_metrics
from llmrec_peft.runs.split_streams import build_split_streams
from llmrec_peft.training import trainer as trainer_module
from tests.invariants.setup_run import DOMAIN, make_trainer


@pytest.fixture
def streams(small_log, tiny_tokenizer):
    """`streams()`: streams of the small log's splits."""
    return lambda: build_split_streams(small_log(), Domain.from_dict(DOMAIN), tiny_tokenizer)


def changed_token(table) -> None:
    tokens = np.array(table.tokens)
    tokens[-2] += 1
    table.tokens = tokens


def test_the_fingerprint_sees_every_token_of_what_training_sees(streams, tiny_base):
    base = str(tiny_base())
    first, other = streams(), streams()
    seen = [first.fingerprint(base, valid=valid) for valid in (False, True)]
    assert seen == [other.fingerprint(base, valid=valid) for valid in (False, True)] and seen[0] != seen[1]
    changed_token(other.valid._tokens.table)
    assert other.fingerprint(base, valid=False) == seen[0] and other.fingerprint(base, valid=True) != seen[1]
    changed_token(other.train._tokens.table)
    assert other.fingerprint(base, valid=False) != seen[0]
    third = streams()
    third.train.target_labels[-1] = 1 - third.train.target_labels[-1]
    assert third.fingerprint(base, valid=False) != seen[0]


def test_the_fingerprint_sees_the_base(streams, tiny_base, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(tiny_base(), base)
    parts = streams()
    before = parts.fingerprint(str(base), valid=False)
    assert before == parts.fingerprint(str(tiny_base()), valid=False)
    weights = load_file(base / "model.safetensors")
    name = next(name for name in weights if "q_proj" in name)
    weights[name] = weights[name] + 1
    safetensors.numpy.save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    assert parts.fingerprint(str(base), valid=False) != before


@pytest.mark.parametrize(
    ("sizes", "ranking"),
    [
        ([1, 1, 1], []),
        ([1, 2, 2], ["hr@1"]),
        ([5, 5, 5, 1], ["ndcg@3", "hr@3", "mrr@3"]),
        ([6, 9], ["ndcg@5", "hr@5", "mrr@5"]),
        ([30, 40, 2], ["ndcg@10", "hr@10", "mrr@10"]),
    ],
)
def test_ranking_cutoffs_are_below_the_set_sizes(sizes, ranking):
    streams = SimpleNamespace(target_sets=np.repeat(np.arange(len(sizes)), sizes))
    assert [name for name in choose_metrics(streams, None) if "@" in name] == ranking
    assert choose_metrics(streams, ["auc"]) == ["auc", "targets"]


def test_the_clock_runs_in_training_steps_alone(tiny_base, tiny_tokenizer, streams, tmp_path, monkeypatch):
    """A clock that ticks once a look: each step is begun and ended once, and validations and checkpoints look not."""
    monkeypatch.setattr(trainer_module, "time", SimpleNamespace(perf_counter=map(float, itertools.count()).__next__))
    trainer = make_trainer(
        tiny_base(), tiny_tokenizer, tmp_path, max_steps=4, eval_strategy="steps", eval_steps=1, save_strategy="steps",
        save_steps=2, valid_streams=streams().valid, compute_metrics=lambda predictions: {"auc": 0.5},
    )  # fmt: skip
    trainer.train()
    assert trainer.step_seconds == 4.0
