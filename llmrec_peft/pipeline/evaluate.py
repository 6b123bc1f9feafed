"""Scoring a trained bundle again."""

from pathlib import Path
from typing import Any

from accelerate import Accelerator

from ..config import EvaluateConfig
from ..data.collator import StreamCollator
from ..data.domain import Domain
from ..data.streams import IndependentPrompts
from ..evaluation.calibration import Calibration
from ..models.base import check_positions
from ..models.bundle import load_bundle
from ..models.predict import predict
from .answers import measure, prediction_table
from .outputs import write_predictions
from .run import write_json
from .streams import build_splits, read_log


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Score a bundle on one split of a log, by streams or by independent prompts.

    Returns:
        Metrics by name.

    Raises:
        LLMRecError: with one line on what cannot be used.
    """
    accelerator = Accelerator()
    log = read_log(config.data)
    bundle = load_bundle(config.bundle, base=config.base)
    domain = Domain.from_dict(bundle.domain, source=f"{config.bundle}/behavior.json")
    check_positions(bundle.classifier.config, domain.stream.max_length)
    streams = build_splits(log, domain, bundle.tokenizer)[config.split]
    part = streams.limited(config.limit)
    if config.mode == "independent" or bundle.classifier.encoder:
        part = IndependentPrompts(part)
    model = bundle.classifier.to(accelerator.device)
    collator = StreamCollator(bundle.tokenizer.pad_token_id, config.batch_tokens, mask=model.encoder)
    predictions = predict(
        model, part, collator, batch_tokens=config.batch_tokens, accelerator=accelerator,
        description=f"{config.split}, {config.mode}",
    )  # fmt: skip
    calibration = Calibration.from_dict(bundle.calibration)
    metrics = measure(predictions, streams, calibration=calibration, names=config.metrics)
    if accelerator.is_main_process:
        for name, value in metrics.items():
            print(f"{name:<22}{value:>14.6f}" if isinstance(value, float) else f"{name:<22}{value:>14,}")
        if config.output_dir is not None:
            directory = Path(config.output_dir)
            directory.mkdir(parents=True, exist_ok=True)
            write_predictions(directory / "predictions.parquet", [prediction_table(predictions, streams, calibration)])
            write_json(directory / "metrics.json", {config.split: metrics})
            print(f"written to {directory}: metrics.json, predictions.parquet")
    return metrics
