"""Training, as all five training recipes do it; they differ in the method's options alone."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
from accelerate import PartialState
from transformers import TrainingArguments, set_seed
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from llmrec_peft.checkpoints.loading import load_classifier
from llmrec_peft.config.schema import TrainRecipeConfig
from llmrec_peft.data.streams import StreamDataset
from llmrec_peft.errors import DataError
from llmrec_peft.models.base import load_config, load_tokenizer, resolve_base
from llmrec_peft.models.classifier import BehaviorClassifier
from llmrec_peft.models.requirements import check_positions
from llmrec_peft.runs.launch_checks import check_launch, common_facts, launch_of
from llmrec_peft.runs.outputs import Answers, Timings, answer, print_results, save_run
from llmrec_peft.runs.run_directory import Run, begin_run, prepare_run
from llmrec_peft.runs.split_streams import SplitStreams, build_splits, read_log
from llmrec_peft.runs.trainer_setup import build_loss, build_trainer, training_arguments
from llmrec_peft.training.distributed import check_ranks_equal, distributed_session, raise_on_all_ranks
from llmrec_peft.training.losses import BehaviorLoss


def train(config: TrainRecipeConfig) -> dict[str, Any]:
    """Train one adapter and leave its bundle, metrics, predictions and report in `config.output_dir`.

    Returns:
        What metrics.json holds.

    Raises:
        LLMRecError: with one line on what cannot be used, before an old run in the same place is touched.
    """
    with distributed_session() as state:
        return _train(config, state)


def _train(config: TrainRecipeConfig, state: PartialState) -> dict[str, Any]:
    show = print if state.is_main_process else (lambda *_, **__: None)
    timings, trust = Timings(), config.model.trust_remote_code

    # What is cheap to check comes first: settings, then the base's form, then the log, and its weights last.
    with raise_on_all_ranks():
        run = prepare_run(config)
    check_ranks_equal(common_facts(config), "start every process with the same settings and versions")
    with raise_on_all_ranks():
        arguments = training_arguments(run)
        check_launch(config, arguments)
    show(f"base: {config.model.base}", flush=True)
    with raise_on_all_ranks():
        if state.is_local_main_process:  # converts or downloads it, once
            resolve_base(config.model.base, config.model.gguf_file)
    with raise_on_all_ranks():
        base = resolve_base(config.model.base, config.model.gguf_file)
        check_positions(load_config(base, trust_remote_code=trust), config.domain.stream.max_length)
        show(f"reading {config.data.path}", flush=True)
        with timings.timed("reading"):
            log = read_log(config.data)
            show(f"log: {log!r}; making token streams of it", flush=True)
            streams = build_splits(log, config.domain, load_tokenizer(base, trust_remote_code=trust))
        for name, counts in streams.counts().items():
            show(f"{name}: {counts['targets']:,} targets of {counts['users']:,} users in {counts['streams']:,} streams")
        check_classes(streams.train)
        loss = build_loss(config.train, streams, len(config.domain.labels))
        fingerprint = streams.fingerprint(base, valid=config.train.eval_steps > 0, trust_remote_code=trust)
    check_ranks_equal(
        {"the data's and the base's fingerprint": fingerprint[:12]}, "give every process the same data and base"
    )

    show("loading the base's weights", flush=True)
    set_seed(config.train.seed)
    # ZeRO-3 splits the weights while it loads them: a process that failed could not tell the others, who wait for it.
    with nullcontext() if is_deepspeed_zero3_enabled() else raise_on_all_ranks():
        classifier = load_classifier(config.model, config.domain, config.method)
    show(classifier.summary())
    return fit(run, arguments, classifier, streams, loss, fingerprint, timings)


def fit(
    run: Run,
    arguments: TrainingArguments,
    classifier: BehaviorClassifier,
    streams: SplitStreams,
    loss: BehaviorLoss,
    fingerprint: str,
    timings: Timings,
    save: Callable[..., Any] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Answer, train, answer again, save and report: what every run ends with.

    Args:
        fingerprint: of all that the run trains on.
        save: as `save_run` takes it.
        options: of `build_trainer`.

    Returns:
        What metrics.json holds.
    """
    before: list[Answers] = []

    def answer_before() -> None:
        with timings.timed("answering before"):
            before.append(answer(trainer, streams, run, "before"))

    on_ready = answer_before if run.config.evaluation.before else None
    trainer = build_trainer(run, arguments, classifier, streams, loss, on_ready=on_ready, **options)
    begin_run(run, fingerprint, launch_of(arguments))
    with timings.timed("training, with validations and checkpoints", without="answering before"):
        trainer.train(resume_from_checkpoint=run.checkpoint)
    with timings.timed("answering after"):
        after = answer(trainer, streams, run, "after")
    if trainer.is_world_process_zero():
        print("saving, and writing the report", flush=True)
    metrics = save_run(run, trainer, streams, before[0] if before else None, after, timings, save)
    if trainer.is_world_process_zero():
        print_results(run, metrics)
    return metrics


def check_classes(train: StreamDataset) -> None:
    """Raise DataError where the training targets have one label alone: there is nothing to learn from them."""
    found = np.unique(train.target_labels[train.target_labels >= 0])
    if len(found) < 2:
        named = f"all labelled '{train.domain.labels[int(found[0])]}'" if len(found) else "none of them labelled"
        raise DataError(
            f"train of log {train.log.name!r} has {train.num_targets} targets, {named}, "
            "and training needs a second label; check the domain's label, "
            "give a longer training period, or set negatives"
        )
