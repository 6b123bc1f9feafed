"""Results of fitting a retrieval index: output checks, metrics, the printed table and the verdict."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from llmrec_peft.config.schema import IndexConfig
from llmrec_peft.errors import ConfigError
from llmrec_peft.evaluation.bootstrap import Interval
from llmrec_peft.evaluation.calibration import Calibration
from llmrec_peft.evaluation.metrics import higher_is_better
from llmrec_peft.retrieval.fusion import Fusion
from llmrec_peft.retrieval.index_files import is_index
from llmrec_peft.runs.console import format_interval, print_table
from llmrec_peft.runs.fused_systems import COLLABORATIVE, FUSED, LLM, FusionTargets, Intervals, positive_classes
from llmrec_peft.runs.output_paths import check_output_directory
from llmrec_peft.runs.result_files import check_results

SHIFTED = 1.5
"""If the mean prediction and the observed share of positives differ by more than this factor, a note is printed."""


def check_index_output(config: IndexConfig, directory: Path) -> None:
    """Check, before the minutes of scoring, that the index can be written and replaces nothing but another index."""
    inputs = {"data.path": config.data.path, "base": config.base}
    bundle = os.path.realpath(config.bundle)
    check_output_directory(
        directory, inputs, what="retrieval", own=lambda path: path == directory or os.path.realpath(path) == bundle
    )
    if os.path.realpath(directory) == bundle:
        raise ConfigError(f"retrieval {directory} is the bundle itself; choose another directory")
    if config.output_dir is not None:
        out = os.path.realpath(config.output_dir)
        if os.path.realpath(directory) in (out, *map(str, Path(out).parents)):
            raise ConfigError(
                f"output_dir {config.output_dir} is retrieval {directory}, or lies in it, and would be replaced with "
                "it; choose another directory"
            )
    if directory.exists() and not is_index(directory) and any(directory.iterdir()):
        raise ConfigError(
            f"retrieval {directory} exists and holds nothing that this recipe fitted, so it is not replaced; "
            "choose another directory"
        )
    if config.output_dir is not None:
        check_results(Path(config.output_dir), inputs | {"bundle": config.bundle, "retrieval": str(directory)})


def index_metrics(
    valid: FusionTargets,
    test: FusionTargets,
    values: Intervals,
    gaps: Intervals,
    fusion: Fusion,
    *,
    measured: Mapping[str, Any],
    saved: Mapping[str, Any],
) -> dict[str, Any]:
    """What metrics.json holds; `measured` and `saved` describe the index that was measured and the one on disk."""
    parts = {"valid": valid, "test": test}
    return {
        "test": {system: _plain(by_name) for system, by_name in values.items()},
        "fused_minus": {system: _plain(by_name) for system, by_name in gaps.items()},
        "targets": {name: len(part.logits) for name, part in parts.items()},
        "users": {name: len(np.unique(part.users)) for name, part in parts.items()},
        "fusion": fusion.to_dict(),
        "retrieval_index": dict(measured),
        "written": dict(saved),
    }


def _plain(by_name: Mapping[str, Interval]) -> dict[str, Any]:
    return {name: interval.to_dict() for name, interval in by_name.items()}


def prediction_columns(test: FusionTargets, systems: Mapping[str, np.ndarray]) -> pa.Table:
    """The test targets with p_llm_<label>, p_collaborative_<label> and p_fused_<label>."""
    table = test.streams.describe(test.predictions.targets)
    for system in (LLM, COLLABORATIVE, FUSED):
        for number, label in enumerate(test.streams.domain.labels):
            table = table.append_column(f"p_{system}_{label}", pa.array(systems[system][:, number]))
    return table


# -- printing --------------------------------------------------------------------------------------


def print_comparison(
    found: Mapping[str, Any], values: Intervals, gaps: Intervals, fusion: Fusion, valid: FusionTargets
) -> None:
    """Print the metrics of each system, the gain of the fusion, and what the gain comes to."""
    print(f"\n{found['targets']['test']:,} test targets of {found['users']['test']:,} users")
    lines = {system: _cells(by_name) for system, by_name in values.items()}
    for system in (LLM, COLLABORATIVE):
        lines[f"{FUSED} - {system}"] = _cells(gaps[system], sign=True)
    print_table(lines)
    print(f"fusion: {fusion.why}, of {fusion.targets:,} validation targets of {fusion.users:,} users")
    print(_verdict(fusion, gaps[LLM]))
    _note_shifted_shares(valid)


def _cells(by_name: Mapping[str, Interval], *, sign: bool = False) -> dict[str, str]:
    return {name: format_interval(part.value, part.low, part.high, sign=sign) for name, part in by_name.items()}


def _verdict(fusion: Fusion, gaps: Mapping[str, Interval]) -> str:
    """One line on whether the fusion is better than the LLM alone."""
    if fusion.strength is None:
        return "the fusion leaves the LLM's predictions as they are; the index is used for retrieval only"
    better: list[str] = []
    worse: list[str] = []
    for name, gap in gaps.items():
        gain = gap.value if higher_is_better(name) else -gap.value
        if gap.low * gap.high > 0:  # the interval excludes 0
            (better if gain > 0 else worse).append(name)
    if not better and not worse:
        return "on test the fusion did not help: no interval of its difference to the LLM alone excludes 0"
    findings = [f"{', '.join(part)} {word}" for part, word in ((better, "better"), (worse, "worse")) if part]
    verdict = "fusion helped" if better and not worse else "fusion did not help" if not better else "fusion is mixed"
    return f"on test the {verdict}: {'; '.join(findings)} than the LLM alone"


def _note_shifted_shares(valid: FusionTargets) -> None:
    """Print a note where predictions and validation differ in the share of positives: the fusion follows validation."""
    positive = np.flatnonzero(positive_classes(valid.streams.domain))
    predicted = Calibration().apply(valid.logits)[:, positive].sum(axis=1).mean()
    observed = np.isin(valid.predictions.labels, positive).mean()
    if observed > 0 and not 1 / SHIFTED < predicted / observed < SHIFTED:
        print(
            f"note: the LLM predicts {predicted:.4f} positives on average, and {observed:.4f} of the validation "
            "targets are positive; the fusion follows the share of validation"
        )
