"""Transformers' Trainer on streams: one global batch gives one gradient, however it is split."""

import os
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import safetensors.torch
import torch
from accelerate.utils import DistributedType
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints
from transformers.utils import SAFE_WEIGHTS_NAME, logging

from ..data.collator import StreamCollator
from ..errors import ConfigError
from ..models.classifier import BehaviorClassifier
from ..models.predict import Predictions, predict
from .losses import BehaviorLoss
from .sampler import EpochDataLoader, GlobalBatchSampler

COMPLETE = "complete"  # file that is written last into a checkpoint; without it the checkpoint does not count


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
    ):
        if valid_streams is not None and compute_metrics is None:
            raise ConfigError("BehaviorTrainer got valid_streams but no compute_metrics; give both or neither")
        self.loss = loss or BehaviorLoss()
        self.eval_tokens = eval_tokens
        self.targets_seen = 0
        self.step_seconds = 0.0
        self._step_began: float | None = None
        self._measure = compute_metrics
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
        if self.accelerator.distributed_type == DistributedType.DEEPSPEED:
            kwargs["scale_wrt_gas"] = False
        total = torch.zeros((), device=self.args.device)
        for number, batch in enumerate(batches):
            last = number == len(batches) - 1
            self.accelerator.gradient_state._set_sync_gradients(sync and last)
            with nullcontext() if last else self.accelerator.no_sync(model):
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
        if self.accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.FSDP):
            counts = self.accelerator.gather(torch.tensor([most], device=self.args.device))
            most = int(counts.max())
        if len(batches) == most:
            return batches
        spare = {**self.data_collator.one([self.train_dataset[0]]), "spare": True}
        return batches + [spare] * (most - len(batches))

    # -- evaluation ----------------------------------------------------------------------------

    def predict_streams(self, streams, description: str | None = None) -> Predictions:
        """Answers on a data set of streams, the same on every rank."""
        return predict(
            self.model,
            streams,
            self.data_collator,
            batch_tokens=self.eval_tokens,
            accelerator=self.accelerator,
            description=description,
        )

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Answer every target of the validation streams and report the metrics, each under `eval_<name>`."""
        streams = self.eval_dataset if eval_dataset is None else eval_dataset
        metrics = {f"{metric_key_prefix}_{key}": value for key, value in
                   self._measure(self.predict_streams(streams, "validation")).items()}  # fmt: skip
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # -- checkpoints ---------------------------------------------------------------------------

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Write the trained tensors alone; the base is named, not copied."""
        if not self.args.should_save:
            return
        directory = Path(output_dir or self.args.output_dir)
        directory.mkdir(parents=True, exist_ok=True)
        trained = self.model.trainable_state_dict()
        if state_dict is not None:  # gathered from the ranks
            trained = {name: state_dict[name] for name in trained}
        tensors = {name: value.detach().cpu().contiguous() for name, value in trained.items()}
        safetensors.torch.save_file(tensors, directory / SAFE_WEIGHTS_NAME)

    def _save_checkpoint(self, model, trial) -> None:
        """Save, mark the checkpoint as whole, and only then delete older ones."""
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            run = self._get_output_dir(trial)
            marker = Path(run, f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}", COMPLETE)
            with marker.open("w") as file:
                file.write("\n")
                file.flush()
                os.fsync(file.fileno())
            rotate_checkpoints(
                output_dir=run, save_total_limit=limit, best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )  # fmt: skip

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        self._load_trained(resume_from_checkpoint)

    def _init_training_state(self, *args, **kwargs):
        """Find the best checkpoint by its step: the path that the state holds is wrong once a run has been moved."""
        verbosity = logging.get_verbosity()
        logging.set_verbosity_error()  # it warns of the path, which is mended here
        try:
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
        self.model.load_trainable_state_dict(safetensors.torch.load_file(Path(directory, SAFE_WEIGHTS_NAME)))


def last_checkpoint(directory: str | Path) -> str | None:
    """The newest checkpoint in a run's directory that is whole; unfinished ones are passed over."""
    found = [path.parent for path in Path(directory).glob(f"{PREFIX_CHECKPOINT_DIR}-*/{COMPLETE}")]
    return str(max(found, key=lambda path: int(path.name.split("-")[-1]))) if found else None


def unfinished_checkpoints(directory: str | Path) -> list[Path]:
    """Checkpoints that were never finished."""
    found = Path(directory).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
    return [path for path in found if path.is_dir() and not (path / COMPLETE).is_file()]


class StopEarly(EarlyStoppingCallback):
    """Early stopping that a resumed run goes on with, and does not begin again."""

    def on_train_begin(self, args, state, control, **kwargs):
        """Stop at once where the run had stopped already."""
        super().on_train_begin(args, state, control, **kwargs)
        if self.early_stopping_patience_counter >= self.early_stopping_patience:
            control.should_training_stop = True
