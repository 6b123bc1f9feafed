"""Streams against the plain reading of the log in `tests/reference.py`: windows, what each answer sees, and lengths."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest

from llmrec_peft.data.domain import Domain
from llmrec_peft.data.log import BehaviorLog
from llmrec_peft.data.streams import IndependentPrompts, build_streams
from llmrec_peft.errors import DataError, DomainError, StreamError
from tests.reference import NaiveStreams, TooLong, sampled_items, visible

BASE = {
    "name": "movies",
    "header": "Movies one viewer rated:\n",
    "event": "{title} ({genres})",
    "marker": " ->",
    "outcomes": {"dislike": " no\n", "like": " yes\n"},
    "label": {"column": "rating", "above": 3},
    "stream": {"context": 3, "targets": 4, "max_length": 400},
}
MULTI = {
    "outcomes": {"low": " no\n", "middle": " maybe\n", "high": " yes\n"},
    "label": {
        "column": "rating",
        "map": {
            **{str(half / 2): "low" for half in range(1, 5)},
            **{"2.5": None, "3.0": None},
            **{str(half / 2): "middle" for half in range(7, 9)},
            **{str(half / 2): "high" for half in range(9, 11)},
        },
    },
}
CASES = {
    "order": {},
    "isolate": {"simultaneous": "isolate"},
    "no context": {"stream": {"context": 0, "targets": 4, "max_length": 400}},
    "one target": {"stream": {"context": 5, "targets": 1, "max_length": 400}},
    "tight": {"stream": {"context": 10, "targets": 4, "max_length": 150}},
    "tight isolate": {"simultaneous": "isolate", "stream": {"context": 10, "targets": 30, "max_length": 150}},
    "very tight isolate": {"simultaneous": "isolate", "stream": {"context": 2, "targets": 30, "max_length": 118}},
    "wide": {"stream": {"context": 100, "targets": 100, "max_length": 2000}},
    "likes alone": {"stream": {"context": 3, "targets": 4, "max_length": 400, "history_labels": ["like"]}},
    "likes alone, isolate": {
        "simultaneous": "isolate",
        "stream": {"context": 3, "targets": 5, "max_length": 300, "history_labels": ["like"]},
    },
    "no trace": {"stream": {"context": 3, "targets": 4, "max_length": 400, "history_labels": []}},
    "three labels": MULTI,
    "three labels, isolate": {**MULTI, "simultaneous": "isolate"},
    "by user": {"split": {"by": "user", "valid": 0.2, "test": 0.2}},
    "header columns": {"header": "Viewer {user_id} came at {timestamp}.\n"},
    "row columns": {"event": "{title} at {timestamp}"},
    "negatives": {"negatives": {"per_positive": 2}},
    "negatives, isolate": {"simultaneous": "isolate", "negatives": {"per_positive": 3, "sampling": "uniform"}},
    "negatives, by user": {"split": {"by": "user"}, "negatives": {"per_positive": 2}},
    "negatives, likes alone": {
        "negatives": {"per_positive": 1},
        "stream": {"context": 3, "targets": 4, "max_length": 300, "history_labels": ["like"]},
    },
    "negatives, other label": {
        **MULTI,
        "negatives": {"per_positive": 1, "label": "middle"},
        "stream": {"context": 2, "targets": 3, "max_length": 300},
    },
}


def parts(log, domain, tokenizer):
    """(split, streams) of each part of a log, as the recipes make them."""
    splits = log.split(by=domain.split.by, valid=domain.split.valid, test=domain.split.test)
    source = splits.train.rows if domain.split.by == "user" else None
    return [(split, build_streams(split, domain, tokenizer, source=source)) for _, split in splits.items()]


def check(split, streams, domain, tokenizer, unlabelled=False):
    """Every window, answer, token, position and length of `streams` is what the plain reading gives."""
    naive = NaiveStreams(split, domain, tokenizer, sampled_items(streams), unlabelled)
    assert len(streams) == len(naive.windows)
    assert streams.lengths.tolist() == [window.length for window in naive.windows]
    assert streams.dropped_context == sum(window.dropped for window in naive.windows)
    moments: dict[int, int] = {}
    seen = []
    for stream, window in zip((streams[n] for n in range(len(streams))), naive.windows, strict=True):
        assert len(stream) == window.length <= domain.stream.max_length - len(naive.suffix)
        assert len(stream.markers) == len(set(stream.markers.tolist())) == len(window.answers)
        for number, answer in enumerate(window.answers):
            tokens, positions = visible(stream, number)
            assert tokens == answer.prompt
            assert positions == list(range(len(tokens)))
            assert stream.labels[number] == answer.label
            target = int(stream.targets[number])
            assert streams.target_rows[target] == answer.row and streams.target_items[target] == answer.item
            assert streams.target_labels[target] == answer.label and streams.sampled[target] == answer.sampled
            assert (
                moments.setdefault(answer.moment, int(stream.candidate_sets[number])) == stream.candidate_sets[number]
            )
        seen += stream.targets.tolist()
        check_candidates(stream)
    assert seen == list(range(streams.num_targets))
    assert len(set(moments.values())) == len(moments)
    own = streams.target_rows[~streams.sampled].tolist()
    asked = [row for row in sorted(naive.targets) if unlabelled or naive.class_of(row) >= 0]
    assert own == [row for row in asked if not naive.dropped(row)]
    return naive


def check_candidates(stream):
    """Each candidate is one unbroken run that holds exactly one answer, at its end."""
    for segment in set(stream.segment.tolist()) - {0}:
        places = np.flatnonzero(stream.segment == segment)
        assert places.tolist() == list(range(places[0], places[-1] + 1))
        assert [m for m in stream.markers.tolist() if stream.segment[m] == segment] == [places[-1]]


@pytest.mark.parametrize("case", CASES)
def test_streams_are_the_plain_reading_of_the_log(case, small_log, tiny_tokenizer):
    domain = Domain.from_dict({**BASE, **CASES[case]})
    for split, streams in parts(small_log(), domain, tiny_tokenizer):
        check(split, streams, domain, tiny_tokenizer)
        assert streams.sampled.any() == (domain.negatives.per_positive > 0)


@pytest.mark.parametrize("case", ["order", "isolate", "tight", "likes alone", "three labels, isolate", "by user",
                                  "negatives", "negatives, isolate"])  # fmt: skip
def test_rows_without_a_label_can_be_targets(case, small_tables, tiny_tokenizer):
    """They are candidates of class -1, and every other answer is what it was."""
    interactions, items = small_tables
    rng = np.random.default_rng(7)
    ratings = pa.array(interactions["rating"].to_numpy(), mask=rng.random(len(interactions)) < 0.3)
    place = interactions.column_names.index("rating")
    log = BehaviorLog(interactions.set_column(place, "rating", ratings), items, name="gaps")
    domain = Domain.from_dict({**BASE, **CASES[case]})
    domain = replace(domain, label=replace(domain.label, missing="leave_out"))
    splits = log.split(by=domain.split.by)
    source = splits.train.rows if domain.split.by == "user" else None
    asked = build_streams(splits.train, domain, tiny_tokenizer, source=source, unlabelled=True)
    check(splits.train, asked, domain, tiny_tokenizer, unlabelled=True)
    assert (asked.target_labels == -1).sum() > 20 and not asked.sampled[asked.target_labels == -1].any()
    table = asked.describe(np.arange(asked.num_targets))
    assert table["label"].null_count == (asked.target_labels == -1).sum()
    plain = build_streams(splits.train, domain, tiny_tokenizer, source=source)
    check(splits.train, plain, domain, tiny_tokenizer)
    assert plain.target_rows.tolist() == asked.target_rows[asked.target_labels >= 0].tolist()


def with_baskets(small_tables, context_only=False, size=9):
    """A log where users act in moments of 1 to `size` events, some of them history alone."""
    interactions, items = small_tables
    rng = np.random.default_rng(3)
    steps = np.repeat(np.arange(len(interactions)), rng.integers(1, size + 1, len(interactions)))[: len(interactions)]
    table = interactions.set_column(2, "timestamp", pa.array(1_600_000_000 + steps * 60))
    # Rows of one step belong to one user, so that its moments are baskets.
    users = np.array([f"u{number % 7}" for number in steps])
    table = table.set_column(0, "user_id", pa.array(users))
    if context_only:
        table = table.append_column("context_only", pa.array(rng.random(len(table)) < 0.3))
    return BehaviorLog(table, items, name="baskets")


@pytest.mark.parametrize("context_only", [False, True])
@pytest.mark.parametrize("case", ["order", "isolate", "likes alone, isolate", "negatives, isolate",
                                  "three labels, isolate", "tight isolate", "very tight isolate",
                                  "negatives, by user"])  # fmt: skip
def test_baskets(case, context_only, small_tables, tiny_tokenizer):
    domain = Domain.from_dict({**BASE, **CASES[case]})
    log = with_baskets(small_tables, context_only)
    for split, streams in parts(log, domain, tiny_tokenizer):
        naive = check(split, streams, domain, tiny_tokenizer)
        if context_only:
            hidden = log.column("context_only").to_numpy()
            assert not hidden[streams.target_rows].any()
        if "tight" in case and split.name == "train":
            # Some baskets must not fit, or this shows nothing about baskets that are cut.
            moments = [{answer.moment for answer in window.answers} for window in naive.windows]
            assert any(before & after for before, after in zip(moments, moments[1:], strict=False))


def test_users_that_act_at_one_moment_stay_apart(small_tables, tiny_tokenizer):
    interactions, items = small_tables
    interactions = interactions.set_column(2, "timestamp", pa.array([5] * len(interactions)))
    domain = Domain.from_dict({**BASE, "simultaneous": "isolate", **CASES["by user"]})
    log = BehaviorLog(interactions, items)
    for split, streams in parts(log, domain, tiny_tokenizer):
        check(split, streams, domain, tiny_tokenizer)
        users = log.user_codes[streams.target_rows]
        assert len(set(users.tolist())) > 1
        for begin, end in zip(streams.target_offsets, streams.target_offsets[1:], strict=False):
            assert len(set(users[begin:end].tolist())) == 1


def test_an_isolated_basket_sees_nothing_of_itself(small_tables, tiny_tokenizer):
    domain = Domain.from_dict({**BASE, "simultaneous": "isolate"})
    streams = parts(with_baskets(small_tables), domain, tiny_tokenizer)[0][1]
    compared = 0
    for stream in (streams[n] for n in range(len(streams))):
        for alike in (
            np.flatnonzero(stream.candidate_sets == number) for number in set(stream.candidate_sets.tolist())
        ):
            starts = {stream.position_ids[stream.segment == stream.segment[m]][0] for m in stream.markers[alike]}
            if len(alike) > 1:
                compared += 1
                assert len(starts) == 1 and (stream.segment[stream.markers[alike]] > 0).all()
    assert compared > 10


def test_order_without_negatives_is_a_prefix_alone(small_log, tiny_tokenizer):
    for _, streams in parts(small_log(), Domain.from_dict(BASE), tiny_tokenizer):
        for stream in (streams[n] for n in range(len(streams))):
            assert not stream.segment.any()
            assert stream.position_ids.tolist() == list(range(len(stream)))


def test_later_targets_see_an_earlier_outcome_and_a_target_never_its_own(small_log, tiny_tokenizer):
    domain = Domain.from_dict(BASE)
    words = {word.strip() for word in domain.outcomes.values()}
    streams = parts(small_log(), domain, tiny_tokenizer)[0][1]
    stream = streams[1]
    assert len(stream.markers) == 4
    for number in range(4):
        text = tiny_tokenizer.decode(visible(stream, number)[0])
        lines = text.split("\n")[1:]
        assert lines[-1].endswith(" ->") and len(lines) >= number + 1
        assert all(line.rsplit(" -> ", 1)[1] in words for line in lines[:-1])


def test_the_newest_history_stays(small_log, tiny_tokenizer):
    wide = parts(small_log(), Domain.from_dict({**BASE, **CASES["wide"]}), tiny_tokenizer)[2][1]
    tight = {"stream": {"context": 100, "targets": 100, "max_length": 120}}
    cut = parts(small_log(), Domain.from_dict({**BASE, **tight}), tiny_tokenizer)[2][1]
    assert wide.dropped_context == 0 < cut.dropped_context
    whole = {int(s.targets[n]): visible(s, n)[0] for s in map(wide.__getitem__, range(len(wide)))
             for n in range(len(s.targets))}  # fmt: skip
    header = len(tiny_tokenizer(BASE["header"])["input_ids"])
    for stream in (cut[n] for n in range(len(cut))):
        for number, target in enumerate(stream.targets.tolist()):
            tokens = visible(stream, number)[0]
            assert tokens[:header] == whole[target][:header]
            assert tokens[header:] == whole[target][len(whole[target]) - len(tokens) + header :]


def test_negatives_stand_beside_their_positive(small_log, tiny_tokenizer):
    domain = Domain.from_dict({**BASE, **CASES["negatives"]})
    for split, streams in parts(small_log(), domain, tiny_tokenizer):
        log = split.log
        for target in np.flatnonzero(streams.sampled):
            row = streams.target_rows[target]
            met = (log.user_codes == log.user_codes[row]) & (log.timestamps <= log.timestamps[row])
            own = np.flatnonzero((streams.target_rows == row) & ~streams.sampled)[0]
            assert streams.target_labels[own] == 1 and streams.target_labels[target] == 0
            assert streams.target_sets[own] == streams.target_sets[target]
            assert streams.target_items[target] not in log.item_codes[met]
        assert not streams.sampled[streams.target_labels == 1].any()


def test_negatives_are_fixed_by_the_seed(small_log, tiny_tokenizer):
    domain, split = Domain.from_dict({**BASE, **CASES["negatives"]}), small_log().split().train
    items = [build_streams(split, domain, tiny_tokenizer, seed=seed).target_items.tolist() for seed in (0, 0, 1)]
    assert items[0] == items[1] != items[2]


def test_negatives_by_user_come_from_the_training_users(small_log, tiny_tokenizer):
    domain = Domain.from_dict({**BASE, **CASES["negatives, by user"]})
    log = small_log(users=30, events=6, items=60)
    splits = log.split(by="user", valid=0.3, test=0.3)
    known = set(log.item_codes[splits.train.rows].tolist())
    streams = build_streams(splits.test, domain, tiny_tokenizer, source=splits.train.rows)
    assert streams.sampled.sum() > 20 and set(streams.target_items[streams.sampled].tolist()) <= known
    assert set(log.item_codes[splits.test.rows].tolist()) - known


def test_by_user_windows_hold_one_user(small_log, tiny_tokenizer):
    domain = Domain.from_dict({**BASE, **CASES["by user"]})
    for split, streams in parts(small_log(), domain, tiny_tokenizer):
        for stream in (streams[n] for n in range(len(streams))):
            assert len(np.unique(split.log.user_codes[streams.target_rows[stream.targets]])) == 1


def test_time_splits_see_all_earlier_rows_of_the_user_as_history(small_log, tiny_tokenizer):
    domain, log = Domain.from_dict({**BASE, **CASES["wide"], "duplicates": "keep"}), small_log()
    split, streams = parts(log, domain, tiny_tokenizer)[2]
    first = streams[0]
    row = streams.target_rows[first.targets[0]]
    earlier = row - log.user_offsets[log.user_codes[row]]
    lines = tiny_tokenizer.decode(visible(first, 0)[0]).split("\n")
    assert earlier > 5 and len(lines) == 1 + earlier + 1


@pytest.mark.parametrize("simultaneous", ["order", "isolate"])
def test_an_event_that_cannot_fit_is_an_error_that_names_the_item(simultaneous, small_tables, tiny_tokenizer):
    interactions, items = small_tables
    titles = items.column("title").to_pylist()
    titles[5] = "long " * 100
    log = BehaviorLog(interactions, items.set_column(1, "title", pa.array(titles)), name="long")
    content = {**BASE, "simultaneous": simultaneous, "stream": {"context": 3, "targets": 4, "max_length": 150}}
    with pytest.raises(
        StreamError, match=r"item 'i5' takes \d+ tokens: the event of row \d+ of long needs .*max_length 150 leaves"
    ) as e:
        build_streams(log.split().train, Domain.from_dict(content), tiny_tokenizer)
    assert "\n" not in str(e.value)
    with pytest.raises(TooLong, match="i5"):
        NaiveStreams(log.split().train, Domain.from_dict(content), tiny_tokenizer)


@pytest.mark.parametrize("simultaneous", ["order", "isolate"])
def test_the_smallest_max_length_is_exact(simultaneous, small_tables, tiny_tokenizer):
    """One token less than the longest prompt of header and event is refused; that length itself is not."""
    log = with_baskets(small_tables)
    split = log.split().train

    def domain(max_length):
        rule = {"context": 3, "targets": 4, "max_length": max_length}
        return Domain.from_dict({**BASE, "simultaneous": simultaneous, "stream": rule})

    naive = NaiveStreams(split, domain(500), tiny_tokenizer)
    header = len(naive.tokens(BASE["header"]))
    longest = max(header + len(naive.event(row, int(log.item_codes[row]))) for row in split.rows)
    streams = build_streams(split, domain(longest), tiny_tokenizer)
    assert streams.lengths.max() == longest
    check(split, streams, domain(longest), tiny_tokenizer)
    with pytest.raises(StreamError):
        build_streams(split, domain(longest - 1), tiny_tokenizer)


def test_bos_and_eos_of_the_tokenizer_stand_around_a_prompt(small_log, tiny_tokenizer):
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    backend = type(tiny_tokenizer.backend_tokenizer).from_str(tiny_tokenizer.backend_tokenizer.to_str())
    cls, sep = (tiny_tokenizer.convert_tokens_to_ids(token) for token in ("[CLS]", "[SEP]"))
    backend.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", cls), ("[SEP]", sep)]
    )
    around = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>", pad_token="<|pad|>")
    domain = Domain.from_dict({**BASE, **CASES["tight"]})
    for split, streams in parts(small_log(), domain, around):
        check(split, streams, domain, around)
        alone = IndependentPrompts(streams)
        assert all(alone[n].input_ids[0] == cls and alone[n].input_ids[-1] == sep for n in range(len(alone)))
        assert all(len(alone[n]) <= domain.stream.max_length for n in range(len(alone)))


@pytest.mark.parametrize("case", ["order", "isolate", "negatives", "likes alone, isolate"])
def test_independent_prompts_are_the_plain_prompts(case, small_log, tiny_tokenizer):
    domain = Domain.from_dict({**BASE, **CASES[case]})
    for split, streams in parts(small_log(), domain, tiny_tokenizer):
        naive = NaiveStreams(split, domain, tiny_tokenizer, sampled_items(streams))
        for part in (streams, streams.limited(streams.num_targets // 2, seed=1)):
            numbers = getattr(part, "windows", range(len(streams)))
            answers = [answer for number in numbers for answer in naive.windows[number].answers]
            alone = IndependentPrompts(part)
            assert len(alone) == len(answers) and (part is streams or len(alone) < streams.num_targets)
            for number, answer in enumerate(answers):
                prompt = alone[number]
                assert prompt.input_ids.tolist() == answer.prompt and prompt.labels.tolist() == [answer.label]
                assert prompt.markers.tolist() == [len(answer.prompt) - 1] and not prompt.segment.any()
                assert len(prompt) <= alone.lengths[number]


def runs(tokens: list[int], pattern: list[int]) -> int:
    return sum(tokens[n : n + len(pattern)] == pattern for n in range(len(tokens) - len(pattern) + 1))


FRAGMENTS = (" ->", "->", "-", ">", " yes\n", " no\n", "\n", "<|endoftext|>", "<|end", "oftext|>", "<s>", "<", "s>",
             "[SEP]", "[S", "EP]", "\u2028", "\u200b", "\x00", "\x85", "é", "🎬", "{title}", "{", " ", "\t", "<|pad|>",
             "\ufeff", "|>", "a", "\x1c")  # fmt: skip


@pytest.mark.parametrize("simultaneous", ["order", "isolate"])
def test_no_title_can_forge_a_marker_an_outcome_or_a_special_token(simultaneous, small_tables, tiny_tokenizer):
    interactions, items = small_tables
    rng = np.random.default_rng(11)
    texts = ["x" + "".join(rng.choice(FRAGMENTS, rng.integers(1, 9))) for _ in range(2 * len(items))]
    items = items.set_column(1, "title", pa.array(texts[: len(items)]))
    items = items.set_column(2, "genres", pa.array(texts[len(items) :]))
    log = BehaviorLog(interactions, items, name="forged")
    # The two fields touch, so that one may end what the other begins.
    content = {**BASE, "event": "{title}{genres}", "simultaneous": simultaneous,
               "stream": {"context": 3, "targets": 4, "max_length": 1000}}  # fmt: skip
    domain = Domain.from_dict(content)
    marker = tiny_tokenizer(" ->", add_special_tokens=False)["input_ids"]
    words = [tiny_tokenizer(word, add_special_tokens=False)["input_ids"] for word in domain.outcomes.values()]
    special = set(tiny_tokenizer.all_special_ids) | set(tiny_tokenizer.get_added_vocab().values())
    newline = tiny_tokenizer("\n", add_special_tokens=False)["input_ids"]
    streams = build_streams(log.split().train, domain, tiny_tokenizer)
    checked = 0
    for stream in (streams[n] for n in range(len(streams))):
        assert not special & set(stream.input_ids.tolist())
        for number in range(len(stream.markers)):
            tokens = visible(stream, number)[0]
            events = runs(tokens, marker)
            text = tiny_tokenizer.decode(tokens, clean_up_tokenization_spaces=False)
            assert text.count("->") == events
            # Header and finished events end their lines, and nothing else does.
            assert sum(runs(tokens, marker + word) for word in words) == events - 1 == text.count("\n") - 1
            assert runs(tokens, newline) <= events
            checked += events
    assert checked > 500


def test_template_columns_that_are_not_there(small_log, tiny_tokenizer):
    split = small_log().split().train
    with pytest.raises(
        DomainError, match=r"event names the column 'brand', which neither the items \(item_id, title, genres"
    ):
        build_streams(split, Domain.from_dict({**BASE, "event": "{title} {brand}"}), tiny_tokenizer)
    with pytest.raises(DomainError, match=r"header names the column 'age', which the interactions \(user_id, item_id"):
        build_streams(split, Domain.from_dict({**BASE, "header": "Age {age}\n"}), tiny_tokenizer)


def test_a_split_without_labelled_targets(small_log, tiny_tokenizer):
    everything = {str(half / 2): None for half in range(0, 12)}
    content = {**BASE, "label": {"column": "rating", "map": everything}}
    with pytest.raises(DataError, match="split 'train' of small has no labelled target"):
        build_streams(small_log().split().train, Domain.from_dict(content), tiny_tokenizer)


def test_rows_that_the_map_leaves_out_are_no_history(small_log, tiny_tokenizer):
    content = {**BASE, "label": {"column": "behaviour", "map": {"click": "like", "skip": None}}}
    domain, log = Domain.from_dict(content), small_log()
    split, streams = parts(log, domain, tiny_tokenizer)[0]
    check(split, streams, domain, tiny_tokenizer)
    behaviour = np.array(log.column("behaviour").to_pylist())
    assert (behaviour[streams.target_rows] == "click").all()
    assert streams.num_targets == (behaviour[split.rows] == "click").sum()


def test_limited_draws_whole_windows(small_log, tiny_tokenizer):
    streams = parts(small_log(), Domain.from_dict(BASE), tiny_tokenizer)[0][1]
    part = streams.limited(20, seed=4)
    targets = np.concatenate([part[n].targets for n in range(len(part))])
    assert 20 <= len(targets) < 24 and len(set(targets.tolist())) == len(targets)
    assert [len(part[n]) for n in range(len(part))] == part.lengths.tolist()
    assert streams.limited(None) is streams and streams.limited(10**9) is streams
    assert streams.limited(20, seed=4).windows.tolist() == part.windows.tolist()
    assert streams.limited(20, seed=5).windows.tolist() != part.windows.tolist()


def test_describe_names_each_target(small_log, tiny_tokenizer):
    log = small_log()
    streams = parts(log, Domain.from_dict({**BASE, **CASES["negatives"]}), tiny_tokenizer)[1][1]
    table = streams.describe(np.arange(streams.num_targets)).to_pylist()
    rows = log.interactions.to_pylist()
    for target, line in enumerate(table):
        row = rows[streams.target_rows[target]]
        sampled = streams.sampled[target]
        assert (line["split"], line["user_id"], line["timestamp"]) == ("valid", row["user_id"], row["timestamp"])
        assert line["label"] == ("dislike" if sampled else "like" if row["rating"] > 3 else "dislike")
        assert (line["item_id"] == row["item_id"]) == (not sampled)


def test_a_negative_that_cannot_fit_is_named_itself(small_tables, tiny_tokenizer):
    interactions, items = small_tables
    titles = items.column("title").to_pylist()
    titles[7] = "long " * 100
    log = BehaviorLog(interactions, items.set_column(1, "title", pa.array(titles)), name="long")
    split = log.split().train
    rows = split.rows[np.asarray(log.item_codes[split.rows]) != log.item_index("i7")]
    content = {**BASE, "negatives": {"per_positive": 20}, "stream": {"context": 3, "targets": 4, "max_length": 600}}
    with pytest.raises(StreamError, match=r"item 'i7' takes \d+ tokens: .* and its sampled negatives needs"):
        build_streams(replace(split, rows=rows), Domain.from_dict(content), tiny_tokenizer)


def test_a_header_that_leaves_no_room_is_named(small_log, tiny_tokenizer):
    content = {**BASE, "header": "words " * 300}
    with pytest.raises(StreamError, match=r"header of user 'u\d+' takes all but -\d+ of the 400 tokens"):
        build_streams(small_log().split().train, Domain.from_dict(content), tiny_tokenizer)


def test_negatives_are_made_of_what_was_taken(small_tables, tiny_tokenizer):
    """Rows that the map leaves out, and rows that were refused, make no item known."""
    interactions, items = small_tables
    behaviour = ["return" if item == "i5" else "purchase" for item in interactions.column("item_id").to_pylist()]
    place = interactions.column_names.index("behaviour")
    log = BehaviorLog(interactions.set_column(place, "behaviour", pa.array(behaviour)), items)
    label = {"column": "behaviour", "map": {"purchase": "like", "return": None}}
    content = {**BASE, "label": label, "negatives": {"per_positive": 3}}
    for by in ("time", "user"):
        domain = Domain.from_dict({**content, "split": {"by": by}})
        for _, streams in parts(log, domain, tiny_tokenizer):
            assert streams.sampled.any()
            assert log.item_index("i5") not in streams.target_items


@pytest.mark.parametrize("by", ["time", "user"])
def test_negatives_were_taken_before(by, small_log, tiny_tokenizer):
    log = small_log()
    domain = Domain.from_dict({**BASE, "split": {"by": by}, "negatives": {"per_positive": 2, "sampling": "uniform"}})
    for _, streams in parts(log, domain, tiny_tokenizer):
        assert streams.sampled.any()
        for row, item in zip(streams.target_rows[streams.sampled], streams.target_items[streams.sampled], strict=True):
            assert (log.timestamps[log.item_codes == item] < log.timestamps[row]).any()
