"""Scoring a trained bundle again."""

from pathlib import Path
from typing import Any

from accelerate import PartialState

from ..config import EvaluateConfig
from ..data.collator import StreamCollator
from ..data.domain import Domain
from ..data.files import write_json, write_parquet
from ..data.streams import IndependentPrompts
from ..errors import BundleError, ConfigError
from ..evaluation.calibration import Calibration
from ..models.base import check_positions
from ..models.bundle import load_bundle
from ..models.manifest import MANIFEST, read_manifest
from ..models.predict import predict
from ..training.processes import joined, together
from .answers import measure, metric_names, prediction_table
from .run import check_place, holds_run
from .streams import check_split, read_log, split_of, streams_of


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Score a bundle on one split of a log, by streams or by independent prompts.

    Returns:
        Metrics by name.

    Raises:
        LLMRecError: with one line on what cannot be used.
    """
    with joined() as state:
        return _evaluate(config, state)


def _evaluate(config: EvaluateConfig, state: PartialState) -> dict[str, Any]:
    show = print if state.is_main_process else (lambda *_, **__: None)
    with together():
        manifest = _manifest(config.bundle)
        domain = Domain.from_dict(manifest["domain"], source=f"{config.bundle}/{MANIFEST}")
        if config.output_dir is not None:
            _check_output(Path(config.output_dir))
        show(f"reading {config.data.path}", flush=True)
        splits = split_of(read_log(config.data), domain)
        check_split(splits, config.split, manifest["counts"].get("split"))
        show(f"loading {config.bundle}", flush=True)
        bundle = load_bundle(
            config.bundle, base=config.base, dtype=config.dtype, attn=config.attn,
            trust_remote_code=config.trust_remote_code,
        )  # fmt: skip
        check_positions(bundle.classifier.config, domain.stream.max_length)
        streams = streams_of(splits, config.split, domain, bundle.tokenizer)
        part = streams.limited(config.limit)
        if config.mode == "independent" or bundle.classifier.encoder:
            part = IndependentPrompts(part)
        model = bundle.classifier.to(state.device)
        collator = StreamCollator(bundle.tokenizer.pad_token_id, config.batch_tokens, mask=model.encoder)
    predictions = predict(
        model, part, collator, batch_tokens=config.batch_tokens, processes=state,
        description=f"{config.split}, {config.mode}",
    )  # fmt: skip
    calibration = Calibration.from_dict(bundle.calibration)
    # By default what training measured, so that the numbers stand beside its own.
    names = metric_names(streams, config.metrics or list(manifest["metrics"].get("test") or ()))
    metrics = measure(predictions, streams, names, calibration=calibration)
    for name, value in metrics.items():
        show(f"{name:<22}{value:>14.6f}" if isinstance(value, float) else f"{name:<22}{value:>14,}")
    if state.is_main_process and config.output_dir is not None:
        _write(Path(config.output_dir), prediction_table(predictions, streams, calibration), {config.split: metrics})
    return metrics


def _manifest(bundle: str) -> dict[str, Any]:
    if not (Path(bundle) / MANIFEST).is_file():
        raise BundleError(f"bundle {bundle} has no {MANIFEST}; name the directory `bundle` that a training run left")
    return read_manifest(bundle)


def _check_output(directory: Path) -> None:
    """Before the minutes that scoring takes: the directory can be written, and is not that of a training run."""
    check_place(directory)
    if holds_run(directory):
        raise ConfigError(f"output_dir {directory} is a training run's, whose metrics.json would go; choose another")


def _write(directory: Path, predictions, metrics: dict[str, Any]) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        write_parquet(predictions, directory / "predictions.parquet")
        write_json(metrics, directory / "metrics.json")
    except OSError as error:
        raise ConfigError(f"output_dir {directory} cannot be written ({error.strerror}); choose another") from None
    print(f"written to {directory}: metrics.json, predictions.parquet")
