"""One global batch gives one gradient, however it is cut into micro-batches, accumulation steps and ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from llmrec_peft.data.domain import Domain
from llmrec_peft.data.streams import build_streams
from tests.invariants.setup_run import DOMAIN, LEARNING_RATE, LOSSES, gap, losses_of, make_trainer, splits, trained
from tests.reference import NaiveStreams, sampled_items

ROOT = Path(__file__).parents[2]
MAX_GAP, MEAN_GAP = 5e-6, 1e-7
CUTS = {
    "micro-batches of one stream": {"micro_tokens": 1},
    "one micro-batch": {"micro_tokens": 10**6},
    "two accumulation steps": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4},
    "four accumulation steps, small": {
        "gradient_accumulation_steps": 4,
        "per_device_train_batch_size": 2,
        "micro_tokens": 150,
    },
}


@pytest.fixture
def run(tiny_base, tiny_tokenizer, tmp_path):
    """`run(**settings)`: a trainer after its training."""

    def factory(**settings):
        trainer = make_trainer(tiny_base(), tiny_tokenizer, tmp_path, **settings)
        trainer.train()
        return trainer

    return factory


@pytest.mark.parametrize("loss", LOSSES)
def test_trajectory_does_not_depend_on_the_cut(loss, run, tiny_base, tiny_tokenizer, tmp_path):
    start = trained(make_trainer(tiny_base(), tiny_tokenizer, tmp_path))
    plain = run(loss=loss)
    assert gap(trained(plain), start)[0] > 0.01
    for name, cut in CUTS.items():
        other = run(loss=loss, **cut)
        largest, mean = gap(trained(plain), trained(other))
        assert largest < MAX_GAP and abs(mean) < MEAN_GAP, (name, largest, mean)
        assert np.allclose(losses_of(plain), losses_of(other), atol=1e-4), name


def naive_loss(name, logits, labels, lists):
    """Mean of the loss over a global batch, one answer after another."""
    log_p = torch.log_softmax(logits, -1)
    own = log_p[range(len(labels)), labels]
    weight = torch.tensor(LOSSES[name].get("class_weights", [1.0, 1.0]))[labels]
    if name == "cross_entropy":
        return -own.mean()
    if name == "weighted":
        weights = torch.tensor(LOSSES[name]["class_weights"])
        return -(0.9 * weight * own + 0.1 / 2 * (weights * log_p).sum(-1)).mean()
    if name == "focal":
        return -(weight * (1 - own.exp()) ** 2 * own).mean()
    scores, terms = logits[:, 1] - logits[:, 0], []
    for number in sorted(set(lists)):
        members = [n for n, value in enumerate(lists) if value == number]
        liked = [n for n in members if labels[n] == 1]
        if 0 < len(liked) < len(members):
            terms.append(torch.stack([torch.logsumexp(scores[members], 0) - scores[n] for n in liked]).mean())
    return torch.stack(terms).mean()


@pytest.mark.parametrize("loss", LOSSES)
def test_first_step_is_the_gradient_of_the_plain_prompts(loss, tiny_base, tiny_tokenizer, tmp_path):
    """SGD moves weights by -lr times the gradient of the mean over all answers, each a prompt of its own."""
    domain, split = Domain.from_dict(DOMAIN), splits().train
    streams = build_streams(split, domain, tiny_tokenizer)
    settings = {"streams": streams, "loss": loss, "max_steps": 1, "per_device_train_batch_size": len(streams)}
    trainer = make_trainer(tiny_base(), tiny_tokenizer, tmp_path, **settings)
    start, model = trained(trainer), trainer.model.eval()
    windows = NaiveStreams(split, domain, tiny_tokenizer, sampled_items(streams)).windows
    answers = [(answer, n) for n, window in enumerate(windows) for answer in window.answers]
    logits = torch.cat([model.stock(input_ids=torch.tensor([answer.prompt])).logits for answer, _ in answers])
    value = naive_loss(loss, logits, [answer.label for answer, _ in answers], [(n, a.moment) for a, n in answers])
    named = {name: weight for name, weight in model.model.named_parameters() if weight.requires_grad}
    gradients = dict(zip(named, torch.autograd.grad(value, list(named.values())), strict=True))
    expected = {name: start[name] - LEARNING_RATE * gradients[name].numpy() for name in named}
    trainer.train()
    largest, mean = gap(trained(trainer), expected)
    assert gap(start, expected)[0] > 1e-3 and largest < MAX_GAP and abs(mean) < MEAN_GAP
    assert losses_of(trainer)[0] == pytest.approx(value.item(), abs=1e-4)


def test_two_ranks_follow_one(run, tiny_base, tiny_tokenizer, tmp_path):
    """Two ranks give one rank's trajectory, with a last batch of one stream that leaves a rank without any."""
    cases = {
        "plain": ({}, {"per_device_train_batch_size": 4}),
        "listwise": ({"loss": "listwise", "micro_tokens": 200}, {"per_device_train_batch_size": 4}),
        "accumulated": (
            {"loss": "weighted"},
            {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "micro_tokens": 1},
        ),
        "last batch of one": (
            {"windows": 7, "per_device_train_batch_size": 6, "num_train_epochs": 1, "max_steps": -1},
            {"per_device_train_batch_size": 3},
        ),
    }
    launched = [[name, {**one, **two}] for name, (one, two) in cases.items()]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    script = [str(Path(__file__).with_name("run_ranks.py")), str(tiny_base()), str(tmp_path), json.dumps(launched)]
    done = subprocess.run(command + script, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    valid = build_streams(splits().valid, Domain.from_dict(DOMAIN), tiny_tokenizer)
    for name, (one, _) in cases.items():
        alone = run(**one)
        assert len(losses_of(alone)) == (2 if "windows" in one else 4)
        answers = alone.predict_streams(valid)
        for rank in (0, 1):
            ranks = np.load(tmp_path / f"{name}.{rank}.npz")
            assert ranks["world"] == 2
            weights = {key.removeprefix("weight "): ranks[key] for key in ranks.files if key.startswith("weight ")}
            largest, mean = gap(trained(alone), weights)
            assert largest < MAX_GAP and abs(mean) < MEAN_GAP, (name, rank, largest, mean)
            assert ranks["targets"].tolist() == answers.targets.tolist()
            assert np.abs(ranks["logits"] - answers.logits).max() < 1e-4
        assert np.allclose(losses_of(alone), np.load(tmp_path / f"{name}.0.npz")["losses"], atol=1e-4), name
