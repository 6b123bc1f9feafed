"""From a configuration to a trainer, its arguments, its loss and its callbacks."""

from typing import Any

import torch
from transformers import TrainerCallback, TrainingArguments

from llmrec_peft.config.schema import TrainConfig
from llmrec_peft.data.streams import IndependentPrompts, StreamDataset, StreamSubset
from llmrec_peft.evaluation.metrics import higher_is_better
from llmrec_peft.evaluation.stream_metrics import choose_metrics, measure
from llmrec_peft.models.classifier import BehaviorClassifier
from llmrec_peft.runs.run_directory import Run
from llmrec_peft.runs.split_streams import SplitStreams, limit_targets
from llmrec_peft.training.callbacks import EvaluateLastStep, StopEarly
from llmrec_peft.training.distributed import device_arguments, partial_state
from llmrec_peft.training.losses import BehaviorLoss, balanced_weights
from llmrec_peft.training.trainer import BehaviorTrainer

OPTIMIZERS = {"adamw": "adamw_torch", "sgd": "sgd", "adamw_8bit": "adamw_bnb_8bit"}
SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}


def training_arguments(run: Run) -> TrainingArguments:
    """Transformers' arguments of a run. Make them before the base is loaded: ZeRO-3 splits it while it loads."""
    train, selects = run.config.train, run.config.train.eval_steps > 0
    save_steps = train.eval_steps or train.save_steps
    return TrainingArguments(
        output_dir=str(run.path("checkpoints")),
        max_steps=train.max_steps,
        num_train_epochs=train.epochs,
        per_device_train_batch_size=train.batch_size // partial_state().num_processes,
        learning_rate=train.learning_rate,
        weight_decay=train.weight_decay,
        optim=OPTIMIZERS[train.optimizer],
        lr_scheduler_type=SCHEDULES[train.schedule],
        warmup_steps=train.warmup,
        max_grad_norm=train.max_grad_norm,
        eval_strategy="steps" if selects else "no",
        eval_steps=train.eval_steps or None,
        save_strategy="steps" if save_steps else "no",
        save_steps=save_steps or 500,
        save_total_limit=2,
        load_best_model_at_end=selects,
        metric_for_best_model=train.select_metric if selects else None,
        greater_is_better=higher_is_better(train.select_metric) if selects else None,
        logging_steps=train.logging_steps,
        report_to=train.report_to,
        seed=train.seed,
        data_seed=train.seed,
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,
        restore_callback_states_from_checkpoint=True,
        **device_arguments(),
    )


def build_trainer(
    run: Run,
    arguments: TrainingArguments,
    classifier: BehaviorClassifier,
    streams: SplitStreams,
    loss: BehaviorLoss,
    *,
    trainer_class: type[BehaviorTrainer] = BehaviorTrainer,
    train: StreamDataset | StreamSubset | None = None,
    **options: Any,
) -> BehaviorTrainer:
    """Make a trainer.

    Args:
        run: the run, with its settings.
        arguments: returned by `training_arguments`.
        classifier: the classifier to train.
        streams: `train` is trained on, a part of `valid` selects the checkpoint.
        loss: returned by `build_loss`.
        trainer_class: takes `options` beside the arguments of `BehaviorTrainer`.
        train: the streams to train on in place of all of `streams.train`.
        options: further arguments of the class.
    """
    config = run.config
    names = choose_metrics(streams.train, config.evaluation.metrics)
    if config.train.select_metric not in names:
        names.append(config.train.select_metric)
    valid = limit_targets(streams.valid, config.evaluation.valid_targets, classifier)
    train = streams.train if train is None else train
    callbacks: list[TrainerCallback] = [EvaluateLastStep()] if config.train.eval_steps else []
    if config.train.early_stopping:
        callbacks.append(StopEarly(config.train.early_stopping))
    return trainer_class(
        classifier,
        arguments,
        IndependentPrompts(train) if classifier.encoder else train,
        valid,
        tokenizer=classifier.tokenizer,
        micro_tokens=config.train.micro_tokens,
        eval_tokens=config.evaluation.batch_tokens,
        loss=loss,
        compute_metrics=lambda predictions: measure(predictions, streams.valid, names),
        callbacks=callbacks,
        **options,
    )


def build_loss(train: TrainConfig, streams: SplitStreams, num_labels: int) -> BehaviorLoss:
    """The loss that a configuration names; class weights `balanced` come from the counts of the training targets."""
    weights = train.class_weights
    if weights == "balanced":
        labels = streams.train.target_labels
        weights = balanced_weights(torch.from_numpy(labels[labels >= 0]), num_labels)
    return BehaviorLoss(train.loss, weights, train.focal_gamma, train.label_smoothing)
