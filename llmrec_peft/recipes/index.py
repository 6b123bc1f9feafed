"""Fitting a retrieval index and its fusion with a bundle's predictions, and measuring each system."""

from pathlib import Path
from typing import Any

import numpy as np

from llmrec_peft.checkpoints.manifest import MANIFEST
from llmrec_peft.checkpoints.merged import load_answering, read_answering
from llmrec_peft.config.schema import IndexConfig
from llmrec_peft.data.collator import StreamCollator
from llmrec_peft.data.domain import Domain
from llmrec_peft.evaluation.calibration import Calibration
from llmrec_peft.models.base import check_positions
from llmrec_peft.models.predict import predict
from llmrec_peft.retrieval.histories import feedback
from llmrec_peft.retrieval.retrieval_index import DIRECTORY, RetrievalIndex
from llmrec_peft.runs.console import main_printer
from llmrec_peft.runs.fused_systems import FusionTargets, compare_systems, fit_fusion, predict_systems
from llmrec_peft.runs.index_results import check_index_output, index_metrics, prediction_columns, print_comparison
from llmrec_peft.runs.result_files import write_results
from llmrec_peft.runs.split_streams import check_split, limit_targets, read_log, split_by_domain, streams_for_split
from llmrec_peft.scoring.scorer import adapter_of
from llmrec_peft.training.distributed import distributed_session, raise_on_all_ranks


def index(config: IndexConfig) -> dict[str, Any]:
    """Fit a retrieval index on the training rows and a fusion on validation, measure on test, and save both.

    With `refit`, the saved index is fitted again on all rows once everything is measured; the fusion stays the same.

    Returns:
        What goes into metrics.json; empty on processes other than the first.

    Raises:
        LLMRecError: with one line on what cannot be used.
    """
    with distributed_session() as state:
        show = main_printer(state)
        with raise_on_all_ranks():
            # Settings.
            manifest = read_answering(config.bundle)
            domain = Domain.of_manifest(manifest["domain"], source=f"{config.bundle}/{MANIFEST}")
            directory = Path(config.retrieval or Path(config.bundle) / DIRECTORY)
            check_index_output(config, directory)

            # Log, and its splits.
            show(f"reading {config.data.path}")
            log = read_log(config.data)
            splits = split_by_domain(log, domain)
            for name in ("valid", "test"):
                check_split(splits, name, manifest["counts"].get("split"))

            # Retrieval index: collaborative models of the training rows, fitted by one process.
            row_feedback = feedback(log, domain)
            fitted = None
            if state.is_main_process:
                show("fitting a retrieval index on the training rows")
                timed = domain.split.by == "time"
                fitted = RetrievalIndex.fit(log, splits.train.rows, row_feedback, seed=config.seed, timed=timed)

            # Classifier.
            show(f"loading {config.bundle}")
            bundle = load_answering(
                config.bundle, base=config.base, dtype=config.dtype, attn=config.attn,
                trust_remote_code=config.trust_remote_code,
            )  # fmt: skip
            check_positions(bundle.classifier.config, domain.stream.max_length)
            model = bundle.classifier.to(state.device)

            # Streams of validation and test.
            valid_streams = streams_for_split(splits, "valid", domain, bundle.tokenizer)
            test_streams = streams_for_split(splits, "test", domain, bundle.tokenizer)
            valid_targets = limit_targets(valid_streams, config.valid_targets, model)
            test_targets = limit_targets(test_streams, config.test_targets, model)
            collator = StreamCollator(bundle.tokenizer.pad_token_id, config.batch_tokens, mask=model.encoder)

        # Predict.
        valid_predictions, test_predictions = (
            predict(model, part, collator, batch_tokens=config.batch_tokens, processes=state, description=name)
            for name, part in (("valid", valid_targets), ("test", test_targets))
        )
        with raise_on_all_ranks():
            if fitted is None:  # not the main process
                return {}

            # Fusion, fitted on validation.
            calibration = Calibration.from_dict(bundle.calibration)
            valid = FusionTargets.of(valid_streams, valid_predictions, calibration, fitted, row_feedback)
            test = FusionTargets.of(test_streams, test_predictions, calibration, fitted, row_feedback)
            fusion = fit_fusion(valid, valid.logits, valid.features, config.seed)

            # Measure the classifier, the collaborative models and the fusion on test.
            systems = predict_systems(valid, test, fusion, config.seed)
            values, gaps = compare_systems(test, systems, samples=config.bootstrap, seed=config.seed)

            # Refit the saved models on all rows, so that serving knows recent items.
            saved = fitted
            if config.refit:
                show("fitting again, on all rows, for serving")
                rows = np.concatenate([splits[name].rows for name in ("train", "valid", "test")])
                saved = fitted.refit(log, rows, row_feedback)

            # Save the index and the fusion, then report.
            saved.save(directory, fusion=fusion, adapter=adapter_of(manifest))
            found = index_metrics(valid, test, values, gaps, fusion, measured=fitted.note, saved=saved.note)
            print_comparison(found, values, gaps, fusion, valid)
            names = f"{', '.join(saved.models)}{'' if fusion.strength is None else ' and the fusion'}"
            print(f"saved in {directory}: {names}")
            if config.output_dir is not None:
                write_results(Path(config.output_dir), found, {"predictions": prediction_columns(test, systems)})
            return found
