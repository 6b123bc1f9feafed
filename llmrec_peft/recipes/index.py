"""Fusing a bundle's answers with what the log says of its items, and measuring both together and each alone."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from accelerate import PartialState

from llmrec_peft.checkpoints.manifest import MANIFEST
from llmrec_peft.checkpoints.merged import load_answering, read_answering
from llmrec_peft.config.schema import IndexConfig
from llmrec_peft.data.collator import StreamCollator
from llmrec_peft.data.domain import Domain
from llmrec_peft.data.log import Splits
from llmrec_peft.data.streams import StreamDataset
from llmrec_peft.errors import ConfigError
from llmrec_peft.evaluation.bootstrap import Interval, differences, intervals
from llmrec_peft.evaluation.calibration import Calibration
from llmrec_peft.evaluation.metrics import DEFAULT_NAMES, compute_metrics, higher_is_better
from llmrec_peft.evaluation.predictions import metric_names, users_of
from llmrec_peft.models.base import check_positions
from llmrec_peft.models.predict import Predictions, predict
from llmrec_peft.retrieval.fusion import GATES, Features, Fusion
from llmrec_peft.retrieval.histories import feedback
from llmrec_peft.retrieval.retrieval_index import DIRECTORY, RetrievalIndex
from llmrec_peft.retrieval.retrieval_index import MANIFEST as EVIDENCE_MANIFEST
from llmrec_peft.runs.output_paths import check_output
from llmrec_peft.runs.results import cell, check_results, print_cells, write_results
from llmrec_peft.runs.split_streams import check_split, limited, read_log, split_of, streams_of
from llmrec_peft.scoring.scorer import adapter_of
from llmrec_peft.training.distributed import distributed_session, raise_on_all_ranks

NAMES = ("auc", "gauc", "logloss", "ece")
SPLITS = ("valid", "test")
LLM, ALONE, FUSED = "llm", "collaborative", "fused"
SHIFTED = 1.5
"""Answers whose mean is over or under the observed share by this factor aim at other shares than validation's."""


@dataclass(frozen=True)
class _Part:
    """Answers of the bundle on targets of one split, and what the log says of the same targets.

    logits: float64 [n, labels], calibrated.
    """

    streams: StreamDataset
    predictions: Predictions
    logits: np.ndarray
    features: Features

    @property
    def users(self) -> np.ndarray:
        return users_of(self.predictions, self.streams)


def index(config: IndexConfig) -> dict[str, Any]:
    """Fit evidence on the training rows and a fusion on validation, measure on test, and save both.

    With `refit` the saved evidence is of all rows, after all has been measured: the fusion stays as it was fitted.

    Returns:
        What goes into metrics.json; empty on processes other than the first.

    Raises:
        LLMRecError: with one line on what cannot be used.
    """
    with distributed_session() as state:
        return _index(config, state)


def _index(config: IndexConfig, state: PartialState) -> dict[str, Any]:
    show = print if state.is_main_process else (lambda *_, **__: None)
    with raise_on_all_ranks():
        manifest = read_answering(config.bundle)
        domain = Domain.of_manifest(manifest["domain"], source=f"{config.bundle}/{MANIFEST}")
        place = Path(config.retrieval or Path(config.bundle) / DIRECTORY)
        _check_places(config, place)
        show(f"reading {config.data.path}", flush=True)
        splits = split_of(read_log(config.data), domain)
        for name in SPLITS:
            check_split(splits, name, manifest["counts"].get("split"))
        show("fitting what the training rows say of the items", flush=True)
        retrieval_index = _retrieval_index(splits, domain, config.seed) if state.is_main_process else None
        show(f"loading {config.bundle}", flush=True)
        bundle = load_answering(
            config.bundle, base=config.base, dtype=config.dtype, attn=config.attn,
            trust_remote_code=config.trust_remote_code,
        )  # fmt: skip
        check_positions(bundle.classifier.config, domain.stream.max_length)
        streams = {name: streams_of(splits, name, domain, bundle.tokenizer) for name in SPLITS}
        limits = {"valid": config.valid_targets, "test": config.test_targets}
        model = bundle.classifier.to(state.device)
        chosen = {name: limited(streams[name], limit, model) for name, limit in limits.items()}
        collator = StreamCollator(bundle.tokenizer.pad_token_id, config.batch_tokens, mask=model.encoder)
    predictions = {
        name: predict(
            model, part, collator, batch_tokens=config.batch_tokens, processes=state, description=name
        )
        for name, part in chosen.items()
    }  # fmt: skip
    with raise_on_all_ranks():
        if not state.is_main_process:
            return {}
        calibration = Calibration.from_dict(bundle.calibration)
        parts = {name: _part(streams[name], predictions[name], calibration, retrieval_index) for name in SPLITS}
        kept = retrieval_index
        if config.refit:
            show("fitting again, on all rows, for serving", flush=True)
            kept = _refitted(retrieval_index, splits, domain)
        return _measure_and_save(config, place, domain, kept, parts, adapter_of(manifest), retrieval_index.note)


def _check_places(config: IndexConfig, place: Path) -> None:
    """Before the minutes that scoring takes: what is fitted can be written, and replaces nothing but its like."""
    inputs = {"data.path": config.data.path, "base": config.base}
    bundle = os.path.realpath(config.bundle)
    check_output(
        place, inputs, what="retrieval", own=lambda path: path == place or os.path.realpath(path) == bundle,
    )  # fmt: skip
    if os.path.realpath(place) == bundle:
        raise ConfigError(f"retrieval {place} is the bundle itself; choose another directory")
    if config.output_dir is not None:
        out = os.path.realpath(config.output_dir)
        if os.path.realpath(place) in (out, *map(str, Path(out).parents)):
            raise ConfigError(
                f"output_dir {config.output_dir} is retrieval {place}, or lies in it, and would be replaced with it; "
                "choose another directory"
            )
    if place.exists() and not (place / EVIDENCE_MANIFEST).is_file() and any(place.iterdir()):
        raise ConfigError(
            f"retrieval {place} exists and holds nothing that this recipe fitted, so it is not replaced; "
            "choose another directory"
        )
    if config.output_dir is not None:
        check_results(Path(config.output_dir), inputs | {"bundle": config.bundle, "retrieval": str(place)})


def _retrieval_index(splits: Splits, domain: Domain, seed: int) -> RetrievalIndex:
    log = splits.train.log
    return RetrievalIndex.fit(log, splits.train.rows, feedback(log, domain), seed=seed, timed=domain.split.by == "time")


def _refitted(retrieval_index: RetrievalIndex, splits: Splits, domain: Domain) -> RetrievalIndex:
    """The models of all rows, so that recent items and tastes are known where nothing is measured any more."""
    log = splits.train.log
    return retrieval_index.refit(
        log, np.concatenate([splits[name].rows for name in ("train", *SPLITS)]), feedback(log, domain)
    )


def _part(
    streams: StreamDataset, predictions: Predictions, calibration: Calibration, retrieval_index: RetrievalIndex
) -> _Part:  # fmt: skip
    log, targets = streams.log, predictions.targets
    features = retrieval_index.target_features(
        log, feedback(log, streams.domain), streams.target_rows[targets], streams.target_items[targets]
    )
    return _Part(streams, predictions, calibration.shift(predictions.logits), features)


# -- fitting ---------------------------------------------------------------------------------------


def positive_classes(domain: Domain) -> tuple[bool, ...]:
    """Which labels count as taken, in class order: all but the negative one."""
    return tuple(number != domain.negative_class for number in range(len(domain.labels)))


def _fit(valid: _Part, logits: np.ndarray, features: Features, seed: int) -> Fusion:
    return Fusion.fit(
        logits, features, valid.predictions.labels, valid.users, positive=positive_classes(valid.streams.domain),
        seed=seed,
    )  # fmt: skip


def _answers(parts: Mapping[str, _Part], fusion: Fusion, seed: int) -> dict[str, np.ndarray]:
    """Probabilities [n, labels] of each system on the test targets.

    A score alone, and all of them alone, are answered by the same regression: fitted on the same targets with the same
    gates and the same choice of its prior, on a model that knows no more than the labels' shares in validation.
    """
    valid, test = parts["valid"], parts["test"]
    labels = len(valid.streams.domain.labels)
    shares = np.bincount(valid.predictions.labels, minlength=labels) + 1.0
    ignorant = {name: np.tile(np.log(shares / shares.sum()), (len(part.logits), 1)) for name, part in parts.items()}
    found = {LLM: Calibration().apply(test.logits)}
    scores = [name for name in test.features.names if name not in GATES]
    for title, names in [*((name, [name]) for name in scores), (ALONE, scores)]:
        seen = {name: _only(part.features, names) for name, part in parts.items()}
        found[title] = _fit(valid, ignorant["valid"], seen["valid"], seed).apply(ignorant["test"], seen["test"])
    return found | {FUSED: fusion.apply(test.logits, test.features)}


def _only(features: Features, names: list[str]) -> Features:
    names = (*names, *GATES)
    return Features(names, features.values[:, [features.names.index(name) for name in names]])


# -- measuring -------------------------------------------------------------------------------------


def _measure_and_save(
    config: IndexConfig,
    place: Path,
    domain: Domain,
    kept: RetrievalIndex,
    parts: Mapping[str, _Part],
    adapter: str | None,
    measured: Mapping[str, Any],
) -> dict[str, Any]:
    valid, test = parts["valid"], parts["test"]
    fusion = _fit(valid, valid.logits, valid.features, config.seed)
    answers = _answers(parts, fusion, config.seed)
    names = [*NAMES, *(name for name in metric_names(test.streams, None) if name not in DEFAULT_NAMES)]
    values, gaps = _compare(test, answers, names, config)
    kept.save(place, fusion=fusion, adapter=adapter)
    found = {
        "test": {system: _plain(by_name) for system, by_name in values.items()},
        "fused_minus": {system: _plain(by_name) for system, by_name in gaps.items()},
        "targets": {name: len(part.logits) for name, part in parts.items()},
        "users": {name: len(np.unique(part.users)) for name, part in parts.items()},
        "fusion": fusion.to_dict(),
        "evidence": dict(measured),
        "kept": kept.note,
    }
    _show(found, values, gaps, fusion)
    _note_shares(valid, domain)
    print(f"kept in {place}: {', '.join(kept.models)}{'' if fusion.strength is None else ' and the fusion'}")
    if config.output_dir is not None:
        write_results(Path(config.output_dir), found, {"predictions": _table(test, answers)})
    return found


def _compare(
    test: _Part, answers: Mapping[str, np.ndarray], names: list[str], config: IndexConfig
) -> tuple[dict[str, dict[str, Interval]], dict[str, dict[str, Interval]]]:
    """Metrics of each system by name, and the fused answers' less the system's."""
    labels, users = test.predictions.labels, test.users
    lists = test.streams.target_lists[test.predictions.targets]
    others = {system: p for system, p in answers.items() if system != FUSED}
    if not config.bootstrap:
        bare = {system: compute_metrics(labels, p, users, lists, names) for system, p in answers.items()}
        gaps = {system: {name: bare[FUSED][name] - bare[system][name] for name in names} for system in others}
        return tuple({s: {n: Interval(v, *[np.nan] * 3, 0) for n, v in d.items()} for s, d in part.items()}
                     for part in (bare, gaps))  # fmt: skip
    options = {"samples": config.bootstrap, "seed": config.seed}
    return (
        {system: intervals(names, labels, p, users, lists, **options) for system, p in answers.items()},
        {
            system: differences(names, labels, p, answers[FUSED], users, lists, **options)
            for system, p in others.items()
        },
    )


def _plain(by_name: Mapping[str, Interval]) -> dict[str, Any]:
    return {name: interval.to_dict() for name, interval in by_name.items()}


def _table(test: _Part, answers: Mapping[str, np.ndarray]) -> pa.Table:
    """The test targets with p_llm_<label>, p_collaborative_<label> and p_fused_<label>."""
    table = test.streams.describe(test.predictions.targets)
    for system in (LLM, ALONE, FUSED):
        for number, label in enumerate(test.streams.domain.labels):
            table = table.append_column(f"p_{system}_{label}", pa.array(answers[system][:, number]))
    return table


# -- printing --------------------------------------------------------------------------------------


def _show(
    found: Mapping[str, Any],
    values: Mapping[str, Mapping[str, Interval]],
    gaps: Mapping[str, Mapping[str, Interval]],
    fusion: Fusion,
) -> None:
    print(f"\n{found['targets']['test']:,} test targets of {found['users']['test']:,} users")
    lines = {system: _cells(by_name) for system, by_name in values.items()}
    for system in (LLM, ALONE):
        lines[f"{FUSED} - {system}"] = _cells(gaps[system], sign=True)
    print_cells(lines)
    print(f"fusion: {fusion.why}, of {fusion.targets:,} validation targets of {fusion.users:,} users")
    print(_verdict(fusion, gaps[LLM]))


def _cells(by_name: Mapping[str, Interval], *, sign: bool = False) -> dict[str, str]:
    return {name: cell(part.value, part.low, part.high, sign=sign) for name, part in by_name.items()}


def _verdict(fusion: Fusion, gaps: Mapping[str, Interval]) -> str:
    """What the differences to the model alone come to, in words."""
    if fusion.strength is None:
        return "the model's answers stay as they are; what was fitted still names candidates"
    better, worse = [], []
    for name, gap in gaps.items():
        good = gap.value if higher_is_better(name) else -gap.value
        if gap.low * gap.high > 0:  # an interval without 0
            (better if good > 0 else worse).append(name)
    if not better and not worse:
        return "on test the fusion did not help: no interval of its difference to the model alone leaves out 0"
    said = [f"{', '.join(part)} {word}" for part, word in ((better, "better"), (worse, "worse")) if part]
    verdict = "fusion helped" if better and not worse else "fusion did not help" if not better else "fusion is mixed"
    return f"on test the {verdict}: {'; '.join(said)} than the model alone"


def _note_shares(valid: _Part, domain: Domain) -> None:
    """Say so where the answers aim at other shares of the labels than validation has: the fusion moves them back."""
    positive = np.flatnonzero(positive_classes(domain))
    said = Calibration().apply(valid.logits)[:, positive].sum(axis=1).mean()
    seen = np.isin(valid.predictions.labels, positive).mean()
    if seen > 0 and not 1 / SHIFTED < said / seen < SHIFTED:
        print(
            f"note: the model's answers average {said:.4f}, and of the validation targets {seen:.4f} were taken; "
            "fused answers aim at the shares of validation"
        )
