"""An answer in a stream is that to its own prompt, read by hand from the log and run through the stock classifier."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch

from llmrec_peft.checkpoints.loading import load_classifier
from llmrec_peft.data.collator import StreamCollator, collate
from llmrec_peft.data.domain import Domain
from llmrec_peft.data.streams import build_streams
from llmrec_peft.models import attention
from llmrec_peft.models.predict import predict
from tests.reference import NaiveStreams, sampled_items
from tests.support.pairwise import pairwise

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS = ("llama", "qwen2", "mistral", "gpt2")
METHODS = ("lora", "adapter", "head", "full")
# `short` is the length at which attention in blocks begins: 2 gives blocks, 1000 one mask.
MODELS = pairwise(KINDS, METHODS, ("sdpa", "eager"), (2, 1000))
SHAPES = {
    "prefix": {"simultaneous": "order"},
    "candidates": {"simultaneous": "isolate", "negatives": {"per_positive": 1}},
}
TOLERANCE = 1e-4


def domain_of(shape: str) -> Domain:
    return Domain.from_dict(
        {
            "name": "movies",
            "header": "Movies one viewer rated:\n",
            "event": "{title} ({genres})",
            "outcomes": {"dislike": " no\n", "like": " yes\n"},
            "label": {"column": "rating", "above": 3},
            "stream": {"context": 2, "targets": 4, "max_length": 500},
            **SHAPES[shape],
        }
    )


@pytest.fixture
def make(tiny_base):
    """`make(kind, method, **options)`: a classifier whose trained weights are moved away from their start."""

    def factory(kind="llama", method="lora", **options):
        torch.manual_seed(0)
        classifier = load_classifier(str(tiny_base(kind)), domain_of("prefix"), method, **options)
        with torch.no_grad():
            for value in classifier.parameters():
                if value.requires_grad:
                    value.add_(0.1 * torch.randn(value.shape))
        return classifier.eval()

    return factory


@pytest.fixture
def case(small_log, tiny_tokenizer):
    """`case(shape)`: five streams of the training split, and the hand-written prompts of their answers."""

    @cache
    def factory(shape):
        domain, split = domain_of(shape), small_log(users=4, events=8).split().train
        streams = build_streams(split, domain, tiny_tokenizer)
        windows = NaiveStreams(split, domain, tiny_tokenizer, sampled_items(streams)).windows[:5]
        assert len(windows) == 5 and len({window.length for window in windows}) > 2
        return [streams[number] for number in range(5)], [[a.prompt for a in window.answers] for window in windows]

    return factory


@torch.no_grad()
def one_by_one(classifier, prompts):
    """Logits of prompts, each run alone and without a mask through Transformers' own classification forward."""
    return torch.cat([classifier.stock(input_ids=torch.tensor([prompt])).logits for prompt in prompts])


@torch.no_grad()
def in_batches(classifier, streams, size, side, pad):
    batches = [collate(streams[n : n + size], pad, padding_side=side) for n in range(0, len(streams), size)]
    return torch.cat([classifier(**batch) for batch in batches])


@pytest.mark.parametrize(("kind", "method", "attn", "short"), MODELS)
def test_stream_equals_prompt(kind, method, attn, short, make, case, tiny_tokenizer, monkeypatch):
    """With attention in blocks and under one mask."""
    monkeypatch.setattr(attention, "SHORT", short)
    classifier = make(kind, method, attn=attn)
    for shape in SHAPES:
        streams, prompts = case(shape)
        expected = one_by_one(classifier, [prompt for window in prompts for prompt in window])
        assert expected.std(0).min() > 0.01
        for side in ("right", "left"):
            for size in (1, 3, len(streams)):
                found = in_batches(classifier, streams, size, side, tiny_tokenizer.pad_token_id)
                assert (found - expected).abs().max() < TOLERANCE, (shape, side, size)


@pytest.mark.parametrize("kind", KINDS)
def test_a_changed_history_changes_the_prediction(kind, make, case):
    """Were the answers blind to history, the test above would show nothing."""
    classifier = make(kind)
    for shape in SHAPES:
        _, prompts = case(shape)
        chosen = [prompt for window in prompts for prompt in window if len(prompt) > 80]
        changed = [prompt[:20] + prompt[50:] for prompt in chosen]
        gap = (one_by_one(classifier, chosen) - one_by_one(classifier, changed)).abs().amax(1)
        assert len(chosen) > 5 and gap.median() > 10 * TOLERANCE


def test_a_candidate_that_others_could_see_would_show(make, case, tiny_tokenizer):
    """Without the mask of segments the answers differ by far more than the tolerance."""
    classifier = make()
    streams, prompts = case("candidates")
    batch = collate(streams, tiny_tokenizer.pad_token_id)
    expected = one_by_one(classifier, [prompt for window in prompts for prompt in window])
    open_to_all = batch["segment"].clamp(max=0)
    with torch.no_grad():
        found = classifier(**{**batch, "segment": open_to_all})
    assert (found - expected).abs().max() > 100 * TOLERANCE


@pytest.mark.parametrize("shape", SHAPES)
def test_predict_covers_every_target_whatever_the_batch(shape, make, small_log, tiny_tokenizer):
    classifier, domain = make(), domain_of(shape)
    streams = build_streams(small_log(users=6, events=8).split().train, domain, tiny_tokenizer)
    classifier.train()
    answers = [
        predict(classifier, streams, StreamCollator(tiny_tokenizer.pad_token_id, 0), batch_tokens=tokens)
        for tokens in (1, 700, 10**6)
    ]
    assert classifier.training
    for answer in answers:
        assert answer.targets.tolist() == list(range(streams.num_targets))
        assert answer.labels.tolist() == streams.target_labels.tolist()
        assert np.abs(answer.logits - answers[0].logits).max() < TOLERANCE
