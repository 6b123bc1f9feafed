"""The training recipe. Its five variants differ only in the options of the tuning method."""

from contextlib import nullcontext
from typing import Any

from transformers import set_seed
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from llmrec_peft.checkpoints.bundle import save_bundle
from llmrec_peft.checkpoints.loading import load_classifier
from llmrec_peft.config.schema import TrainRecipeConfig
from llmrec_peft.models.base import load_config, load_tokenizer, resolve_base
from llmrec_peft.models.requirements import check_positions
from llmrec_peft.runs.console import main_printer
from llmrec_peft.runs.launch_checks import check_launch, describe_launch
from llmrec_peft.runs.run_directory import begin_run, prepare_run
from llmrec_peft.runs.run_report import print_results, report_run
from llmrec_peft.runs.run_results import measure_run
from llmrec_peft.runs.settings import shared_settings
from llmrec_peft.runs.split_predictions import SplitPredictions, predict_splits
from llmrec_peft.runs.split_streams import build_split_streams, check_classes, read_log
from llmrec_peft.runs.timings import Timings
from llmrec_peft.runs.trainer_setup import build_loss, build_trainer, training_arguments
from llmrec_peft.training.distributed import check_ranks_equal, distributed_session, raise_on_all_ranks


def train(config: TrainRecipeConfig) -> dict[str, Any]:
    """Train one adapter, and leave its bundle, metrics, predictions and report in `config.output_dir`.

    An error on one process ends all of them (`raise_on_all_ranks`), so that none waits for one that has ended.

    Returns:
        What metrics.json holds.

    Raises:
        LLMRecError: with one line on what cannot be used, before an old run in the same place is touched.
    """
    with distributed_session() as state:
        show, timings, trust = main_printer(state), Timings(), config.model.trust_remote_code

        # Settings: the cheapest checks come first, and the base's weights last.
        with raise_on_all_ranks():
            run = prepare_run(config)
        check_ranks_equal(shared_settings(config), "start every process with the same settings and versions")
        with raise_on_all_ranks():
            arguments = training_arguments(run)
            check_launch(config, arguments)

        # Base: one process of each machine downloads or converts it.
        show(f"base: {config.model.base}")
        with raise_on_all_ranks():
            if state.is_local_main_process:
                resolve_base(config.model.base, config.model.gguf_file)
        with raise_on_all_ranks():
            base = resolve_base(config.model.base, config.model.gguf_file)
            check_positions(load_config(base, trust_remote_code=trust), config.domain.stream.max_length)
            tokenizer = load_tokenizer(base, trust_remote_code=trust)

        # Log.
        show(f"reading {config.data.path}")
        with raise_on_all_ranks(), timings.timed("reading"):
            log = read_log(config.data)

        # Streams of the training, validation and test split.
        show(f"log: {log!r}; making token streams of it")
        with raise_on_all_ranks():
            with timings.timed("reading"):
                streams = build_split_streams(log, config.domain, tokenizer)
            for name, count in streams.counts().items():
                show(
                    f"{name}: {count['targets']:,} targets of {count['users']:,} users in {count['streams']:,} streams"
                )
            check_classes(streams.train)
            loss = build_loss(config.train, streams, len(config.domain.labels))
            fingerprint = streams.fingerprint(base, valid=config.train.eval_steps > 0, trust_remote_code=trust)
        check_ranks_equal(
            {"the data's and the base's fingerprint": fingerprint[:12]}, "give every process the same data and base"
        )

        # Classifier: the base with an untrained adapter and head.
        show("loading the base's weights")
        set_seed(config.train.seed)
        # ZeRO-3 splits the weights while they load, so the other processes wait for one that fails in any case.
        with nullcontext() if is_deepspeed_zero3_enabled() else raise_on_all_ranks():
            classifier = load_classifier(config.model, config.domain, config.method)
        show(classifier.summary())

        # Trainer.
        trainer = build_trainer(run, arguments, classifier, streams, loss)

        # Before: predictions of the untrained classifier. `trainer.train` makes them once the weights are on their
        # devices, split over the processes, and before it loads a checkpoint.
        before: list[SplitPredictions] = []

        def predict_before() -> None:
            with timings.timed("predicting before"):
                before.append(predict_splits(trainer, streams, run, "before"))

        trainer.on_ready = predict_before if config.evaluation.before else None

        # Train. The output directory is first written here.
        begin_run(run, fingerprint, describe_launch(arguments))
        with timings.timed("training, with validations and checkpoints", without="predicting before"):
            trainer.train(resume_from_checkpoint=run.checkpoint)

        # After: predictions of the trained classifier, calibrated on validation, and the metrics of both.
        with timings.timed("predicting after"):
            after = predict_splits(trainer, streams, run, "after")
        show("saving, and writing the report")
        results = measure_run(run, trainer, streams, before[0] if before else None, after, timings)

        # Save: the bundle comes first, so that no failure of the report loses it.
        tensors = trainer.model.trainable_state_dict()  # gathered from all processes
        if state.is_main_process:
            record, domain = results.training_record(run, streams), config.domain.to_dict()
            model = trainer.model
            save_bundle(run.path("bundle"), model, model.tokenizer, domain, record, state=tensors)

        # Report.
        metrics = report_run(run, trainer, streams, results)
        if state.is_main_process:
            print_results(run, metrics)
        return metrics
