"""One encoder for all scorers: the item source and the tokenizer behind it may change, the tokens may not."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from llmrec_peft import Domain
from llmrec_peft.data.vocabulary import Vocabulary
from llmrec_peft.errors import DataError, StreamError
from llmrec_peft.requests.batching import RequestBatch
from llmrec_peft.requests.event_cache import EventCache
from llmrec_peft.requests.item_source import NoTable
from llmrec_peft.requests.item_table import ItemTable
from llmrec_peft.requests.plain_items import PlainItems
from llmrec_peft.requests.request import Request, bank_requests, scorer_requests
from llmrec_peft.requests.request_domain import RequestDomain
from llmrec_peft.requests.request_encoder import RequestEncoder
from tests.conftest import ROOT
from tests.support.requests import HISTORY, MOVIES

EVENTS = [*MOVIES, {"item_id": "i4", "genres": "Opera"}, {"title": "Кино 🎬", "genres": None}, {"item_id": "i2"}]


@pytest.fixture
def encoder_of(domains, tiny_tokenizer):
    domain = Domain.from_dict(domains["movies"].to_dict())
    vocabulary = Vocabulary(domain, tiny_tokenizer)
    return lambda items, **options: RequestEncoder(RequestDomain.of(domain), vocabulary, items, **options)


def test_arrow_and_plain_items_give_the_same_tokens(encoder_of, items):
    arrow, plain = encoder_of(ItemTable.read(items)), encoder_of(PlainItems.read(items.to_pylist()))
    request = Request(HISTORY, EVENTS)
    for _ in range(2):  # the second time from the cache
        one, two = arrow.encode(request), plain.encode(request)
        for left, right in zip((*one.prefix.pieces(), *one.candidates), (*two.prefix.pieces(), *two.candidates),
                               strict=True):  # fmt: skip
            assert left.tolist() == right.tolist()
        assert one.dropped.tolist() == two.dropped.tolist()


@pytest.mark.parametrize("cache_events", [0, 1, 3, 1000])
def test_the_size_of_the_cache_changes_nothing(cache_events, encoder_of, items):
    request = Request(HISTORY, EVENTS)
    want = encoder_of(ItemTable.read(items)).encode(request)
    encoder = encoder_of(ItemTable.read(items), cache_events=cache_events)
    for _ in range(2):
        found = encoder.encode(request)
        assert [tokens.tolist() for tokens in found.candidates] == [tokens.tolist() for tokens in want.candidates]
        assert [tokens.tolist() for tokens in found.prefix.pieces()] == [
            tokens.tolist() for tokens in want.prefix.pieces()
        ]


def test_the_cache_drops_what_was_not_used_for_the_longest():
    cache, tokens = EventCache(2), np.zeros(1, np.int32)
    for key in "abac":
        cache.put(key, tokens)
    assert "a" in cache and "c" in cache and "b" not in cache


def test_without_a_table_only_mappings_are_known(encoder_of):
    encoder = encoder_of(NoTable())
    with pytest.raises(DataError, match="item 'i3' is unknown since no item table was given"):
        encoder.encode(Request([], ["i3"]))
    assert len(encoder.encode(Request([], [EVENTS[-2]])).candidates) == 1


def test_errors_begin_with_the_name_of_the_request(encoder_of, items):
    encoder = encoder_of(ItemTable.read(items))
    long = {"title": "word " * 900, "genres": "Drama"}
    for history, candidates, kind, message in (
        ([("zz", "like")], ["i3"], DataError, "history: item 'zz'"),
        ([], ["zz"], DataError, "candidates: item 'zz'"),
        ([], "i3", DataError, "candidates must be a list"),
        ([], ["i3", long], StreamError, "candidate 1 takes"),
    ):
        with pytest.raises(kind, match=f"^request 7: {message}"):
            encoder.encode(Request(history, candidates, name="request 7: "))


def test_requests_are_read_from_tuples():
    (one,) = scorer_requests([([], ["i3"], {"age": 3})], "movies")
    assert (one.domain, one.user, one.name) == ("movies", {"age": 3}, "request 0: ")
    (two,) = bank_requests([["shop", [], ["i3"]]])
    assert (two.domain, two.user, two.name) == ("shop", None, "request 0 (shop): ")


def test_a_batch_computes_equal_candidates_once(encoder_of, items):
    class Model:
        def calibrate(self, logits: np.ndarray) -> np.ndarray:
            return logits.astype(np.float64) + 1

    encoder, model, other = encoder_of(ItemTable.read(items)), Model(), Model()
    requests = [(["i3", "i4", "i3"], model), (["i4"], model), (["i4"], other)]
    batch, results = RequestBatch(), [np.empty((len(candidates), 2)) for candidates, _ in requests]
    for (candidates, owner), out in zip(requests, results, strict=True):
        batch.add(encoder.encode(Request(HISTORY, candidates)), owner, out)
    assert (batch.requested, batch.distinct) == (5, 3)

    def predict(groups) -> None:
        assert [len(group.candidates) for group in groups] == [2, 1]
        for number, group in enumerate(groups):
            rows = np.arange(len(group.candidates), dtype=np.float32)[:, None]
            group.logits = np.concatenate([rows, rows + 10 * number], axis=1)

    batch.run(predict)
    assert [found.tolist() for found in results] == [[[1, 1], [2, 2], [1, 1]], [[2, 2]], [[1, 11]]]


def test_encoding_needs_neither_torch_nor_arrow():
    script = (
        "import sys\nfor name in ('torch', 'transformers', 'pyarrow', 'tqdm'):\n    sys.modules[name] = None\n"
        "import llmrec_peft.requests.batching, llmrec_peft.requests.plain_items, llmrec_peft.requests.request_encoder"
    )
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)
