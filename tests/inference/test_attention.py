"""Attention of probes in two parts equals attention under the one mask."""

import pytest
import torch
import torch.nn.functional as F

from llmrec_peft import load_classifier
from llmrec_peft.inference import attention
from llmrec_peft.inference.attention import ProbeLayout, two_part
from llmrec_peft.inference.engine import Engine


def masked(query, key, value, past, trunk, sizes, scale):
    """The same by one dense mask of allow(q, k)."""
    new = trunk + sum(sizes)
    branch = torch.cat([torch.zeros(past + trunk), *(torch.full((size,), 1.0 + n) for n, size in enumerate(sizes))])
    order = torch.arange(past + new)
    allow = (order[None, :] <= order[past:, None]) & ((branch == 0) | (branch[None, :] == branch[past:, None]))
    share = query.shape[0] // key.shape[0]
    return F.scaled_dot_product_attention(
        query[None], key.repeat_interleave(share, 0)[None], value.repeat_interleave(share, 0)[None], allow, scale=scale
    )[0]


@pytest.mark.parametrize(("past", "trunk"), [(0, 1), (0, 5), (7, 0), (7, 1), (7, 5)])
@pytest.mark.parametrize("sizes", [[3, 3], [1, 4, 2], [6, 1, 1, 1]])
@pytest.mark.parametrize("groups", [1, 2])
def test_two_parts_equal_one_mask(past, trunk, sizes, groups):
    torch.manual_seed(0)
    new = trunk + sum(sizes)
    query = torch.randn(4, new, 8)
    key, value = torch.randn(2, 4 // groups, past + new, 8)
    found = two_part(query, key, value, ProbeLayout(trunk, sizes, query.device), 0.3)
    torch.testing.assert_close(found, masked(query, key, value, past, trunk, sizes, 0.3), atol=1e-6, rtol=1e-5)


def test_the_engine_takes_this_way(tiny_base, domains, monkeypatch):
    """A row of probes does not fall back to the mask, and answers as with it."""
    from llmrec_peft.inference.engine import Task
    from llmrec_peft.inference.member import Member

    classifier = load_classifier(tiny_base("llama"), domains["movies"], "head")
    calls = []
    original = attention.two_part
    monkeypatch.setattr(attention, "two_part", lambda *args: calls.append(1) or original(*args))
    engine = Engine(classifier, 0)
    head = torch.randn(2, classifier.config.hidden_size)
    member = Member.__new__(Member)
    for name, value in {"deltas": {}, "head": head, "directory": "x"}.items():
        object.__setattr__(member, name, value)
    monkeypatch.setattr(Member, "labels", ["a", "b"])
    trunk = tuple(torch.randint(5, 50, (n,)).numpy() for n in (3, 4, 5))
    probes = [torch.randint(5, 50, (n,)).numpy() for n in (3, 1, 6)]
    answers = []
    for two in (True, False):
        engine._two_parts = two
        task = Task(member, trunk, probes)
        engine.answer([task], 1000)
        answers.append(torch.from_numpy(task.answers.copy()))
        assert len(calls) == classifier.config.num_hidden_layers
    torch.testing.assert_close(answers[0], answers[1], atol=1e-5, rtol=1e-5)
    assert answers[0].std() > 0.01
