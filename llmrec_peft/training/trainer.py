"""Transformers' Trainer on streams: one global batch gives one gradient, however it is split."""

import os
import shutil
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import safetensors.torch
import torch
from accelerate import PartialState
from accelerate.utils import save_fsdp_optimizer
from torch.distributed.fsdp import FSDPModule
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.integrations.deepspeed import deepspeed_load_checkpoint, is_deepspeed_zero3_enabled
from transformers.trainer import SCHEDULER_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints
from transformers.utils import SAFE_WEIGHTS_NAME, logging

from llmrec_peft.data.collator import StreamCollator
from llmrec_peft.data.layout import StreamRows
from llmrec_peft.errors import ConfigError, ModelError, output_errors
from llmrec_peft.models.classifier import BehaviorClassifier
from llmrec_peft.models.predict import Predictions, predict
from llmrec_peft.models.selftest import check_streams
from llmrec_peft.training.losses import BehaviorLoss
from llmrec_peft.training.resume import COMPLETE, reading
from llmrec_peft.training.sampler import EpochDataLoader, GlobalBatchSampler


class BehaviorTrainer(Trainer):
    """Trains a `BehaviorClassifier` on streams.

    What differs from the plain Trainer:
    - the loss is the mean over the targets of the global batch (all ranks, all accumulation steps), and the gradient is
      that mean's, for any split of the batch;
    - a rank's share of a batch runs in micro-batches bounded by tokens;
    - checkpoints hold the trained tensors alone, and count only when they are whole;
    - evaluation answers every target once, on any number of ranks;
    - a run that had ended, by its steps or by early stopping, takes no further step when it is resumed;
    - checkpoints can be moved: the best one is found by its step, in the directory of the run.

    Args:
        model: the classifier.
        args: Transformers' arguments; `per_device_train_batch_size` counts streams.
        train_streams, valid_streams: data sets from `build_streams`, or subsets.
        tokenizer: for the padding token.
        micro_tokens: tokens in a padded micro-batch of training, at most.
        eval_tokens: the same for evaluation.
        loss: the loss; cross-entropy if not given.
        compute_metrics: from `Predictions` on `valid_streams` to named numbers, for logs, selection and early stopping.
        callbacks: further Trainer callbacks.
        on_ready: called by `train` once the model is on its devices and split over them, with its first weights: before
            a checkpoint is loaded and before the first step. What is answered here works on every backend.

    Attributes:
        targets_seen: targets that this rank has trained on.
        step_seconds: time of the optimiser steps alone, with their data, without validations and checkpoints.
    """

    def __init__(
        self,
        model: BehaviorClassifier,
        args: TrainingArguments,
        train_streams,
        valid_streams=None,
        *,
        tokenizer,
        micro_tokens: int = 1200,
        eval_tokens: int = 4000,
        loss: BehaviorLoss | None = None,
        compute_metrics: Callable[[Predictions], dict[str, float]] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        on_ready: Callable[[], None] | None = None,
    ):
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
        self._on_ready = on_ready
        super().__init__(
            model=model,
            args=args,
            data_collator=StreamCollator(tokenizer.pad_token_id, micro_tokens, mask=model.encoder),
            train_dataset=train_streams,
            eval_dataset=valid_streams,
            callbacks=callbacks,
        )
        # The loss below is divided by the global count, so the Trainer must not divide by accumulation steps again.
        self.model_accepts_loss_kwargs = True
        self.can_return_loss = True

    # -- data ----------------------------------------------------------------------------------

    def get_train_dataloader(self) -> EpochDataLoader:
        """Global batches, dealt to the ranks; not prepared by Accelerate, which would deal them again."""
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

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> torch.Tensor:
        """What the global batch's loss is divided by: the count over all ranks and accumulation steps."""
        labels = self.model.labels
        count = sum(
            self.loss.count(batch["labels"], batch["groups"], len(labels))
            for sample in batch_samples
            for batch in sample["micro_batches"]
        )
        return self.accelerator.reduce(torch.tensor(count, device=device), "sum").clamp(min=1)

    # -- steps ---------------------------------------------------------------------------------

    def get_batch_samples(self, *args, **kwargs):
        """A step begins with its data."""
        self._step_began = time.perf_counter()
        return super().get_batch_samples(*args, **kwargs)

    def _maybe_log_save_evaluate(self, *args, **kwargs) -> None:
        """What follows a step is not counted to it."""
        if self._step_began is not None:
            self.step_seconds += time.perf_counter() - self._step_began
            self._step_began = None
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def _run_epoch(self, *args, **kwargs) -> None:
        """Take no step after the last: the plain Trainer would take one more when it resumes a run that had ended."""
        if self.control.should_training_stop or self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        """Run the micro-batches of one batch; ranks exchange gradients after the last one only."""
        model.train()
        batches = self._fill_up(inputs["micro_batches"])
        sync = self.accelerator.gradient_state.sync_gradients
        kwargs = {}
        # DeepSpeed is told by the flag alone when ranks exchange gradients.
        quiet = self.accelerator.no_sync
        if self.is_deepspeed_enabled:
            kwargs["scale_wrt_gas"], quiet = False, nullcontext
        total = torch.zeros((), device=self.args.device)
        for number, batch in enumerate(batches):
            last = number == len(batches) - 1
            self.accelerator.gradient_state._set_sync_gradients(sync and last)
            with nullcontext() if last else quiet(model):
                with self.compute_loss_context_manager():
                    loss = self._loss_share(model, batch, num_items_in_batch)
                self.accelerator.backward(loss, **kwargs)
            total += loss.detach()
        return total

    def _loss_share(self, model, batch: dict, num_items: torch.Tensor) -> torch.Tensor:
        """This micro-batch's part of the global mean, times the ranks, since gradients are averaged over them."""
        inputs = {key: value.to(self.args.device) for key, value in batch.items() if torch.is_tensor(value)}
        labels, groups = inputs.pop("labels"), inputs.pop("groups")
        logits = model(**inputs)
        if batch.get("spare"):
            return logits.sum() * 0.0
        self.targets_seen += len(labels)
        return self.loss(logits, labels, groups) * (self.accelerator.num_processes / num_items)

    def _fill_up(self, batches: list[dict]) -> list[dict]:
        """Add passes that carry no loss where the other ranks wait for them.

        A rank without a stream of a small last batch still takes part in the exchange of gradients, and ranks of a
        sharded model must run equally many passes.
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
        """Answers on a data set of streams, the same on every rank.

        Raises:
            ModelError: the weights are split by ZeRO-3, and `train` has not made the model ready for that yet.
        """
        model = self.model
        if self.is_deepspeed_enabled:
            if self.deepspeed is None and is_deepspeed_zero3_enabled():
                raise ModelError("ZeRO-3 answers only once training is ready; answer in on_ready, or after train()")
            model = self.deepspeed or model  # the engine knows of mixed precision
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
            # Both keep weights whole for a backward pass that does not come, and nothing else could gather them then.
            if self.deepspeed is not None:
                self.deepspeed.empty_partition_cache()
            if self.is_fsdp_enabled:
                for module in model.modules():
                    if isinstance(module, FSDPModule):
                        module.reshard()

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Answer every target of the validation streams and report the metrics, each under `eval_<name>`."""
        streams = self.eval_dataset if eval_dataset is None else eval_dataset
        metrics = {f"{metric_key_prefix}_{key}": value for key, value in
                   self._measure(self.predict_streams(streams, "validation")).items()}  # fmt: skip
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # -- checkpoints ---------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the trained tensors alone, whole; the base is named, not copied. All ranks must call this."""
        trained = self.model.trainable_state_dict()
        if not self.args.should_save:
            return
        directory = Path(output_dir or self.args.output_dir)
        directory.mkdir(parents=True, exist_ok=True)
        tensors = {name: value.cpu().contiguous() for name, value in trained.items()}
        safetensors.torch.save_file(tensors, directory / SAFE_WEIGHTS_NAME)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """As the plain Trainer, but without the frozen weights that it lets DeepSpeed and FSDP write."""
        if self.is_deepspeed_enabled:
            self.model_wrapped.save_checkpoint(output_dir, exclude_frozen_parameters=True)
        elif self.is_fsdp_enabled:
            plugin = self.accelerator.state.fsdp_plugin
            save_fsdp_optimizer(plugin, self.accelerator, self.optimizer, self.model, output_dir)
        else:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir, SCHEDULER_NAME))

    def _save_checkpoint(self, model, trial) -> None:
        """Save, mark the checkpoint as whole, and only then delete older ones."""
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        run = self._get_output_dir(trial)
        directory = Path(run, f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        try:
            with output_errors(ConfigError, f"checkpoint {directory}", "make room, then go on with train.resume"):
                super()._save_checkpoint(model, trial)
                self.accelerator.wait_for_everyone()
                if self.args.should_save:
                    self._mark_whole(directory)
        except ConfigError:
            (directory / COMPLETE).unlink(missing_ok=True)
            shutil.rmtree(directory, ignore_errors=True)  # half of one takes room and is of no use
            raise
        finally:
            self.args.save_total_limit = limit
        if self.args.should_save:
            rotate_checkpoints(
                output_dir=run, save_total_limit=limit, best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=False,
            )  # fmt: skip

    def _mark_whole(self, directory: Path) -> None:
        """Write the last file of a checkpoint, once all others of all ranks are on the disk."""
        for path in directory.rglob("*"):
            if path.is_file():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
        with (directory / COMPLETE).open("w") as file:
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        """Nothing here: `_prepare_for_training` loads, on every backend alike."""

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        """Make the model ready with its first weights, and only then load a checkpoint."""
        found = super()._prepare_for_training(max_steps, train_dataloader, None)
        if self._on_ready is not None:
            self._on_ready()
        if resume_from_checkpoint is not None:
            if self.is_deepspeed_enabled:
                deepspeed_load_checkpoint(self.model_wrapped, resume_from_checkpoint, load_module_strict=False)
            else:
                self._load_trained(resume_from_checkpoint)
            with reading(resume_from_checkpoint):
                self._load_optimizer_and_scheduler(resume_from_checkpoint)
                self._load_scaler(resume_from_checkpoint)
        return found

    def _init_training_state(self, *args, **kwargs):
        """Find the best checkpoint by its step: the path that the state holds is wrong once a run has been moved."""
        verbosity = logging.get_verbosity()
        logging.set_verbosity_error()  # it warns of the path, which is mended here
        try:
            with reading(self.args.output_dir):
                found = super()._init_training_state(*args, **kwargs)
        finally:
            logging.set_verbosity(verbosity)
        step = self.state.best_global_step
        if step:
            best = Path(self.args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{step}")
            if not (best / COMPLETE).is_file():
                raise ConfigError(
                    f"train.resume: the best checkpoint so far, {best}, is not there or not whole; restore it, or "
                    "start a new run"
                )
            self.state.best_model_checkpoint = str(best)
        return found

    def _load_best_model(self) -> None:
        self._load_trained(self.state.best_model_checkpoint)

    def _load_trained(self, directory: str) -> None:
        with reading(directory):
            self.model.load_trainable_state_dict(safetensors.torch.load_file(Path(directory, SAFE_WEIGHTS_NAME)))


class StopEarly(EarlyStoppingCallback):
    """Early stopping that a resumed run goes on with, and does not begin again."""

    def on_train_begin(self, args, state, control, **kwargs):
        """Stop at once where the run had stopped already."""
        super().on_train_begin(args, state, control, **kwargs)
        if self.early_stopping_patience_counter >= self.early_stopping_patience:
            control.should_training_stop = True
