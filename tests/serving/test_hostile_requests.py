"""Whatever a request holds, both scorers answer it alike or refuse it in one line by one of our errors.

The same way fail: odd values in the history, the candidates, the user's columns, ids, item tables, counts and lists.
"""

import copy

import numpy as np
import pytest

from llmrec_peft import Scorer
from llmrec_peft.errors import DataError, DomainError, LLMRecError
from llmrec_peft.requests.plain_items import PlainItems
from llmrec_peft.serving import OnnxScorer
from llmrec_peft.serving.onnx_scorer import request_domain
from tests.support.requests import HISTORY

pytestmark = pytest.mark.usefixtures("one_thread")


class Wicked(list):
    """A list that breaks when it is read."""

    def __iter__(self):
        raise KeyError("wicked")


class Mute:
    """An object that cannot even be shown."""

    def __repr__(self):
        raise RuntimeError("mute")


RECURSIVE: list = []
RECURSIVE.append(RECURSIVE)
DEEP: dict = {}
for _ in range(5_000):
    DEEP = {"x": DEEP}
ODD = [
    None, True, 1.5, float("nan"), float("inf"), 10**5000, -(2**70), b"x", bytearray(b"x"), "text", "\ud83d", "",
    "\u200b", [], [[]], {}, {"a": 1}, {1, 2}, object(), 1j, RECURSIVE, DEEP, Mute(), Wicked([1]), np.float64(2),
    np.int64(3), np.float32("nan"), np.array(3), np.zeros((2, 2)), np.datetime64("NaT"), range(3), int, ..., lambda: 1,
]  # fmt: skip


@pytest.fixture(scope="module")
def pair(exported):
    from llmrec_peft.data.log import BehaviorLog
    from tests.conftest import make_small_tables

    merged, onnx, _ = exported
    items = BehaviorLog(*make_small_tables()).items
    return OnnxScorer.load(onnx, items.to_pylist(), threads=1), Scorer.load(merged, items)


def outcome(score, *request):
    """An array of answers, or the type and text of our error; anything else is raised."""
    try:
        return score(*request)
    except LLMRecError as error:
        assert "\n" not in str(error) and len(str(error)) < 600 and str(error).isprintable(), str(error)
        return type(error)


def test_odd_values_anywhere(pair):
    requests = []
    for odd in ODD:
        requests += [
            (odd, ["i3"]), (HISTORY, odd), ([odd], ["i3"]), (HISTORY, [odd]), ([(odd, "like")], ["i3"]),
            ([("i3", odd)], ["i3"]), (HISTORY, [{"title": odd, "genres": "Drama"}]), (HISTORY, ["i3"], odd),
            (HISTORY, [{"title": "Film", "genres": odd}]), (HISTORY, [{"item_id": odd}]),
            (HISTORY, [{"title": "Film", "genres": [odd, "Drama"]}]),
        ]  # fmt: skip
    answered = 0
    for request in requests:
        found = [outcome(scorer.score, *request) for scorer in pair]
        if isinstance(found[0], np.ndarray):
            np.testing.assert_allclose(found[0], found[1], atol=1e-4)
            answered += 1
        else:
            assert found[0] is found[1], request
    assert 30 < answered < len(requests) / 2


@pytest.mark.parametrize(
    ("title", "named"),
    [(None, "has no title"), (float("nan"), "has no title"), (3, "a title that is not text, 3"),
     ("\u3164\u200b", "without a visible character"), ("\ufe0f", "without a visible"), ("", "without a visible"),
     (["a"], "not text"), (b"x", "b'x'")],
)  # fmt: skip
def test_titles_that_nobody_can_read(title, named, pair):
    for scorer in pair:
        with pytest.raises((DataError, DomainError), match=named):
            scorer.score(HISTORY, ["i3", {"title": title, "genres": "Drama"}])
        with pytest.raises((DataError, DomainError), match=named):
            scorer.score([({"title": title, "genres": "Drama"}, "like")], ["i3"])
    if named != "b'x'":
        with pytest.raises(DataError, match=named):
            PlainItems([{"item_id": "a", "title": title}])
    with pytest.raises(DataError, match="1 items have no title where others have one"):
        PlainItems([{"item_id": "a", "title": "A"}, {"item_id": "b"}])


def test_halves_and_missing_values_are_read_alike(pair):
    for given, same in (
        ({"title": "Film \ud83d", "genres": "Drama"}, {"title": "Film \ufffd", "genres": "Drama"}),
        ({"title": "\ud83c\udfac", "genres": "Drama"}, {"title": "🎬", "genres": "Drama"}),
        ({"title": "Film", "genres": float("nan")}, {"title": "Film", "genres": None}),
        ({"title": "Film", "genres": np.array(["a", "b"], object)}, {"title": "Film", "genres": "a, b"}),
        ({"title": "Film", "genres": np.int8(5)}, {"title": "Film", "genres": "5"}),
    ):
        for scorer in pair:
            found = scorer.score(HISTORY, [given, same])
            np.testing.assert_array_equal(found[0], found[1])
    # Of two long arrays whose repr is cut, each is answered as itself.
    one, two = np.arange(40), np.arange(40)[::-1]
    with np.printoptions(threshold=3):
        for scorer in pair:
            found = scorer.score([], [{"title": "x", "genres": values} for values in (one, two)])
            assert np.abs(found[0] - found[1]).max() > 1e-5


@pytest.mark.parametrize("odd", [float("nan"), None, "", "\u3164", "\ud83d", True, 1.5, b"x", ["a"], {}, 2.0**60])
def test_item_tables_with_odd_ids(odd):
    with pytest.raises(DataError):
        PlainItems([{"item_id": odd, "title": "A"}])


@pytest.mark.parametrize("odd", [0, -1, 1.5, True, "5", None, float("nan"), [3]])
def test_counts_that_are_none(odd, pair):
    for scorer in pair:
        with pytest.raises(DataError, match="batch_tokens must be at least 1 and whole"):
            scorer.score(HISTORY, ["i3"], batch_tokens=odd)
    for name in ("k", "pool"):
        with pytest.raises(LLMRecError, match="k and pool must be at least 1"):
            pair[1].recommend(HISTORY, **{name: odd})


def test_recommending_with_odd_values(pair):
    scorer = pair[1]
    for odd in ODD:
        for options in ({"candidates": [odd]}, {"exclude": odd}, {"exclude": [odd]}, {"context": odd}, {"user": odd}):
            outcome(lambda options=options: scorer.recommend(HISTORY, 1, **{"candidates": ["i3"], **options}))
        outcome(lambda odd=odd: scorer.recommend(odd, 1))
        for many in (scorer.score_many, pair[0].score_many, scorer.recommender().recommend_many):
            outcome(many, odd)
        outcome(lambda odd=odd: scorer.recommender().recommend_many([HISTORY], 1, users=odd, candidates=["i3"]))
    assert len(scorer.recommend(HISTORY, 10**12, candidates=["i3", "i4", "i9"], exclude=[])) == 1


@pytest.mark.parametrize("event", ["{title:>1000000000}", "{title.__class__}", "{title!r}", "{title:{width}}"])
def test_templates_of_a_strangers_export(event, exported, pair):
    manifest = copy.deepcopy(dict(pair[0].manifest))
    manifest["domain"]["event"] = event
    with pytest.raises(DomainError, match="event has the f"):
        request_domain(manifest)
