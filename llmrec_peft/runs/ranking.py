"""Ranking evaluation: the positives of a split ranked in fixed candidate sets, or in the whole catalogue as served."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import pyarrow as pa
from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from llmrec_peft.config.schema import EvaluateConfig
from llmrec_peft.errors import ConfigError, DataError
from llmrec_peft.evaluation.bootstrap import mean_interval
from llmrec_peft.evaluation.ranking_metrics import one_relevant
from llmrec_peft.retrieval.histories import Histories
from llmrec_peft.retrieval.index_files import DIRECTORY
from llmrec_peft.retrieval.recommender import Recommender
from llmrec_peft.retrieval.retrieval_index import RetrievalIndex
from llmrec_peft.runs.candidate_sets import CandidateSets
from llmrec_peft.runs.console import format_interval, print_table
from llmrec_peft.scoring.scorer import Scorer
from llmrec_peft.training.distributed import raise_on_all_ranks

CUTOFF = 10
"""k of ndcg@k, hr@k and mrr@k."""
MAX_TARGETS, MAX_CANDIDATES = 32, 20_000
"""Targets, and their candidates, that are scored together, at most."""

LLM, FUSED, RETRIEVAL, POPULARITY = "llm", "fused", "retrieval", "popularity"


class Rank(NamedTuple):
    """Place of one target's item by one system: items that score higher, and items that score the same, itself too."""

    above: int
    tied: int


@dataclass(frozen=True)
class TargetRanks:
    """Ranks of target number `number` by system, and the size of its candidate set."""

    number: int
    size: int
    by_system: dict[str, Rank]


def check_ranking(config: EvaluateConfig) -> None:
    """Raise ConfigError where the configuration needs a retrieval index and there is none."""
    index = Path(config.ranking.retrieval or Path(config.bundle) / DIRECTORY)
    if (config.ranking.pool or config.ranking.retrieval) and not index.is_dir():
        raise ConfigError(
            f"ranking.{'retrieval' if config.ranking.retrieval else 'pool'} needs a retrieval index, and "
            f"{index} does not hold one; make one with recipes/index.py"
        )


def rank(config: EvaluateConfig, sets: CandidateSets, state: PartialState) -> tuple[dict[str, Any], pa.Table]:
    """Rank each target in its candidate set by the bundle, by the bundle with its fusion, and by popularity.

    Returns:
        Metrics with intervals by user, and differences, as metrics.json holds them; and a table with one row for each
        target and its `Rank` by each system.

    Raises:
        LLMRecError: as `Scorer.load` and `Scorer.score_many`, and for a retrieval index that knows the split.
    """
    options = config.ranking
    with raise_on_all_ranks():
        scorer = Scorer.load(
            config.bundle, sets.log, config.base, dtype=config.dtype,
            attn=cast(Literal["sdpa", "eager"], config.attn or "sdpa"),  # the scorer refuses other kernels
            device=None if state.device.type == "cpu" else str(state.device),
            cache_bytes=0,  # no prediction may depend on earlier requests
            retrieval=options.retrieval, trust_remote_code=config.trust_remote_code,
        )  # fmt: skip
        if scorer.retrieval_index is not None:
            _check_retrieval_index(scorer.retrieval_index, sets)
        if state.is_main_process:
            print(f"ranking {len(sets):,} positives of {config.split}", flush=True)
    with raise_on_all_ranks():
        ranks = _rank_own_share(scorer, sets, config.batch_tokens, state)
    if state.num_processes > 1:
        ranks = gather_object(ranks)
    ranks = sorted(ranks, key=lambda target: target.number)
    # int64 [2, targets] for each system: above, and tied.
    systems = {name: np.array([target.by_system[name] for target in ranks], np.int64).T for name in ranks[0].by_system}
    sizes = np.array([target.size for target in ranks])
    found = _metrics(sets, systems, sizes)
    if state.is_main_process:
        _show(found)
    return found, _table(sets, systems, sizes)


def _check_retrieval_index(retrieval_index: RetrievalIndex, sets: CandidateSets) -> None:
    """Raise DataError for an index that was fitted on other than the training rows: it may know the targets."""
    if sets.name == "train":
        return
    log, rows = sets.log, sets.splits[sets.name].rows
    note = retrieval_index.note
    if sets.domain.split.by == "time":
        first = log.timestamps[rows].min()
        if note["last_time"] < first:
            return
        what = f"goes up to time {note['last_time']}, but {sets.name} begins at {first}"
    else:
        train = sets.splits.train.rows
        train = train[sets.feedback[train] >= 0]
        if (note["rows"], note["users"]) == (len(train), len(np.unique(log.user_codes[train]))):
            return
        what = f"is of {note['rows']} rows of {note['users']} users, which are not the {len(train)} training rows"
    raise DataError(
        f"the retrieval index {what} of log {log.name!r}; fit it again on this log with recipes/index.py, "
        "without --refit, or move the directory away"
    )


# -- ranking ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Target:
    """One target, its candidate set, and the candidates that the model scores.

    Attributes:
        row: row of the log.
        history: the user's events before the target.
        candidates: int64 item codes, own item first.
        scored: int64 item codes, some of `candidates`.
        own: position of the own item in `scored`; -1 if the pool does not have it.
        retrieved: all candidates in the order of retrieval; None without a pool.
    """

    row: int
    history: Histories
    candidates: np.ndarray
    scored: np.ndarray
    own: int
    retrieved: np.ndarray | None


def _rank_own_share(scorer: Scorer, sets: CandidateSets, batch_tokens: int, state: PartialState) -> list[TargetRanks]:
    """Ranks of this process's share of the targets."""
    recommender = scorer.recommender()
    each = sets.options.pool or sets.size or sets.log.num_items
    size = max(1, min(MAX_TARGETS, MAX_CANDIDATES // each))
    chunks = [range(start, min(start + size, len(sets))) for start in range(0, len(sets), size)]
    found = []
    bar = tqdm(chunks[state.process_index :: state.num_processes], desc="ranking", disable=not state.is_main_process)
    for chunk in bar:
        rows = sets.rows[chunk.start : chunk.stop]
        past = sets.histories(rows)
        targets = [_target(sets, recommender, int(row), past.part(n, n + 1)) for n, row in enumerate(rows)]
        requests = [sets.request(target.row, target.scored) for target in targets]
        predictions = scorer.score_many(requests, batch_tokens=batch_tokens)
        for number, target, probabilities in zip(chunk, targets, predictions, strict=True):
            by_system = _ranks(sets, recommender, target, probabilities)
            found.append(TargetRanks(number, len(target.candidates), by_system))
    return found


def _target(sets: CandidateSets, recommender: Recommender, row: int, history: Histories) -> _Target:
    codes, retriever = sets.candidates(row), recommender.retriever
    if sets.options.pool is None or retriever is None:
        return _Target(row, history, codes, codes, 0, None)
    named = retriever.retrieve(history, sets.log.num_items, sets.excluded_items(row)).items
    scored = named[: sets.options.pool]
    own = np.flatnonzero(scored == codes[0])
    return _Target(row, history, codes, scored, int(own[0]) if len(own) else -1, named)


def _ranks(
    sets: CandidateSets, recommender: Recommender, target: _Target, probabilities: np.ndarray
) -> dict[str, Rank]:  # fmt: skip
    """Rank of the target's own item by each system; probabilities: float64 [scored, labels]."""
    systems = {LLM: probabilities}
    fusion, retrieval_index = recommender.fusion, recommender.retrieval_index
    if fusion is not None and retrieval_index is not None and fusion.strength is not None:
        features = retrieval_index.features(target.history, np.zeros(len(target.scored), np.int64), target.scored)
        systems[FUSED] = fusion.apply(np.log(np.maximum(probabilities, 1e-300)), features)
    found = {}
    if target.own >= 0:
        negative = sets.domain.negative_class
        found = {system: rank_of(1 - p[:, negative], target.own) for system, p in systems.items()}
    if target.retrieved is not None:
        behind = Rank(int(np.flatnonzero(target.retrieved == target.candidates[0])[0]), 1)
        # Items outside of the pool come after it, in the order of retrieval.
        found = found or dict.fromkeys(systems, behind)
        found[RETRIEVAL] = behind
    found[POPULARITY] = rank_of(sets.popularity.score(target.history, target.candidates), 0)
    return found


def rank_of(scores: np.ndarray, own: int) -> Rank:
    """Rank of the item at position `own` by scores [candidates], higher first."""
    return Rank(int((scores > scores[own]).sum()), int((scores == scores[own]).sum()))


# -- measuring -------------------------------------------------------------------------------------


def _metrics(sets: CandidateSets, systems: Mapping[str, np.ndarray], sizes: np.ndarray) -> dict[str, Any]:
    options, users = sets.options, sets.users
    values = {system: one_relevant(above, tied, CUTOFF) for system, (above, tied) in systems.items()}
    served = FUSED if FUSED in systems else LLM
    draw = {"samples": options.bootstrap, "seed": options.seed}
    return {
        "split": sets.name,
        "candidates": options.candidates,
        "sampling": None if options.candidates == "all" else options.sampling,
        "pool": options.pool,
        "seed": options.seed,
        "targets": len(sets),
        "users": len(np.unique(users)),
        "left_out": sets.left_out,
        "items": sets.log.num_items,
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


def _table(sets: CandidateSets, systems: Mapping[str, np.ndarray], sizes: np.ndarray) -> pa.Table:
    log, rows = sets.log, sets.rows
    taken = log.interactions.select(["user_id", "item_id", "timestamp"]).take(pa.array(rows))
    columns: dict[str, Any] = {name: taken.column(name) for name in taken.column_names}
    columns["items"] = pa.array(sizes)
    if sets.options.candidates != "all":
        ids = log.items.column("item_id").to_pylist()
        columns["candidates"] = pa.array([[ids[code] for code in sets.candidates(int(row))] for row in rows])
    for system, (above, tied) in systems.items():
        columns |= {f"{system}_above": pa.array(above), f"{system}_tied": pa.array(tied)}
    return pa.table(columns)


def _show(found: Mapping[str, Any]) -> None:
    size, left = found["list_items"], {reason: n for reason, n in found["left_out"].items() if n}
    sizes = f"{size['most']:,}" if size["least"] == size["most"] else f"{size['least']:,} to {size['most']:,}"
    print(f"{found['targets']:,} positives of {found['users']:,} users, each in a list of {sizes} items")
    if left:
        print("positives left out: " + ", ".join(f"{count:,} {reason}" for reason, count in left.items()))
    lines = {system: _cells(by_name) for system, by_name in found["systems"].items()}
    served = FUSED if FUSED in found["systems"] else LLM
    for system, by_name in found[f"{served}_minus"].items():
        lines[f"{served} - {system}"] = _cells(by_name, sign=True)
    print_table(lines)


def _cells(by_name: Mapping[str, Mapping[str, float]], *, sign: bool = False) -> dict[str, str]:
    return {
        name: format_interval(value["value"], value["low"], value["high"], sign=sign) for name, value in by_name.items()
    }
