"""A history encoded once answers as independent prompts do, however it is cut, cached or extended."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from llmrec_peft import Domain, Scorer
from llmrec_peft.data.layout import window_start
from llmrec_peft.data.vocabulary import Vocabulary
from llmrec_peft.errors import BundleError, DataError, ModelError
from llmrec_peft.merging.merge_bundle import merge_bundle
from llmrec_peft.models import attention
from llmrec_peft.requests.item_table import ItemTable
from llmrec_peft.requests.request_domain import RequestDomain
from llmrec_peft.requests.request_encoder import RequestEncoder
from llmrec_peft.scoring import engine as engine_module
from llmrec_peft.scoring.bank import DomainBank
from tests.support.requests import CALIBRATION, HISTORY, MOVIES, SHOP, SHOP_HISTORY, USER, alone

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # PEFT's own call
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]


@pytest.fixture(autouse=True, params=[2, 1000], ids=["blocks", "one mask"])
def short(request, monkeypatch) -> None:
    """Attention in blocks, which long rows of candidates take, and under one mask."""
    monkeypatch.setattr(attention, "SHORT", request.param)


class Passes:
    """Tokens of each forward pass of a scorer's base, [rows, length, past]."""

    def __init__(self, scorer: Scorer) -> None:
        self.shapes: list[tuple[int, int, int]] = []
        classifier = scorer._bank._engine.classifier
        run = classifier.hidden_states

        def counted(input_ids, *args, **kwargs):
            seen = kwargs.get("past_seen")
            self.shapes.append((*input_ids.shape, 0 if seen is None else seen.shape[1]))
            return run(input_ids, *args, **kwargs)

        classifier.hidden_states = counted

    def take(self) -> list[tuple[int, int, int]]:
        found, self.shapes[:] = list(self.shapes), []
        return found


METHODS = [
    ("lora", "llama", {}),
    ("lora", "gpt2", {"dora": True, "bias": "all"}),
    ("adapter", "qwen2", {"placement": "houlsby", "size": 8}),
    ("head", "mistral", {}),
    ("full", "llama", {}),
    ("full", "gpt2", {}),
    ("qlora", "llama", {}),
]


@pytest.mark.parametrize("cache_bytes", [0, 1 << 28], ids=["no cache", "cache"])
@pytest.mark.parametrize(("method", "kind", "options"), METHODS)
def test_equal_to_independent_prompts(method, kind, options, cache_bytes, bundle_of, items):
    bundle = bundle_of(method, kind=kind, calibration=CALIBRATION, **options)
    scorer = Scorer.load(bundle, items, cache_bytes=cache_bytes)
    expected = alone(bundle, HISTORY, MOVIES, items)
    # Whole, in rows of a few candidates that continue from the history, and one candidate at a time.
    for batch_tokens in (4000, 200, 1):
        for _ in range(2):
            np.testing.assert_allclose(scorer.score(HISTORY, MOVIES, batch_tokens=batch_tokens), expected, atol=1e-4)
    assert scorer.labels == ["dislike", "like"] and scorer.domain.name == "movies"


def test_a_merged_model(bundle_of, items, tmp_path):
    bundle = bundle_of(calibration=CALIBRATION)
    merge_bundle(bundle, tmp_path / "merged")
    scorer = Scorer.load(tmp_path / "merged", items)
    np.testing.assert_allclose(scorer.score(HISTORY, MOVIES), alone(bundle, HISTORY, MOVIES, items), atol=1e-4)


def test_a_scorer_of_the_bank_follows_its_swaps(bundle_of, tiny_base, items):
    one, two = bundle_of(seed=1), bundle_of("adapter", seed=2)
    bank = DomainBank.load(tiny_base("llama"), {"m": one}, {"m": items}, cache_bytes=1 << 28)
    scorer = bank.scorer("m")
    for bundle in (one, two, one):
        bank.swap("m", bundle)
        for _ in range(2):  # the cache of one bundle is not used for another
            np.testing.assert_allclose(scorer.score(HISTORY, MOVIES), alone(bundle, HISTORY, MOVIES, items), atol=1e-4)
            (found,) = bank.score([("m", HISTORY, MOVIES)])
            np.testing.assert_allclose(found, alone(bundle, HISTORY, MOVIES, items), atol=1e-4)
    bank.remove("m")
    with pytest.raises(DataError, match="not in the bank"):
        scorer.score(HISTORY, MOVIES)


def test_histories_of_unequal_length_in_one_batch(bundle_of, items):
    bundle = bundle_of()
    scorer = Scorer.load(bundle, items)
    requests = [(HISTORY[:n], MOVIES[: 8 - n]) for n in (5, 0, 3, 1)]
    expected = [alone(bundle, *request, items) for request in requests]
    passes = Passes(scorer)
    for cached in range(2):
        for found, want in zip(scorer.score_many(requests), expected, strict=True):
            np.testing.assert_allclose(found, want, atol=1e-4)
        (shape,) = passes.take()  # one forward pass, whose pasts differ in the second round
        assert shape[0] == 4 and bool(shape[2]) == bool(cached)


def test_a_new_event_extends_the_cached_history(bundle_of, items):
    bundle = bundle_of()
    scorer = Scorer.load(bundle, items)
    passes = Passes(scorer)
    scorer.score(HISTORY[:3], MOVIES)
    ((_, first, _),) = passes.take()
    found = scorer.score(HISTORY[:4], MOVIES)
    ((_, second, past),) = passes.take()
    np.testing.assert_allclose(found, alone(bundle, HISTORY[:4], MOVIES, items), atol=1e-4)
    encoder = scorer.encoder
    event = len(encoder.encode_history(HISTORY[:4]).events[-1])
    candidates = sum(map(len, encoder.encode_events(MOVIES, "")))
    assert second == event + candidates and past == first - candidates
    scorer.score(HISTORY[:2], MOVIES)  # a beginning of the cached history
    ((_, third, _),) = passes.take()
    assert third == candidates


def test_a_long_history_keeps_its_beginning_for_some_events(bundle_of, domains, items, tmp_path):
    """A window that slides by one event at a time would begin anew with each."""
    assert [window_start(n, 6, 1) for n in (0, 6, 7, 9)] == [0, 0, 1, 3]
    assert [window_start(n, 39, 10) for n in (39, 40, 49, 50, 59)] == [0, 10, 10, 20, 20]
    for n in range(200):
        used = n - window_start(n, 39, 10)
        assert used <= 39 and (n <= 39 or used >= 30)
    import dataclasses

    wide = dataclasses.replace(domains["movies"], stream=dataclasses.replace(domains["movies"].stream, targets=9))
    domains["movies"] = wide
    scorer = Scorer.load(bundle_of(), items)
    long = [(f"i{n % 24}", "like" if n % 3 else "dislike") for n in range(60)]
    passes = Passes(scorer)
    pasts = []
    for length in range(20, 32):
        scorer.score(long[:length], MOVIES[:2])
        pasts.append(passes.take()[0][2])
    header = len(scorer.encoder.encode_history([]).header)
    anew = [past <= header for past in pasts]  # the header is the same whatever follows
    assert sum(anew) == 5 and len(anew) == 12


def test_what_is_the_same_is_computed_once(bundle_of, items):
    scorer = Scorer.load(bundle_of(), items, cache_bytes=0)
    passes = Passes(scorer)
    once = scorer.score(HISTORY, MOVIES)
    (plain,) = passes.take()
    twice = scorer.score(HISTORY, [*MOVIES, *MOVIES[::-1]])
    (repeated,) = passes.take()
    assert repeated == plain
    np.testing.assert_allclose(twice, np.concatenate([once, once[::-1]]), atol=1e-6)
    users = scorer.score_many([(HISTORY, MOVIES[:5]), (HISTORY, MOVIES[3:]), (HISTORY, MOVIES)])
    (shared,) = passes.take()
    assert shared == plain
    for found, want in zip(users, (once[:5], once[3:], once), strict=True):
        np.testing.assert_allclose(found, want, atol=1e-6)


def test_memory_does_not_grow_with_the_candidates(bundle_of, items, monkeypatch):
    monkeypatch.setattr(engine_module, "ROW_TOKENS", 300)
    monkeypatch.setattr(engine_module, "CHUNK_TOKENS", 120)
    bundle = bundle_of()
    scorer = Scorer.load(bundle, items, cache_bytes=0)
    passes = Passes(scorer)
    many = [{"title": f"Film {n}", "genres": "Drama"} for n in range(200)]
    found = scorer.score(HISTORY, many)
    shapes = passes.take()
    history = sum(map(len, (t := scorer.encoder.encode_history(HISTORY)).events)) + len(t.header)
    assert len(shapes) > 10 and all(rows == 1 for rows, _, _ in shapes)
    assert shapes[0][1] <= 300 and all(length <= 120 and past == history for _, length, past in shapes[1:])
    picked = [0, 7, 50, 199]
    np.testing.assert_allclose(found[picked], alone(bundle, HISTORY, [many[n] for n in picked], items), atol=1e-4)


def test_cached_histories_stay_within_their_bytes(bundle_of, items):
    bundle = bundle_of()
    scorer = Scorer.load(bundle, items)
    scorer.score(HISTORY, MOVIES[:2])
    one = scorer._bank._engine.prefix_cache.size
    scorer._bank._engine.prefix_cache.clear()
    scorer._bank._engine.prefix_cache.max_bytes = int(2.5 * one)
    other = [[(item, "like"), *HISTORY[1:]] for item in MOVIES]
    for _ in range(2):
        for history in other:
            found = scorer.score(history, MOVIES[:2])
            assert scorer._bank._engine.prefix_cache.size <= 2.5 * one and len(scorer._bank._engine.prefix_cache) <= 3
    np.testing.assert_allclose(found, alone(bundle, other[-1], MOVIES[:2], items), atol=1e-4)
    scorer._bank._engine.prefix_cache.max_bytes = 10
    scorer.score([("i7", "like")], MOVIES[:2])  # too large to be cached
    np.testing.assert_allclose(scorer.score(HISTORY, MOVIES), alone(bundle, HISTORY, MOVIES, items), atol=1e-4)


def test_threads_may_share_a_scorer(bundle_of, items):
    bundle = bundle_of()
    scorer = Scorer.load(bundle, items)
    expected = [alone(bundle, HISTORY[:n], MOVIES, items) for n in range(6)]
    errors: list[BaseException] = []

    def score(first: int) -> None:
        try:
            for number in range(12):
                n = (first + number) % 6
                np.testing.assert_allclose(scorer.score(HISTORY[:n], MOVIES), expected[n], atol=1e-4)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=score, args=(n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors[0]


def test_labels_that_leave_no_trace_and_a_header_of_columns(bundle_of):
    bundle = bundle_of("lora", "shop")
    scorer = Scorer.load(bundle)
    found = scorer.score(SHOP_HISTORY, SHOP, USER)
    assert found.shape == (5, 3)
    np.testing.assert_allclose(found, alone(bundle, SHOP_HISTORY, SHOP, user=USER), atol=1e-4)
    unseen = [pair for pair in SHOP_HISTORY if pair[1] != "skip"]
    np.testing.assert_allclose(scorer.score(unseen, SHOP, USER), found, atol=1e-5)
    assert np.abs(scorer.score(SHOP_HISTORY, SHOP, {"age": 99}) - found).max() > 1e-4


@pytest.mark.parametrize("script", ["日本語の映画", "فيلم عربي", "Кино 🎬", "x\n-> yes\n"])
def test_any_script_is_scored(script, bundle_of, items):
    bundle = bundle_of()
    candidates = [{"title": script, "genres": "Drama"}]
    found = Scorer.load(bundle, items).score(HISTORY, candidates)
    np.testing.assert_allclose(found, alone(bundle, HISTORY, candidates, items), atol=1e-4)


def test_streams_of_training_are_scored_the_same(bundle_of, small_log):
    """What the evaluation of a log says of a target is what the scorer says of it."""
    from llmrec_peft.checkpoints.loading import load_trained
    from llmrec_peft.data.collator import StreamCollator
    from llmrec_peft.data.streams import build_streams
    from llmrec_peft.models.predict import predict

    log, directory = small_log(), bundle_of()
    bundle = load_trained(directory)
    domain = Domain.from_dict(bundle.domain | {"label": {"column": "rating", "above": 3}})
    streams = build_streams(log.split(by="time").test, domain, bundle.tokenizer)
    collator = StreamCollator(bundle.tokenizer.pad_token_id, 1000)
    predictions = predict(bundle.classifier, streams, collator, batch_tokens=1000)
    scorer = Scorer.load(directory, log)
    ids, users = log.items.column("item_id").to_pylist(), log.user_codes
    classes = domain.classes(log)
    checked = 0
    for target in range(0, streams.num_targets, 5):
        row, window = streams.target_rows[target], np.searchsorted(streams.target_offsets, target, "right") - 1
        first = streams.target_rows[streams.target_offsets[window]]
        begin = max(int(log.user_offsets[users[row]]), first - domain.stream.context)
        if streams.dropped_context or row - begin > domain.stream.context + domain.stream.targets - 1:
            continue
        history = [(ids[log.item_codes[r]], domain.labels[classes[r]]) for r in range(begin, row)]
        found = scorer.score(history, [ids[log.item_codes[row]]])[0]
        logits = torch.tensor(predictions.logits[target])
        np.testing.assert_allclose(found, torch.softmax(logits, 0).numpy(), atol=1e-4)
        checked += 1
    assert checked >= 5


@pytest.mark.parametrize(
    ("history", "candidates", "message"),
    [
        ([("i3", "adored")], MOVIES, "label 'adored'"),
        ([("zz", "like")], MOVIES, "item 'zz' is unknown"),
        (HISTORY, ["i3", "zz"], "item 'zz' is unknown"),
        (HISTORY, "i3", "must be a list"),
        (HISTORY, None, "must be a list"),
    ],
)
def test_bad_input_is_named(history, candidates, message, bundle_of, items):
    scorer = Scorer.load(bundle_of(), items)
    with pytest.raises(DataError, match=message):
        scorer.score(history, candidates)
    with pytest.raises(DataError, match=f"request 1: .*{message}"):
        scorer.score_many([(HISTORY, MOVIES), (history, candidates)])
    with pytest.raises(DataError, match="request 0 must be"):
        scorer.score_many([HISTORY[:1]])
    assert scorer.score(HISTORY, []).shape == (0, 2)
    assert scorer.score_many([]) == []


def test_an_unknown_item_is_named_wherever_it_stands(bundle_of, items):
    """Before the window too: an answer must not hang on how much came after."""
    scorer = Scorer.load(bundle_of(), items)
    recent = [("i3", "like")] * 20
    with pytest.raises(DataError, match="history: item 'zz' is unknown"):
        scorer.score([("zz", "like"), *recent], MOVIES)
    with pytest.raises(DataError, match="history: entry 1 must be an item id or a mapping"):
        scorer.score([("i3", "like"), (3.5, "like"), *recent], MOVIES)


def test_a_history_longer_than_the_window_is_its_newest_part(bundle_of, items):
    bundle = bundle_of()
    scorer = Scorer.load(bundle, items)
    long = [(f"i{n % 24}", "like" if n % 3 else "dislike") for n in range(500)]
    window = scorer.encoder.domain.window
    used = long[window_start(len(long), window, scorer.encoder.domain.stride) :]
    assert 0 < len(used) <= window
    np.testing.assert_allclose(scorer.score(long, MOVIES), alone(bundle, used, MOVIES, items), atol=1e-4)
    assert np.abs(scorer.score(used[1:], MOVIES) - scorer.score(long, MOVIES)).max() > 1e-4


def test_a_hundred_thousand_candidates(bundle_of, items):
    """All answered, in their order; those that are the same cost once."""
    scorer = Scorer.load(bundle_of(), items)
    passes = Passes(scorer)
    ids = items.column("item_id").to_pylist()
    many = [ids[n] for n in np.random.default_rng(0).integers(len(ids), size=100_000)]
    found = scorer.score(HISTORY, many)
    assert len(passes.take()) < 20 and found.shape == (100_000, 2)
    each = dict(zip(ids, scorer.score(HISTORY, ids), strict=True))
    np.testing.assert_allclose(found, [each[item] for item in many], atol=1e-6)


def test_what_cannot_be_scored_is_refused(bundle_of, tiny_base, tmp_path):
    with pytest.raises(ModelError, match="is a bidirectional encoder"):
        Scorer.load(bundle_of(kind="bert"))
    with pytest.raises(BundleError, match=r"no behavior\.json"):
        Scorer.load(tmp_path)
    with pytest.raises(BundleError, match="was trained on"):
        Scorer.load(bundle_of(), base=tiny_base("qwen2"))


def test_an_event_reads_the_same_whatever_stands_beside_it(tiny_tokenizer):
    """A whole number beside a broken one, and a missing text beside one that is there."""
    domain = Domain.from_dict({"name": "shop", "event": "{name}: {price}", "outcomes": {"skip": " no", "buy": " yes"}})
    events = [{"name": "a", "price": 3}, {"name": "a", "price": 2.5}, {"name": None, "price": 2.5}]

    def encoder() -> RequestEncoder:
        return RequestEncoder(RequestDomain.of(domain), Vocabulary(domain, tiny_tokenizer), ItemTable(None))

    together = encoder().encode_events(events, "candidates")
    for event, tokens in zip(events, together, strict=True):
        assert encoder().encode_events([event], "candidates")[0].tolist() == tokens.tolist()
    assert tiny_tokenizer.decode(together[0]) == "a: 3 ->"
