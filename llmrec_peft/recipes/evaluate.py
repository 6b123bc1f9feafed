"""Scoring a trained bundle, or a model merged from it, again."""

from pathlib import Path
from typing import Any

from accelerate import PartialState

from llmrec_peft.checkpoints.loading import LoadOptions, load_trained
from llmrec_peft.checkpoints.manifest import read_manifest
from llmrec_peft.checkpoints.manifest_schema import MANIFEST
from llmrec_peft.config.schema import EvaluateConfig
from llmrec_peft.data.collator import StreamCollator
from llmrec_peft.data.domain import Domain
from llmrec_peft.data.streams import IndependentPrompts
from llmrec_peft.errors import ModelError
from llmrec_peft.evaluation.calibration import Calibration
from llmrec_peft.evaluation.predictions import measure, metric_names, prediction_table
from llmrec_peft.models.predict import predict
from llmrec_peft.models.requirements import check_positions
from llmrec_peft.recipes.ranking import Lists, check_ranking, rank
from llmrec_peft.runs.results import check_results, write_results
from llmrec_peft.runs.split_streams import check_split, read_log, split_of, streams_of
from llmrec_peft.training.distributed import distributed_session, raise_on_all_ranks


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Score a bundle or a merged model on one split of a log, by streams or by independent prompts.

    Returns:
        Metrics by name; under "ranking" what `rank` gives, if the configuration asks for it.

    Raises:
        LLMRecError: with one line on what cannot be used.
    """
    with distributed_session() as state:
        return _evaluate(config, state)


def _evaluate(config: EvaluateConfig, state: PartialState) -> dict[str, Any]:
    show = print if state.is_main_process else (lambda *_, **__: None)
    with raise_on_all_ranks():
        manifest = read_manifest(config.bundle)
        domain = Domain.of_manifest(manifest["domain"], source=f"{config.bundle}/{MANIFEST}")
        if config.output_dir is not None:
            inputs = {"bundle": config.bundle, "data.path": config.data.path, "base": config.base}
            check_results(Path(config.output_dir), inputs | {"ranking.retrieval": config.ranking.retrieval})
        show(f"reading {config.data.path}", flush=True)
        splits = split_of(read_log(config.data), domain)
        check_split(splits, config.split, manifest["counts"].get("split"))
        wanted = config.ranking.candidates is not None
        if wanted:
            check_ranking(config)
        lists = Lists(splits, config.split, domain, config.ranking) if wanted else None
        show(f"loading {config.bundle}", flush=True)
        loading = LoadOptions(config.base, config.dtype, config.attn, config.trust_remote_code)
        bundle = load_trained(config.bundle, loading)
        check_positions(bundle.classifier.config, domain.stream.max_length)
        streams = streams_of(splits, config.split, domain, bundle.tokenizer)
        part = streams.limited(config.limit)
        if config.mode == "independent" or bundle.classifier.encoder:
            part = IndependentPrompts(part)
        model = bundle.classifier.to(state.device)
        if wanted and model.encoder:
            raise ModelError(
                f"{config.bundle} reads both ways, so candidates cannot share a history; leave ranking out"
            )
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
    found, tables = {config.split: metrics}, {"predictions": prediction_table(predictions, streams, calibration)}
    if lists is not None:
        del bundle, model  # ranking loads the bundle as it is served
        found["ranking"], tables["ranking"] = rank(config, lists, state)
        metrics = metrics | {"ranking": found["ranking"]}
    if state.is_main_process and config.output_dir is not None:
        write_results(Path(config.output_dir), found, tables)
    return metrics
