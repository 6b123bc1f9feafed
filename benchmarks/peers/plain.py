"""The plain way to the same classifier: a text prompt a target, PEFT's LoRA and Transformers' stock Trainer.

Nothing here comes from llmrec_peft. Each target is one text that holds its whole history; batches are padded to their
longest prompt, and prompts of like length come together.
"""

import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, TaskType, get_peft_model
from torch.utils.data import Dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)


class PromptDataset(Dataset):
    """Tokenised prompts with their class numbers."""

    def __init__(self, texts: list[str], labels: list[int], tokenizer):
        encoded = tokenizer(texts)
        self.rows = [
            {"input_ids": ids, "attention_mask": mask, "labels": label}
            for ids, mask, label in zip(encoded["input_ids"], encoded["attention_mask"], labels, strict=True)
        ]
        self.lengths = [len(row["input_ids"]) for row in self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> dict:
        return self.rows[number]


class StepClock(TrainerCallback):
    """Seconds from the start of the first epoch to the end of the last step, set-up left out."""

    def __init__(self):
        self.seconds = 0.0
        self.steps = 0

    def on_epoch_begin(self, args, state, control, **kwargs):
        """Start, once."""
        if not self.steps:
            self._start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        """Stop, until the next step's end."""
        self.steps += 1
        self.seconds = time.perf_counter() - self._start


def load_plain(base: str, num_labels: int, *, r: int = 16, alpha: int = 32, seed: int = 0):
    """A stock float32 classifier with LoRA on all linear layers, and its tokenizer."""
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=num_labels, dtype=torch.float32)
    model.config.pad_token_id = tokenizer.pad_token_id
    lora = LoraConfig(task_type=TaskType.SEQ_CLS, r=r, lora_alpha=alpha, target_modules="all-linear")
    return get_peft_model(model, lora), tokenizer


def plain_trainer(
    model, tokenizer, prompts: Dataset, output_dir: str | Path, *, batch_size: int, accumulation: int = 1,
    learning_rate: float = 3e-4, seed: int = 0, data_collator: Any = None, **changes: Any,
) -> tuple[Trainer, StepClock]:  # fmt: skip
    """The stock Trainer for one epoch over `prompts`, and the clock of its steps; `changes` are its arguments.

    Batches are padded to their longest prompt, unless another `data_collator` is given.
    """
    clock = StepClock()
    settings = {
        "output_dir": str(output_dir),
        "num_train_epochs": 1,
        "per_device_train_batch_size": batch_size,
        "gradient_accumulation_steps": accumulation,
        "train_sampling_strategy": "group_by_length",
        "learning_rate": learning_rate,
        "lr_scheduler_type": "constant",
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "seed": seed,
    }
    arguments = TrainingArguments(**{**settings, **changes})
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=prompts,
        data_collator=data_collator or DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
        callbacks=[clock],
    )
    return trainer, clock


@torch.inference_mode()
def plain_logits(model, tokenizer, prompts: PromptDataset, batch_size: int = 2) -> torch.Tensor:
    """Logits of each prompt by the stock forward pass, float32 [prompts, labels]."""
    collate, parts = DataCollatorWithPadding(tokenizer), []
    model.eval()
    for start in range(0, len(prompts), batch_size):
        batch = collate([prompts[number] for number in range(start, min(start + batch_size, len(prompts)))])
        batch.pop("labels")
        parts.append(model(**batch).logits.float())
    return torch.cat(parts)
