"""Ranking the positives of a split among other items: in fixed lists, or in the whole catalogue as it is served."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from llmrec_peft.config.schema import EvaluateConfig, RankingConfig
from llmrec_peft.data.domain import Domain
from llmrec_peft.data.log import Splits
from llmrec_peft.errors import ConfigError, DataError
from llmrec_peft.evaluation.bootstrap import mean_interval
from llmrec_peft.evaluation.ranking_metrics import one_relevant
from llmrec_peft.retrieval.collaborative import Popularity
from llmrec_peft.retrieval.histories import Histories, feedback
from llmrec_peft.retrieval.recommender import Recommender, excluded_labels
from llmrec_peft.retrieval.retrieval_index import DIRECTORY, RetrievalIndex, choose_half_life
from llmrec_peft.retrieval.retriever import Candidates
from llmrec_peft.runs.logged_events import LoggedEvents
from llmrec_peft.runs.results import cell, print_cells
from llmrec_peft.scoring.prompts import Event
from llmrec_peft.scoring.scorer import Scorer
from llmrec_peft.training.distributed import raise_on_all_ranks

PLACES = 10
AT_ONCE, CANDIDATES_AT_ONCE = 32, 20_000
"""Targets, and their candidates, that are scored together, at most."""

LLM, FUSED, RETRIEVAL, POPULARITY = "llm", "fused", "retrieval", "popularity"


class Lists:
    """Positives of one split, and the list of items that each is ranked in.

    A target is a positive whose item its user could be recommended: one without a label of `recommend.exclude` before.
    Its list is its item, and others of the catalogue: none that an earlier label excludes, and none that was taken at
    the same moment, which would be as right. Nothing of later moments has a part in it.

    Attributes:
        rows: int64 [n], rows of the log, ascending.
        left_out: how many positives are no targets, by reason.
    """

    def __init__(self, splits: Splits, name: str, domain: Domain, options: RankingConfig) -> None:
        """Draw the targets.

        Raises:
            DataError: no positive that can be ranked.
        """
        self.log, self.domain, self.options, self.name = splits.train.log, domain, options, name
        self.splits = splits
        self.logged, self.feedback = LoggedEvents(self.log, domain), feedback(self.log, domain)
        excluded = [domain.labels.index(label) for label in excluded_labels(domain)]
        self._excluding = np.isin(self.logged.classes, excluded)
        taken = splits[name].rows
        taken = taken[self.feedback[taken] == 1]
        if not len(taken):
            raise DataError(
                f"{name} of log {self.log.name!r} has no positive, so there is nothing to rank; give more data, or "
                "leave ranking out"
            )
        once = self._each_once(taken)
        again = self._excluded_before(once)
        drawn = np.random.default_rng(options.seed).permutation(once[~again])[: options.targets]
        alone = np.array([not len(self.free(int(row))) for row in drawn], bool)
        self.rows = np.sort(drawn[~alone])
        self.left_out = {
            "met before": int(again.sum()),
            "named twice at a moment": len(taken) - len(once),
            "no other item left": int(alone.sum()),
        }
        if not len(self.rows):
            raise DataError(
                f"none of the {len(taken)} positives in {name} of log {self.log.name!r} can be ranked: "
                + ", ".join(f"{count} {reason}" for reason, count in self.left_out.items())
                + "; correct recommend.exclude of the domain, or leave ranking out"
            )

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def users(self) -> np.ndarray:
        """User code of each target, [n]."""
        return self.log.user_codes[self.rows]

    @cached_property
    def popularity(self) -> Popularity:
        """Of the training rows."""
        rows = self.splits.train.rows
        timed = self.domain.split.by == "time" and self.log.dated
        return Popularity(choose_half_life(self.log, rows, self.feedback) if timed else None).fit(
            self.log, rows, self.feedback
        )

    @cached_property
    def _counts(self) -> np.ndarray:
        rows = self.splits.train.rows
        return np.bincount(self.log.item_codes[rows[self.feedback[rows] == 1]], minlength=self.log.num_items)

    def _keys(self, rows: np.ndarray) -> np.ndarray:
        return self.log.user_codes[rows].astype(np.int64) * self.log.num_items + self.log.item_codes[rows]

    def _each_once(self, rows: np.ndarray) -> np.ndarray:
        """One row for each user, item and moment."""
        keys, times = self._keys(rows), self.log.timestamps[rows]
        order = np.lexsort((rows, times, keys))
        same = (np.diff(keys[order]) == 0) & (np.diff(times[order]) == 0)
        return np.sort(rows[order[np.r_[True, ~same]]])

    def _excluded_before(self, rows: np.ndarray) -> np.ndarray:
        """bool [rows]: whether the user had a label for the item before that excludes it."""
        times, done = self.log.timestamps, np.flatnonzero(self._excluding)
        keys = self._keys(done)
        order = np.lexsort((times[done], keys))
        known, first = np.unique(keys[order], return_index=True)
        if not len(known):
            return np.zeros(len(rows), bool)
        wanted = self._keys(rows)
        places = np.minimum(np.searchsorted(known, wanted), len(known) - 1)
        return (known[places] == wanted) & (times[done[order[first[places]]]] < times[rows])

    def out(self, row: int) -> np.ndarray:
        """Item codes that are in no list of a target."""
        user = self.log.user_codes[row]
        own = slice(self.log.user_offsets[user], self.log.user_offsets[user + 1])
        times, moment = self.log.timestamps[own], self.log.timestamps[row]
        gone = (self._excluding[own] & (times < moment)) | ((self.feedback[own] == 1) & (times == moment))
        items = np.unique(self.log.item_codes[own][gone])
        return items[items != self.log.item_codes[row]].astype(np.int64)

    def free(self, row: int) -> np.ndarray:
        """Item codes that a target's own item can be ranked with, rising."""
        free = np.ones(self.log.num_items, bool)
        free[self.out(row)] = False
        free[self.log.item_codes[row]] = False
        return np.flatnonzero(free)

    def codes(self, row: int) -> np.ndarray:
        """Item codes of a target's list, its own first; the same for the same seed, whatever else is asked for."""
        free, wanted = self.free(row), self.options.candidates
        if wanted != "all" and len(free) > wanted - 1:
            # The highest of log(weight) + Gumbel noise are a draw without replacement by weight. What nobody took has
            # hardly any, so that it comes in only after all that somebody took.
            weights = self._counts[free] if self.options.sampling == "popularity" else np.ones(len(free))
            keys = np.log(np.maximum(weights, 1e-300))
            keys += np.random.default_rng([self.options.seed, row]).gumbel(size=len(free))
            free = np.sort(free[np.argpartition(-keys, wanted - 2)[: wanted - 1]])
        return np.concatenate([[self.log.item_codes[row]], free]).astype(np.int64)

    def request(self, row: int, codes: np.ndarray) -> tuple[list[tuple[Event, str]], list[Event], dict[str, Any]]:
        """What a scorer is asked of a target: history, candidates at the target's moment, and the header's columns."""
        user, logged = int(self.log.user_codes[row]), self.logged
        moments = logged.moments(np.array([row])) * len(codes)
        header = {name: logged.first(user, name) for name in self.domain.header_columns}
        return logged.history(user, self.log.timestamps[row]), logged.events(codes, moments), header

    def past(self, rows: np.ndarray) -> Histories:
        """What the users of targets did strictly before."""
        return Histories.before(self.log, self.feedback, self.log.user_codes[rows], self.log.timestamps[rows])


def check_ranking(config: EvaluateConfig) -> None:
    """Raise ConfigError where retrieval is asked for and there is none."""
    place = Path(config.ranking.retrieval or Path(config.bundle) / DIRECTORY)
    if (config.ranking.pool or config.ranking.retrieval) and not place.is_dir():
        raise ConfigError(
            f"ranking.{'retrieval' if config.ranking.retrieval else 'pool'} needs a directory of retrieval, and "
            f"{place} is none; make it with recipes/index.py"
        )


def rank(config: EvaluateConfig, lists: Lists, state: PartialState) -> tuple[dict[str, Any], pa.Table]:
    """Rank each target in its list by the bundle, by the bundle fused if it has a fusion, and by popularity.

    Returns:
        Metrics with intervals by user, and differences, as they go into metrics.json; and one row a target with its
        place by each system: items above it, and items with its score, itself among them.

    Raises:
        LLMRecError: as `Scorer.load` and `Scorer.score_many`, and for retrieval that has seen the split.
    """
    options = config.ranking
    with raise_on_all_ranks():
        scorer = Scorer.load(
            config.bundle, lists.log, config.base, dtype=config.dtype, attn=config.attn or "sdpa",
            device=None if state.device.type == "cpu" else str(state.device),
            cache_bytes=0,  # no answer depends on what was asked before it
            retrieval=options.retrieval, trust_remote_code=config.trust_remote_code,
        )  # fmt: skip
        if scorer.retrieval_index is not None:
            _check_retrieval_index(scorer.retrieval_index, lists)
        if state.is_main_process:
            print(f"ranking {len(lists):,} positives of {config.split}", flush=True)
    with raise_on_all_ranks():
        places = _places(scorer, lists, config.batch_tokens, state)
    if state.num_processes > 1:
        places = gather_object(places)
    places = sorted(places)
    systems = {
        name: np.array([found[name] for _, found in places], np.int64).T for name in places[0][1] if name != "size"
    }
    sizes = np.array([found["size"] for _, found in places])
    found = _measured(lists, systems, sizes)
    if state.is_main_process:
        _show(found)
    return found, _table(lists, systems, sizes)


def _check_retrieval_index(retrieval_index: RetrievalIndex, lists: Lists) -> None:
    """Refuse evidence of rows that are not the training's: it would know what it is to be measured on."""
    if lists.name == "train":
        return
    log, rows = lists.log, lists.splits[lists.name].rows
    said = retrieval_index.note
    if lists.domain.split.by == "time":
        first = log.timestamps[rows].min()
        if said["last_time"] < first:
            return
        what = f"goes up to time {said['last_time']}, but {lists.name} begins at {first}"
    else:
        train = lists.splits.train.rows
        train = train[lists.feedback[train] >= 0]
        if (said["rows"], said["users"]) == (len(train), len(np.unique(log.user_codes[train]))):
            return
        what = f"is of {said['rows']} rows of {said['users']} users, which are not the {len(train)} training rows"
    raise DataError(
        f"what retrieval knows {what} of log {log.name!r}; fit it again on this log with recipes/index.py, "
        "without --refit, or move the directory away"
    )


# -- placing ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Asked:
    """One target's list, and the part of it that the model ranks.

    codes: int64, the list, own item first. scored: int64, of these. own: place of the own item in `scored`, -1 if it is
    not there. order: all of the list in retrieval's order, where that is used.
    """

    row: int
    past: Histories
    codes: np.ndarray
    scored: np.ndarray
    own: int
    order: np.ndarray | None


Places = dict[str, Any]
"""(above, tied) by system, and under "size" how long the list is."""


def _places(scorer: Scorer, lists: Lists, batch_tokens: int, state: PartialState) -> list[tuple[int, Places]]:
    """(target, places) of this process's share of the targets."""
    recommender = scorer.recommender()
    pool = lists.options.pool
    each = pool or (lists.log.num_items if lists.options.candidates == "all" else lists.options.candidates)
    size = max(1, min(AT_ONCE, CANDIDATES_AT_ONCE // each))
    chunks = [range(start, min(start + size, len(lists))) for start in range(0, len(lists), size)]
    found = []
    bar = tqdm(chunks[state.process_index :: state.num_processes], desc="ranking", disable=not state.is_main_process)
    for chunk in bar:
        rows = lists.rows[chunk.start : chunk.stop]
        past = lists.past(rows)
        asked = [_asked(lists, recommender, int(row), past.part(number, number + 1)) for number, row in enumerate(rows)]
        requests = [lists.request(one.row, one.scored) for one in asked]
        answers = scorer.score_many(requests, batch_tokens=batch_tokens)
        for number, one, probabilities in zip(chunk, asked, answers, strict=True):
            found.append((number, _placed(lists, recommender, one, probabilities)))
    return found


def _asked(lists: Lists, recommender: Recommender, row: int, past: Histories) -> _Asked:
    codes = lists.codes(row)
    if lists.options.pool is None:
        return _Asked(row, past, codes, codes, 0, None)
    named: Candidates = recommender.retriever.retrieve(past, lists.log.num_items, lists.out(row))
    scored = named.items[: lists.options.pool]
    own = np.flatnonzero(scored == codes[0])
    return _Asked(row, past, codes, scored, int(own[0]) if len(own) else -1, named.items)


def _placed(lists: Lists, recommender: Recommender, one: _Asked, probabilities: np.ndarray) -> Places:
    negative, places = lists.domain.negative_class, {"size": len(one.codes)}
    behind = None if one.order is None else (int(np.flatnonzero(one.order == one.codes[0])[0]), 1)
    answers = {LLM: probabilities}
    fusion, retrieval_index = recommender.fusion, recommender.retrieval_index
    if fusion is not None and retrieval_index is not None and fusion.strength is not None:
        features = retrieval_index.features(one.past, np.zeros(len(one.scored), np.int64), one.scored)
        answers[FUSED] = fusion.apply(np.log(np.maximum(probabilities, 1e-300)), features)
    for system, p in answers.items():
        # What retrieval did not name comes after all that it named, in its own order.
        places[system] = behind if one.own < 0 else place_of(1 - p[:, negative], one.own)
    if behind is not None:
        places[RETRIEVAL] = behind
    places[POPULARITY] = place_of(lists.popularity.score(one.past, one.codes), 0)
    return places


def place_of(scores: np.ndarray, own: int) -> tuple[int, int]:
    """How many of the scores are above that at `own`, and how many equal it, itself among them."""
    return int((scores > scores[own]).sum()), int((scores == scores[own]).sum())


# -- measuring -------------------------------------------------------------------------------------


def _measured(lists: Lists, systems: Mapping[str, np.ndarray], sizes: np.ndarray) -> dict[str, Any]:
    options, users = lists.options, lists.users
    values = {system: one_relevant(*places, PLACES) for system, places in systems.items()}
    served = FUSED if FUSED in systems else LLM
    draw = {"samples": options.bootstrap, "seed": options.seed}
    return {
        "split": lists.name,
        "candidates": options.candidates,
        "sampling": None if options.candidates == "all" else options.sampling,
        "pool": options.pool,
        "seed": options.seed,
        "targets": len(lists),
        "users": len(np.unique(users)),
        "left_out": lists.left_out,
        "items": lists.log.num_items,
        "list_items": {"least": int(sizes.min()), "mean": float(sizes.mean()), "most": int(sizes.max())},
        "systems": {
            system: {name: mean_interval(value, users, **draw).to_dict() for name, value in by_name.items()}
            for system, by_name in values.items()
        },
        f"{served}_minus": {
            system: {
                name: mean_interval(values[served][name] - value, users, **draw).to_dict()
                for name, value in by_name.items()
            }
            for system, by_name in values.items()
            if system != served
        },
    }


def _table(lists: Lists, systems: Mapping[str, np.ndarray], sizes: np.ndarray) -> pa.Table:
    log, rows = lists.log, lists.rows
    taken = log.interactions.select(["user_id", "item_id", "timestamp"]).take(pa.array(rows))
    columns: dict[str, Any] = {name: taken.column(name) for name in taken.column_names}
    columns["items"] = pa.array(sizes)
    if lists.options.candidates != "all":
        ids = log.items.column("item_id").to_pylist()
        columns["candidates"] = pa.array([[ids[code] for code in lists.codes(int(row))] for row in rows])
    for system, (above, tied) in systems.items():
        columns |= {f"{system}_above": pa.array(above), f"{system}_tied": pa.array(tied)}
    return pa.table(columns)


def _show(found: Mapping[str, Any]) -> None:
    size, left = found["list_items"], {reason: n for reason, n in found["left_out"].items() if n}
    lists = f"{size['most']:,}" if size["least"] == size["most"] else f"{size['least']:,} to {size['most']:,}"
    print(f"{found['targets']:,} positives of {found['users']:,} users, each in a list of {lists} items")
    if left:
        print("positives left out: " + ", ".join(f"{count:,} {reason}" for reason, count in left.items()))
    lines = {system: _cells(by_name) for system, by_name in found["systems"].items()}
    served = FUSED if FUSED in found["systems"] else LLM
    for system, by_name in found[f"{served}_minus"].items():
        lines[f"{served} - {system}"] = _cells(by_name, sign=True)
    print_cells(lines)


def _cells(by_name: Mapping[str, Mapping[str, float]], *, sign: bool = False) -> dict[str, str]:
    return {name: cell(value["value"], value["low"], value["high"], sign=sign) for name, value in by_name.items()}
