"""Transformers' Trainer on streams: one global batch gives one gradient, however it is split.

The gradient of a global batch B is that of L(B) = 1 / N * sum of the loss over B, with N the number of targets (for the
listwise loss, of groups) in B. B is split over W ranks, over A accumulation steps, and into micro-batches of at most
`micro_tokens` tokens. Each micro-batch m is backpropagated as W / N * sum of the loss over m:

- N is summed over all ranks and accumulation steps before the first forward pass (`_get_num_items_in_batch`);
- micro-batches and accumulation steps add up, since gradients accumulate;
- the factor W cancels the mean over ranks that DDP, ZeRO and FSDP take when they exchange gradients.
"""

import os
import shutil
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from accelerate import PartialState
from accelerate.utils import save_fsdp_optimizer
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import (
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.integrations.deepspeed import deepspeed_load_checkpoint, is_deepspeed_zero3_enabled
from transformers.trainer import SCHEDULER_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints
from transformers.utils import SAFE_WEIGHTS_NAME, logging

from llmrec_peft.data.collator import StreamCollator
from llmrec_peft.data.layout import StreamRows
from llmrec_peft.data.streams import Streams
from llmrec_peft.errors import ConfigError, ModelError, output_errors
from llmrec_peft.models.classifier import BehaviorClassifier
from llmrec_peft.models.predict import Predictions, predict
from llmrec_peft.models.selftest import check_streams
from llmrec_peft.training.losses import BehaviorLoss
from llmrec_peft.training.resume import COMPLETE, reading
from llmrec_peft.training.sampler import EpochDataLoader, GlobalBatchSampler


class BehaviorTrainer(Trainer):
    """Trains a `BehaviorClassifier` on streams.

    Differences from the plain Trainer:
    - the loss is the mean over the targets of the global batch (all ranks, all accumulation steps), and so is the
      gradient, for any split of the batch;
    - the share of a rank runs in micro-batches bounded by tokens;
    - checkpoints hold the trained tensors only, and count only when they are complete;
    - evaluation predicts each target once, on any number of ranks;
    - a run that had ended, by its steps or by early stopping, takes no further step when it is resumed;
    - checkpoints can be moved: the best one is found by its step, in the directory of the run.

    Args:
        model: the classifier.
        args: Transformers' arguments; `per_device_train_batch_size` counts streams.
        train_streams: data set from `build_streams`, or a subset.
        valid_streams: the same for validation.
        tokenizer: gives the padding token.
        micro_tokens: maximum number of tokens in a padded micro-batch of training.
        eval_tokens: the same for evaluation.
        loss: the loss; cross-entropy if not given.
        compute_metrics: from `Predictions` on `valid_streams` to named numbers, for logs, selection and early stopping.
        callbacks: further Trainer callbacks.
        on_ready: see the attribute.

    Attributes:
        on_ready: called by `train` once the model is on its devices and split over them, with its first weights: before
            a checkpoint is loaded and before the first step. Predictions made here work on every backend.
        targets_seen: targets that this rank has trained on.
        step_seconds: time of the optimiser steps with their data, without validations and checkpoints.
    """

    # What `__init__` passes on, in narrower types than the plain Trainer declares.
    args: TrainingArguments
    model: BehaviorClassifier
    data_collator: StreamCollator
    train_dataset: Streams
    eval_dataset: Streams | None

    def __init__(
        self,
        model: BehaviorClassifier,
        args: TrainingArguments,
        train_streams: Streams,
        valid_streams: Streams | None = None,
        *,
        tokenizer: PreTrainedTokenizerBase,
        micro_tokens: int = 1200,
        eval_tokens: int = 4000,
        loss: BehaviorLoss | None = None,
        compute_metrics: Callable[[Predictions], dict[str, float]] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        on_ready: Callable[[], None] | None = None,
    ) -> None:
        if valid_streams is not None and compute_metrics is None:
            raise ConfigError("BehaviorTrainer got valid_streams but no compute_metrics; give both or neither")
        for streams in (train_streams, valid_streams):
            check_streams(model, streams)
        self.loss = loss or BehaviorLoss()
        self.eval_tokens = eval_tokens
        self.targets_seen = 0
        self.step_seconds = 0.0
        self._step_began: float | None = None
        self._measure = compute_metrics
        self.on_ready = on_ready
        super().__init__(
            model=model,
            args=args,
            data_collator=StreamCollator(tokenizer.pad_token_id, micro_tokens, mask=model.encoder),
            train_dataset=train_streams,
            eval_dataset=valid_streams,
            callbacks=callbacks,
        )
        # `_loss_share` divides by the global count, so the Trainer must not divide by accumulation steps again.
        self.model_accepts_loss_kwargs = True
        self.can_return_loss = True

    # -- data ----------------------------------------------------------------------------------

    def get_train_dataloader(self) -> EpochDataLoader:
        """This rank's share of each global batch. Accelerate must not prepare the loader: it would split it again."""
        world = self.accelerator.num_processes
        sampler = GlobalBatchSampler(
            self.train_dataset.lengths,
            self.args.per_device_train_batch_size * world,
            self.args.data_seed if self.args.data_seed is not None else self.args.seed,
            self.accelerator.process_index,
            world,
        )
        return EpochDataLoader(
            self.train_dataset,
            batch_sampler=sampler,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
        )

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> torch.Tensor:
        """N, the divisor of the global batch's loss, int64 []: the count over all accumulation steps and ranks."""
        num_labels = len(self.model.labels)
        count = sum(
            self.loss.count(batch["labels"], batch["groups"], num_labels)
            for sample in batch_samples
            for batch in sample["micro_batches"]
        )
        # At least 1: a batch without any target to learn from gives a loss of 0, not NaN.
        return self.accelerator.reduce(torch.tensor(count, device=device), "sum").clamp(min=1)

    # -- steps ---------------------------------------------------------------------------------

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Start the clock of a step, which begins with its data."""
        self._step_began = time.perf_counter()
        return super().get_batch_samples(*args, **kwargs)

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """Stop the clock of a step before validations and checkpoints."""
        if self._step_began is not None:
            self.step_seconds += time.perf_counter() - self._step_began
            self._step_began = None
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Take no step after the last: the plain Trainer takes one more when it resumes a run that had ended."""
        if self.control.should_training_stop or self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """Backpropagate this rank's share of one accumulation step, micro-batch by micro-batch.

        The ranks exchange gradients after the last micro-batch of the last accumulation step only.

        Returns:
            The share's loss, float32 [], already divided by the global count and multiplied by the ranks.
        """
        model.train()
        batches = self._fill_up(inputs["micro_batches"])
        # Of the accumulation step: whether it is the last one before the optimiser's step.
        sync = self.accelerator.gradient_state.sync_gradients
        kwargs: dict[str, Any] = {}
        no_sync: Callable[[nn.Module], AbstractContextManager[Any]] = self.accelerator.no_sync
        if self.is_deepspeed_enabled:
            # DeepSpeed exchanges gradients by the flag `sync_gradients`, and has no `no_sync`. It must not divide the
            # loss by accumulation steps (`scale_wrt_gas`).
            kwargs["scale_wrt_gas"], no_sync = False, nullcontext
        total = torch.zeros((), device=self.args.device)
        for number, batch in enumerate(batches):
            last = number == len(batches) - 1
            self.accelerator.gradient_state._set_sync_gradients(sync and last)
            with nullcontext() if last else no_sync(model):
                with self.compute_loss_context_manager():
                    loss = self._loss_share(model, batch, num_items_in_batch)
                self.accelerator.backward(loss, **kwargs)
            total += loss.detach()
        return total

    def _loss_share(
        self, model: nn.Module, batch: dict[str, Any], num_items: torch.Tensor | int | None
    ) -> torch.Tensor:
        """Loss of one micro-batch m, float32 []: W / N * sum of the loss over m, with W ranks and N `num_items`."""
        inputs = {key: value.to(self.args.device) for key, value in batch.items() if torch.is_tensor(value)}
        labels, groups = inputs.pop("labels"), inputs.pop("groups")
        logits = model(**inputs)  # float32 [targets of the micro-batch, classes]
        if batch.get("spare"):
            return logits.sum() * 0.0  # zero gradients, but for every parameter, as the exchange expects
        self.targets_seen += len(labels)
        return self.loss(logits, labels, groups) * (self.accelerator.num_processes / num_items)

    def _fill_up(self, batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Add micro-batches without loss (`spare`) where other ranks wait for this one.

        A rank that gets no stream of a small last batch must still take part in the exchange of gradients. Where the
        model is sharded, each forward pass gathers weights, so all ranks must run the same number of passes.
        """
        most = max(1, len(batches))
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            counts = self.accelerator.gather(torch.tensor([most], device=self.args.device))
            most = int(counts.max())
        if len(batches) == most:
            return batches
        spare = {**self.data_collator.one([self.train_dataset[0]]), "spare": True}
        return batches + [spare] * (most - len(batches))

    # -- evaluation ----------------------------------------------------------------------------

    def predict_streams(self, streams: StreamRows, description: str | None = None) -> Predictions:
        """Predict every target of a data set of streams; each rank gets all predictions.

        Raises:
            ModelError: the weights are split by ZeRO-3, and `train` has not made the model ready for that yet.
        """
        model: nn.Module = self.model
        engine: Any = self.deepspeed  # the Trainer declares it as None
        if self.is_deepspeed_enabled:
            if engine is None and is_deepspeed_zero3_enabled():
                raise ModelError("ZeRO-3 predicts only once training is ready; predict in on_ready, or after train()")
            model = engine or model  # the engine applies mixed precision
        try:
            return predict(
                model,
                streams,
                self.data_collator,
                batch_tokens=self.eval_tokens,
                processes=PartialState(),
                description=description,
            )
        finally:
            # ZeRO-3 and FSDP keep gathered weights for a backward pass that does not come here. Left gathered, they
            # could not be gathered again.
            if engine is not None:
                engine.empty_partition_cache()
            if self.is_fsdp_enabled:
                for module in model.modules():
                    if isinstance(module, FSDPModule):
                        module.reshard()

    def evaluate(
        self,
        eval_dataset: Streams | None = None,  # type: ignore[override]  # a stream data set, and no mapping of them
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Predict every target of the validation streams and log the metrics, each under `eval_<name>`."""
        streams = self.eval_dataset if eval_dataset is None else eval_dataset
        if streams is None or self._measure is None:
            raise ConfigError("BehaviorTrainer has no validation streams to evaluate; give valid_streams")
        measured = self._measure(self.predict_streams(streams, "validation"))
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in measured.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # -- checkpoints ---------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the trained tensors, gathered; the base is not copied. All ranks must call this."""
        trained = self.model.trainable_state_dict()
        if not self.args.should_save:
            return
        directory = Path(output_dir or self._run_directory)
        directory.mkdir(parents=True, exist_ok=True)
        tensors = {name: value.cpu().contiguous() for name, value in trained.items()}
        safetensors.torch.save_file(tensors, directory / SAFE_WEIGHTS_NAME)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Save both as the plain Trainer does, but without the frozen weights that it lets DeepSpeed and FSDP write."""
        if self.is_deepspeed_enabled:
            engine: Any = self.model_wrapped
            engine.save_checkpoint(output_dir, exclude_frozen_parameters=True)
        elif self.is_fsdp_enabled:
            plugin = self.accelerator.state.fsdp_plugin
            save_fsdp_optimizer(plugin, self.accelerator, self.optimizer, self.model, output_dir)
        else:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        if self.args.should_save and self.lr_scheduler is not None:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir, SCHEDULER_NAME))

    @property
    def _run_directory(self) -> str:
        """Directory of the checkpoints."""
        return str(self.args.output_dir)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save, mark the checkpoint as complete, and only then delete older ones."""
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        run = self._get_output_dir(trial)
        directory = Path(run, f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        try:
            with output_errors(ConfigError, f"checkpoint {directory}", "make room, then resume with train.resume"):
                super()._save_checkpoint(model, trial)
                self.accelerator.wait_for_everyone()
                if self.args.should_save:
                    self._mark_complete(directory)
        except ConfigError:
            (directory / COMPLETE).unlink(missing_ok=True)
            shutil.rmtree(directory, ignore_errors=True)  # an incomplete one only takes disk space
            raise
        finally:
            self.args.save_total_limit = limit
        if self.args.should_save:
            rotate_checkpoints(
                output_dir=run, save_total_limit=limit, best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=False,
            )  # fmt: skip

    def _mark_complete(self, directory: Path) -> None:
        """Write the last file of a checkpoint, once the files of all ranks are on the disk."""
        for path in directory.rglob("*"):
            if path.is_file():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
        with (directory / COMPLETE).open("w") as file:
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Load nothing here: `_prepare_for_training` loads, in the same way on every backend."""

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: EpochDataLoader, resume_from_checkpoint: str | None
    ) -> Any:
        """Prepare the model with its first weights, call `on_ready`, and only then load a checkpoint."""
        found = super()._prepare_for_training(max_steps, train_dataloader, None)
        if self.on_ready is not None:
            self.on_ready()
        if resume_from_checkpoint is not None:
            if self.is_deepspeed_enabled:
                deepspeed_load_checkpoint(self.model_wrapped, resume_from_checkpoint, load_module_strict=False)
            else:
                self._load_trained(resume_from_checkpoint)
            with reading(resume_from_checkpoint):
                self._load_optimizer_and_scheduler(resume_from_checkpoint)
                self._load_scaler(resume_from_checkpoint)
        return found

    def _init_training_state(self, *args: Any, **kwargs: Any) -> Any:
        """Find the best checkpoint by its step: the path in the saved state is wrong once a run has been moved."""
        verbosity = logging.get_verbosity()
        logging.set_verbosity_error()  # the Trainer warns of that path, which is corrected below
        try:
            with reading(self._run_directory):
                found = super()._init_training_state(*args, **kwargs)
        finally:
            logging.set_verbosity(verbosity)
        step = self.state.best_global_step
        if step:
            best = Path(self._run_directory, f"{PREFIX_CHECKPOINT_DIR}-{step}")
            if not (best / COMPLETE).is_file():
                raise ConfigError(
                    f"train.resume: the best checkpoint so far, {best}, is missing or incomplete; restore it, or "
                    "start a new run"
                )
            self.state.best_model_checkpoint = str(best)
        return found

    def _load_best_model(self) -> None:
        if self.state.best_model_checkpoint is not None:
            self._load_trained(self.state.best_model_checkpoint)

    def _load_trained(self, directory: str) -> None:
        with reading(directory):
            self.model.load_trainable_state_dict(safetensors.torch.load_file(Path(directory, SAFE_WEIGHTS_NAME)))
