"""Training, as all five training recipes do it; they differ in the method's options alone."""

from typing import Any

from accelerate import PartialState

from ..config import TrainRecipeConfig
from ..models.base import load_tokenizer, resolve_base
from ..models.classifier import load_classifier
from .outputs import Costs, answer, print_results, save_run
from .run import begin_run, prepare_run
from .streams import build_splits, read_log
from .training import build_trainer


def train(config: TrainRecipeConfig) -> dict[str, Any]:
    """Train one adapter and leave its bundle, metrics, predictions and report in `config.output_dir`.

    Returns:
        What metrics.json holds.

    Raises:
        LLMRecError: with one line on what cannot be used, before an old run in the same place is touched.
    """
    show = print if PartialState().is_main_process else (lambda *_: None)
    costs = Costs()

    # The log and its streams come first: what is wrong with them is known before a model is loaded.
    with costs.timed("reading"):
        log = read_log(config.data)
        show(f"log: {log!r}")
        tokenizer = load_tokenizer(
            resolve_base(config.model.base, config.model.gguf_file), trust_remote_code=config.model.trust_remote_code
        )
        streams = build_splits(log, config.domain, tokenizer)
    for name, counts in streams.counts().items():
        show(f"{name}: {counts['targets']:,} targets of {counts['users']:,} users in {counts['streams']:,} streams")

    run = prepare_run(config)
    classifier = load_classifier(config.model, config.domain, config.method)
    show(classifier.summary())
    trainer = build_trainer(run, classifier, streams)
    begin_run(run, streams.fingerprint())

    before = None
    if config.evaluation.before:
        with costs.timed("answering before"):
            before = answer(trainer, streams, run, "before")

    with costs.timed("training"):
        trainer.train(resume_from_checkpoint=run.checkpoint)

    with costs.timed("answering after"):
        after = answer(trainer, streams, run, "after")

    metrics = save_run(run, trainer, streams, before, after, costs)
    if PartialState().is_main_process:
        print_results(run, metrics)
    return metrics
