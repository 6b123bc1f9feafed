"""Attention of candidates in blocks equals attention under the one mask, forward and backward, and computes less."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from llmrec_peft.models import attention
from llmrec_peft.models.attention import Layout, block_attention
from llmrec_peft.models.segment_mask import segment_mask
from tests.models.test_classifier import stream_with_candidates

SIZES = [
    ([3], [[1, 4]]),  # candidates of one point
    ([0], [[2, 3, 1]]),  # no prefix at all
    ([2, 5, 0, 70], [[1], [90, 3], [60, 60, 60], []]),  # points before, inside and after; blocks are cut
    ([1] * 150, [[1]] * 150),  # a candidate at every point
    ([300], [[]]),  # no candidate
    ([20, 3], [[400], [5, 140, 2]]),  # candidates longer than a block
]


def laid(prefixes: list[int], candidates: list[list[int]], pads: int) -> list[int]:
    """Branch numbers: so many prefix tokens and then those candidates, again and again."""
    segment, number = [], 0
    for prefix, sizes in zip(prefixes, candidates, strict=True):
        segment += [0] * prefix
        for size in sizes:
            number += 1
            segment += [number] * size
    return segment + [-1] * pads


def one_mask(segment: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """allow(q, k) [L, P + L]; tokens that are left out see themselves."""
    order = torch.arange(len(segment))
    before, real = order[None, :] <= order[:, None], segment >= 0
    allow = before & real[None, :] & real[:, None] & ((segment == 0)[None, :] | (segment[None, :] == segment[:, None]))
    return torch.cat([seen[None, :] & real[:, None], allow | (order[None, :] == order[:, None])], dim=1)


@pytest.mark.parametrize("pads", [0, 3])
@pytest.mark.parametrize("past", [0, 9])
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("share", [1, 2])
def test_blocks_equal_one_mask(share, sizes, past, pads):
    torch.manual_seed(0)
    segment = torch.tensor(laid(*sizes, pads))
    seen = torch.arange(past) < past - 2
    query = torch.randn(1, 4, len(segment), 8, requires_grad=True)
    key, value = (torch.randn(1, 4 // share, past + len(segment), 8, requires_grad=True) for _ in range(2))
    layout = Layout(segment.numpy(), seen.numpy() if past else None)
    found = block_attention(query, key, value, [layout], 0.3)[0].transpose(0, 1)
    repeated = (tensor.repeat_interleave(share, 1) for tensor in (key, value))
    expected = F.scaled_dot_product_attention(query, *repeated, one_mask(segment, seen), scale=0.3)[0]
    real = segment >= 0
    assert (found[:, ~real] == 0).all()
    torch.testing.assert_close(found[:, real], expected[:, real], atol=2e-6, rtol=1e-5)
    grad = torch.randn_like(expected) * real[:, None]
    for mine, theirs in zip(
        torch.autograd.grad(found, (query, key, value), grad),
        torch.autograd.grad(expected, (query, key, value), grad),
        strict=True,
    ):
        assert theirs.abs().max() > 0.1
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


def test_one_long_candidate_is_cut_as_a_prefix_is():
    blocks = Layout(np.array(laid([100], [[600]], 0))).blocks
    computed = sum((last - first) * (prefix + last - start) for first, last, prefix, start, _ in blocks)
    assert max(last - first for first, last, *_ in blocks) == attention.STEP
    assert computed < 0.7 * 700**2


@pytest.mark.parametrize("rows", [[[-1] * 4 + [0] * 5 + [1] * 3], [[0, 0, -1, 0, 1, -1, 1, 2, -1]], [[-1] * 6]])
def test_tokens_anywhere_can_be_left_out(rows):
    """Left padding, holes, and a row of pads alone."""
    segment, seen = torch.tensor(rows[0]), torch.tensor([True, False, True])
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 2, size, 8) for size in (len(segment), *[3 + len(segment)] * 2))
    found = block_attention(query, key, value, [Layout(segment.numpy(), seen.numpy())], 1.0)[0].transpose(0, 1)
    expected = F.scaled_dot_product_attention(query, key, value, one_mask(segment, seen), scale=1.0)[0]
    real = segment >= 0
    assert (found[:, ~real] == 0).all()
    torch.testing.assert_close(found[:, real], expected[:, real], atol=2e-6, rtol=1e-5)


def test_rows_have_layouts_of_their_own():
    torch.manual_seed(0)
    rows = [laid([4, 2], [[3, 2], [1]], 0), laid([7], [[2]], 3)]
    query, key, value = torch.randn(3, 2, 2, 12, 8)
    together = block_attention(query, key, value, [Layout(np.array(row)) for row in rows], 1.0)
    for number, row in enumerate(rows):
        one = slice(number, number + 1)
        alone = block_attention(query[one], key[one], value[one], [Layout(np.array(row))], 1.0)
        assert torch.equal(together[one], alone)
    assert not torch.allclose(together[0], together[1], atol=0.1)


def test_blocks_leave_out_what_the_mask_forbids():
    """40 candidates of 15 tokens at two points of a prefix of 400: little more than what is allowed is computed."""
    segment = np.array(laid([200, 200], [[15] * 20, [15] * 20], 0))
    blocks = Layout(segment).blocks
    computed = sum((last - first) * (prefix + last - start) for first, last, prefix, start, _ in blocks)
    allowed = int(one_mask(torch.from_numpy(segment), torch.ones(0, dtype=torch.bool)).sum())
    assert sorted(range(len(segment))) == [token for first, last, *_ in blocks for token in range(first, last)]
    assert computed < 1.5 * allowed < 0.5 * len(segment) ** 2


@pytest.fixture
def blocks_taken(monkeypatch) -> list[int]:
    """Grows by one at each call of the attention in blocks."""
    calls: list[int] = []
    original = attention.block_attention
    monkeypatch.setattr(attention, "block_attention", lambda *args: calls.append(1) or original(*args))
    monkeypatch.setattr(attention, "SHORT", 2)
    return calls


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "mistral"])
def test_training_takes_this_way(kind, checkpointing, make, shake, blocks_taken):
    """Loss and gradient are those of sdpa, under checkpointing too, which runs layers again."""
    classifier = shake(make(kind, activation_checkpointing=checkpointing)).train()
    batch = stream_with_candidates(torch.Generator().manual_seed(3), classifier.config.vocab_size)
    labels = torch.arange(8) % 2
    found = {}
    for name in (attention.NAME, "sdpa"):
        classifier.stock.set_attn_implementation(name)
        loss = F.cross_entropy(classifier(**batch), labels)
        loss.backward()
        grad = torch.cat([p.grad.flatten() for p in classifier.parameters() if p.requires_grad])
        found[name] = loss.detach(), grad
        classifier.zero_grad()
        layers = classifier.config.num_hidden_layers
        assert len(blocks_taken) == layers * (2 if checkpointing else 1)
    (loss, grad), (expected_loss, expected) = found[attention.NAME], found["sdpa"]
    torch.testing.assert_close(loss, expected_loss, atol=1e-5, rtol=1e-5)
    assert (grad - expected).norm() < 1e-4 * expected.norm()


@pytest.mark.parametrize("setting", ["bfloat16", "autocast", "dropout", "softcap", "short rows", "traced"])
def test_where_blocks_do_not_serve_it_is_sdpa(setting, make, shake, blocks_taken, monkeypatch):
    """The same classifier takes blocks until something asks for more than they give."""
    classifier = shake(make("llama"))
    batch = stream_with_candidates(torch.Generator().manual_seed(3), classifier.config.vocab_size)
    with torch.no_grad():
        classifier(**batch)
        assert len(blocks_taken) == classifier.config.num_hidden_layers
        blocks_taken.clear()
        if setting == "bfloat16":
            classifier.stock.model.to(torch.bfloat16)
        elif setting == "short rows":
            monkeypatch.setattr(attention, "SHORT", batch["segment"].shape[1] + 1)
        elif setting == "traced":
            batch["segment"] = batch["segment"].as_subclass(type("Traced", (torch.Tensor,), {}))
        if setting in ("dropout", "softcap"):
            asked = {"dropout": 0.5} if setting == "dropout" else {"softcap": 2.0}
            query = torch.randn(1, 2, 20, 8)
            mask = segment_mask(classifier.stock, batch["segment"][:1], None)
            attention.lay_out(mask, batch["segment"][:1], None, None)
            assert attention._layouts(query, query, query, mask, {}) is mask.layouts
            assert attention._layouts(query, query, query, mask, asked) is None
            return
        with torch.autocast("cpu", torch.bfloat16, enabled=setting == "autocast"):
            logits = classifier(**batch)
    assert logits.isfinite().all() and not blocks_taken


def test_the_engine_takes_this_way(make, blocks_taken, monkeypatch):
    """A row of candidates goes through in blocks, and is answered as under the mask."""
    from llmrec_peft.requests.batching import CandidateGroup
    from llmrec_peft.scoring.engine import Engine
    from llmrec_peft.scoring.loaded_adapter import LoadedAdapter

    classifier = make("llama", "head")
    engine = Engine(classifier, 0)
    blocks_taken.clear()  # the engine has measured its base
    head = torch.randn(2, classifier.config.hidden_size)
    adapter = LoadedAdapter.__new__(LoadedAdapter)
    for name, value in {"layers": {}, "head": head, "directory": "x"}.items():
        object.__setattr__(adapter, name, value)
    monkeypatch.setattr(LoadedAdapter, "labels", ["a", "b"])
    prefix = tuple(torch.randint(5, 50, (n,)).numpy() for n in (3, 4, 5))
    candidates = [torch.randint(5, 50, (n,)).numpy() for n in (3, 1, 6)]
    answers = []
    for name in (attention.NAME, "sdpa"):
        classifier.stock.set_attn_implementation(name)
        group = CandidateGroup(adapter, prefix, candidates)
        engine.predict([group], 1000)
        answers.append(torch.from_numpy(group.logits.copy()))
        assert len(blocks_taken) == classifier.config.num_hidden_layers
    torch.testing.assert_close(answers[0], answers[1], atol=1e-5, rtol=1e-5)
    assert answers[0].std() > 0.01
