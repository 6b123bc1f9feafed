"""Distilling a teacher into a student: the whole recipe, top to bottom, in `_distill`."""

import tempfile
from pathlib import Path
from typing import Any

import yaml
from accelerate import PartialState
from transformers import set_seed

from llmrec_peft.checkpoints.bundle import Bundle
from llmrec_peft.checkpoints.checksum import digest
from llmrec_peft.checkpoints.loading import load_classifier
from llmrec_peft.config.schema import DistillConfig, read_config
from llmrec_peft.data.log import BehaviorLog, Splits
from llmrec_peft.distillation.content_embedding import add_teacher_content
from llmrec_peft.distillation.distill_options import TeacherOutputsOptions
from llmrec_peft.distillation.distill_trainer import DistillTrainer, check_not_sharded
from llmrec_peft.distillation.prediction_shards import check_cache
from llmrec_peft.distillation.student_checkpoint import StudentMetadata, save_student
from llmrec_peft.distillation.student_plan import StudentPlan, plan_student
from llmrec_peft.distillation.teacher import Teacher
from llmrec_peft.distillation.teacher_item_embeddings import cached_item_embeddings, check_item_texts
from llmrec_peft.distillation.teacher_outputs import TeacherOutputs
from llmrec_peft.distillation.teacher_predictions import teacher_predictions
from llmrec_peft.errors import ConfigError
from llmrec_peft.files import scratch_directory, writing
from llmrec_peft.models.base import load_tokenizer
from llmrec_peft.models.classifier import BehaviorClassifier
from llmrec_peft.runs.console import main_printer
from llmrec_peft.runs.launch_checks import check_launch, describe_launch
from llmrec_peft.runs.output_paths import check_output_directory
from llmrec_peft.runs.run_directory import begin_run, prepare_run
from llmrec_peft.runs.run_report import print_results, report_run
from llmrec_peft.runs.run_results import measure_run
from llmrec_peft.runs.settings import flatten, shared_settings
from llmrec_peft.runs.split_predictions import SplitPredictions, predict_splits
from llmrec_peft.runs.split_streams import (
    SplitStreams,
    build_split_streams,
    check_classes,
    check_split,
    read_log,
    split_by_domain,
    streams_for_split,
)
from llmrec_peft.runs.timings import Timings
from llmrec_peft.runs.trainer_setup import build_loss, build_trainer, training_arguments
from llmrec_peft.training.distributed import check_ranks_equal, distributed_session, raise_on_all_ranks


def distill(config: DistillConfig | None = None, **options: Any) -> dict[str, Any]:
    """Train a student and leave it in `student` of `config.output_dir`, with metrics, predictions and a report.

    Args:
        config: the configuration.
        options: keys of the configuration, instead of `config`, such as `teacher="out/bundle", data={"path": "DIR"}`; a
            key of a section may be written as on the command line, such as `**{"train.max_steps": 100}`.

    Returns:
        The contents of metrics.json.

    Raises:
        LLMRecError: in one line, before an old run in the same place is touched.
    """
    if config is None:
        flags = flatten(options)
        arguments = [
            part for key, value in flags.items() for part in (f"--{key}", yaml.safe_dump(value).split("\n")[0])
        ]
        config = read_config(DistillConfig, arguments)
    elif options:
        raise ConfigError(f"distill takes a configuration or its keys, not both; leave {min(options)} out")
    with distributed_session() as state:
        return _distill(config, state)


def _distill(config: DistillConfig, state: PartialState) -> dict[str, Any]:
    show, timings, options = main_printer(state), Timings(), config.teacher_outputs

    # Settings: all checks that need no log come first.
    with raise_on_all_ranks():
        teacher = Teacher.open(config.teacher, config.base, config.trust_remote_code)
        domain = teacher.domain(unlabelled=options.unlabelled)
        run = prepare_run(config)
        arguments = training_arguments(run)
        check_launch(config, arguments)
        check_not_sharded(arguments)
        plan = plan_student(teacher, domain, config.student, config.loss)
        cache = Path(options.path or run.path("teacher"))
        check_output_directory(
            cache, {"data.path": config.data.path, "teacher": config.teacher}, what="teacher_outputs.path"
        )
        if config.loss.needs_teacher:
            check_cache(cache, teacher.manifest, plan.teacher_layers)
    check_ranks_equal(shared_settings(config), "start every process with the same settings and versions")

    # Log.
    with raise_on_all_ranks(), timings.timed("reading"):
        show(f"reading {config.data.path}")
        log = read_log(config.data)
        splits = split_by_domain(log, plan.domain)
        for name in ("valid", "test"):
            check_split(splits, name, teacher.manifest["counts"].get("split"))
        if plan.reads_content:
            check_item_texts(plan.teacher_domain, log)

    with scratch_directory(Path(tempfile.gettempdir(), "llmrec-student")) as start:
        # The student's streams, before the teacher runs, which takes the longest: they find what is wrong with the log.
        with raise_on_all_ranks(), writing(start, "the student's start"):
            source = plan.prepare_source(log.items.column("item_id"), config.train.seed, start)
            tokenizer = load_tokenizer(source, trust_remote_code=config.trust_remote_code)
            streams = build_split_streams(log, plan.domain, tokenizer, unlabelled=options.unlabelled)
            if config.loss.hard:
                check_classes(streams.train)
            loss = build_loss(config.train, streams, len(plan.domain.labels))
        for name, counts in streams.counts().items():
            show(f"{name}: {counts['targets']:,} targets of {counts['users']:,} users in {counts['streams']:,} streams")

        # The teacher's outputs, and a shallow student's weights.
        outputs = TeacherOutputs()
        if plan.loads_teacher:
            show(f"loading the teacher {config.teacher}")
            with raise_on_all_ranks():
                loaded = teacher.load(state.device)
            with timings.timed("running the teacher"), writing(cache, "teacher_outputs.path"):
                outputs = _run_teacher(options, plan, loaded, log, splits, cache, state)
            with raise_on_all_ranks(), writing(start, "the student's start"):
                if plan.kept_layers is not None:
                    source = plan.write_layers(loaded.classifier, start)
                del loaded  # its memory, before the student's weights are loaded

        # The student.
        with raise_on_all_ranks():
            classifier, fingerprint = _load_student(config, plan, streams, outputs, source)
        show(classifier.summary())
        metadata = StudentMetadata(config.student, config.loss, outputs.describe(teacher.manifest), plan.kept_layers)

        # Trainer: on all windows, or on those with predictions.
        only = outputs.predictions if options.only else None
        trainer = build_trainer(
            run, arguments, classifier, streams, loss, trainer_class=DistillTrainer,
            train=streams.train if only is None else only.windows_of(streams.train),
            teacher=outputs.predictions, distill_loss=config.loss, layers=plan.student_layers,
        )  # fmt: skip

        # Before: predictions of the untrained student.
        before: list[SplitPredictions] = []

        def predict_before() -> None:
            with timings.timed("predicting before"):
                before.append(predict_splits(trainer, streams, run, "before"))

        trainer.on_ready = predict_before if config.evaluation.before else None

        # Train. The output directory is first written here.
        begin_run(run, fingerprint, describe_launch(arguments))
        with timings.timed("training, with validations and checkpoints", without="predicting before"):
            trainer.train(resume_from_checkpoint=run.checkpoint)

        # After: predictions of the trained student, calibrated on validation, and the metrics of both.
        with timings.timed("predicting after"):
            after = predict_splits(trainer, streams, run, "after")
        show("saving, and writing the report")
        results = measure_run(run, trainer, streams, before[0] if before else None, after, timings)

        # Save: the student comes first, so that no failure of the report loses it.
        if state.is_main_process:
            record = results.training_record(run, streams)
            save_student(run.path("student"), trainer.model, plan.domain.to_dict(), metadata, record)

        # Report.
        metrics = report_run(run, trainer, streams, results)
        if state.is_main_process:
            print_results(run, metrics)
        return metrics


def _run_teacher(
    options: TeacherOutputsOptions,
    plan: StudentPlan,
    teacher: Bundle,
    log: BehaviorLog,
    splits: Splits,
    cache: Path,
    state: PartialState,
) -> TeacherOutputs:
    """The teacher's predictions for training targets and its item embeddings, as far as the student needs them."""
    domain, predictions, embeddings = plan.teacher_domain, None, None
    if plan.loss.needs_teacher:
        streams = streams_for_split(splits, "train", domain, teacher.tokenizer, unlabelled=options.unlabelled)
        predictions = teacher_predictions(
            teacher, streams.limited(options.targets), cache, layers=plan.teacher_layers,
            batch_tokens=options.batch_tokens, processes=state,
        )  # fmt: skip
    if plan.reads_content:
        embeddings = cached_item_embeddings(teacher, domain, log, cache, batch_tokens=options.batch_tokens)
    return TeacherOutputs(predictions, embeddings)


def _load_student(
    config: DistillConfig, plan: StudentPlan, streams: SplitStreams, outputs: TeacherOutputs, source: str
) -> tuple[BehaviorClassifier, str]:
    """The student before training, and the fingerprint of all that it trains on."""
    if outputs.predictions is not None:
        outputs.predictions.check_targets(streams.train)
    fingerprint = streams.fingerprint(source, valid=config.train.eval_steps > 0)
    fingerprint = digest({"streams": fingerprint, "teacher": digest(plan.teacher.manifest)})
    set_seed(config.train.seed)
    classifier = load_classifier(
        source, plan.domain, "full", attn=plan.attention, trust_remote_code=config.trust_remote_code
    )
    if outputs.item_embeddings is not None:
        rows = streams.splits.train.rows
        add_teacher_content(classifier, outputs.item_embeddings, streams.train, rows, plan.domain, config.student)
    return classifier, fingerprint
