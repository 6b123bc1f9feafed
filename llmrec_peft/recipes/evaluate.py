"""Scoring a trained bundle, or a model merged from it, again."""

from pathlib import Path
from typing import Any

from llmrec_peft.checkpoints.loading import LoadOptions, load_trained
from llmrec_peft.checkpoints.manifest import read_manifest
from llmrec_peft.checkpoints.manifest_schema import MANIFEST
from llmrec_peft.config.schema import EvaluateConfig
from llmrec_peft.data.collator import StreamCollator
from llmrec_peft.data.domain import Domain
from llmrec_peft.data.streams import IndependentPrompts, Streams
from llmrec_peft.errors import ModelError
from llmrec_peft.evaluation.calibration import Calibration
from llmrec_peft.evaluation.prediction_table import prediction_table
from llmrec_peft.evaluation.stream_metrics import choose_metrics, measure
from llmrec_peft.models.predict import predict
from llmrec_peft.models.requirements import check_positions
from llmrec_peft.runs.candidate_sets import CandidateSets
from llmrec_peft.runs.console import main_printer
from llmrec_peft.runs.ranking import check_ranking, rank
from llmrec_peft.runs.result_files import check_results, write_results
from llmrec_peft.runs.split_streams import check_split, read_log, split_by_domain, streams_for_split
from llmrec_peft.training.distributed import distributed_session, raise_on_all_ranks


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Score a bundle or a merged model on one split of a log, by streams or by independent prompts.

    Returns:
        Metrics by name; under "ranking" the result of `rank`, if the configuration enables it.

    Raises:
        LLMRecError: with one line on what cannot be used.
    """
    with distributed_session() as state:
        show = main_printer(state)
        with raise_on_all_ranks():
            # Settings.
            manifest = read_manifest(config.bundle)
            domain = Domain.of_manifest(manifest["domain"], source=f"{config.bundle}/{MANIFEST}")
            if config.output_dir is not None:
                inputs = {"bundle": config.bundle, "data.path": config.data.path, "base": config.base}
                check_results(Path(config.output_dir), inputs | {"ranking.retrieval": config.ranking.retrieval})

            # Log, its split, and the candidate sets of the ranking.
            show(f"reading {config.data.path}")
            splits = split_by_domain(read_log(config.data), domain)
            check_split(splits, config.split, manifest["counts"].get("split"))
            sets = None
            if config.ranking.candidates is not None:
                check_ranking(config)
                sets = CandidateSets(splits, config.split, domain, config.ranking)

            # Classifier.
            show(f"loading {config.bundle}")
            loading = LoadOptions(config.base, config.dtype, config.attn, config.trust_remote_code)
            bundle = load_trained(config.bundle, loading)
            check_positions(bundle.classifier.config, domain.stream.max_length)
            model = bundle.classifier.to(state.device)
            if sets is not None and model.encoder:
                raise ModelError(
                    f"{config.bundle} is a bidirectional encoder, so candidates cannot share a history; leave ranking "
                    "out"
                )

            # Streams.
            streams = streams_for_split(splits, config.split, domain, bundle.tokenizer)
            limited = streams.limited(config.limit)
            alone = config.mode == "independent" or model.encoder
            targets: Streams = IndependentPrompts(limited) if alone else limited
            collator = StreamCollator(bundle.tokenizer.pad_token_id, config.batch_tokens, mask=model.encoder)

        # Predict.
        predictions = predict(
            model, targets, collator, batch_tokens=config.batch_tokens, processes=state,
            description=f"{config.split}, {config.mode}",
        )  # fmt: skip

        # Measure: by default the metrics that training wrote into the bundle, so that the numbers can be compared.
        calibration = Calibration.from_dict(bundle.calibration)
        names = choose_metrics(streams, config.metrics or list(manifest["metrics"].get("test") or ()))
        metrics = measure(predictions, streams, names, calibration=calibration)
        for name, value in metrics.items():
            show(f"{name:<22}{value:>14.6f}" if isinstance(value, float) else f"{name:<22}{value:>14,}")
        found: dict[str, Any] = {config.split: metrics}
        tables = {"predictions": prediction_table(predictions, streams, calibration)}

        # Rank. This loads the bundle again, as it is served.
        if sets is not None:
            del bundle, model
            found["ranking"], tables["ranking"] = rank(config, sets, state)

        # Save.
        if state.is_main_process and config.output_dir is not None:
            write_results(Path(config.output_dir), found, tables)
        return {**metrics, **({"ranking": found["ranking"]} if sets is not None else {})}
