"""Training, as all five training recipes do it; they differ in the method's options alone."""

from typing import Any

import numpy as np
from accelerate import PartialState
from transformers import set_seed

from ..config import TrainRecipeConfig
from ..data.streams import StreamDataset
from ..errors import DataError
from ..models.base import check_positions, load_config, load_tokenizer, resolve_base
from ..models.classifier import load_classifier
from .outputs import Costs, answer, print_results, save_run
from .run import begin_run, prepare_run
from .streams import build_splits, read_log
from .training import build_loss, build_trainer


def train(config: TrainRecipeConfig) -> dict[str, Any]:
    """Train one adapter and leave its bundle, metrics, predictions and report in `config.output_dir`.

    Returns:
        What metrics.json holds.

    Raises:
        LLMRecError: with one line on what cannot be used, before an old run in the same place is touched.
    """
    show = print if PartialState().is_main_process else (lambda *_, **__: None)
    costs, trust = Costs(), config.model.trust_remote_code

    # What is cheap to check comes first: settings, then the base's form, then the log, and its weights last.
    run = prepare_run(config)
    show(f"base: {config.model.base}", flush=True)
    base = resolve_base(config.model.base, config.model.gguf_file)
    check_positions(load_config(base, trust_remote_code=trust), config.domain.stream.max_length)
    show(f"reading {config.data.path}", flush=True)
    with costs.timed("reading"):
        log = read_log(config.data)
        show(f"log: {log!r}; making token streams of it", flush=True)
        streams = build_splits(log, config.domain, load_tokenizer(base, trust_remote_code=trust))
    for name, counts in streams.counts().items():
        show(f"{name}: {counts['targets']:,} targets of {counts['users']:,} users in {counts['streams']:,} streams")
    check_classes(streams.train)
    loss = build_loss(config.train, streams, len(config.domain.labels))

    show("loading the base's weights", flush=True)
    set_seed(config.train.seed)
    classifier = load_classifier(config.model, config.domain, config.method)
    show(classifier.summary())
    trainer = build_trainer(run, classifier, streams, loss)
    begin_run(run, streams.fingerprint(base, valid=config.train.eval_steps > 0, trust_remote_code=trust))

    before = None
    if config.evaluation.before:
        with costs.timed("answering before"):
            before = answer(trainer, streams, run, "before")

    with costs.timed("training, with validations and checkpoints"):
        trainer.train(resume_from_checkpoint=run.checkpoint)

    with costs.timed("answering after"):
        after = answer(trainer, streams, run, "after")

    show("saving, and writing the report", flush=True)
    metrics = save_run(run, trainer, streams, before, after, costs)
    if PartialState().is_main_process:
        print_results(run, metrics)
    return metrics


def check_classes(train: StreamDataset) -> None:
    """Raise DataError where the training targets have one label alone: there is nothing to learn from them."""
    found = np.unique(train.target_labels)
    if len(found) < 2:
        raise DataError(
            f"train of log {train.log.name!r} has {train.num_targets} targets, all labelled "
            f"'{train.domain.labels[int(found[0])]}', and training needs a second label; check the domain's label, "
            "give a longer training period, or set negatives"
        )
