"""The peers of streams with Transformers and PEFT alone: sequence classification, and instruction tuning.

Nothing here comes from llmrec_peft. A target is one text prompt with its whole history; LoRA of PEFT trains on all
linear layers with the stock Trainer; prompts of like length come together, and batches are padded to their longest.

plain: `AutoModelForSequenceClassification`.
instruction: as TALLRec does (Bao et al. 2023, arXiv 2305.00447), a causal language model learns the word of the label
after the prompt. The loss is the cross entropy over the whole vocabulary at that token alone; a target's score is the
softmax over the words' first tokens after the prompt.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from peft import LoraConfig, TaskType, get_peft_model
from torch.utils.data import Dataset

from benchmarks.training import SILENT, StepClock


def load_tokenizer(base: str):
    """The tokenizer with a padding token."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(base, padding_side="right")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_plain(base: str, num_labels: int, *, r: int = 16, alpha: int = 32, seed: int = 0):
    """A float32 classifier with LoRA, and its tokenizer."""
    torch.manual_seed(seed)
    tokenizer = load_tokenizer(base)
    kind = transformers.AutoModelForSequenceClassification
    model = kind.from_pretrained(base, num_labels=num_labels, dtype=torch.float32)
    model.config.pad_token_id = tokenizer.pad_token_id
    lora = LoraConfig(task_type=TaskType.SEQ_CLS, r=r, lora_alpha=alpha, target_modules="all-linear")
    return get_peft_model(model, lora), tokenizer


def load_instruction(base: str, *, r: int = 16, alpha: int = 32, seed: int = 0):
    """A float32 causal language model with LoRA, and its tokenizer."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    lora = LoraConfig(task_type=TaskType.CAUSAL_LM, r=r, lora_alpha=alpha, target_modules="all-linear")
    return get_peft_model(model, lora), load_tokenizer(base)


class PromptDataset(Dataset):
    """Prompts, as texts or as token ids, with their class numbers.

    words: token of each label's word. With them, a row ends with the word of its label, and all labels but that one
    are -100, so that it alone is learned.
    """

    def __init__(self, prompts: list[str] | list[list[int]], labels: list[int], tokenizer, words=None):
        self.prompts = tokenizer(prompts)["input_ids"] if isinstance(prompts[0], str) else prompts
        self.rows: list[dict[str, Any]] = [
            {"input_ids": ids, "labels": label} if words is None else
            {"input_ids": [*ids, words[label]], "labels": [-100] * len(ids) + [words[label]]}
            for ids, label in zip(self.prompts, labels, strict=True)
        ]  # fmt: skip
        for row in self.rows:
            row["attention_mask"] = [1] * len(row["input_ids"])
        self.lengths = [len(row["input_ids"]) for row in self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> dict:
        return self.rows[number]


def plain_trainer(
    model, tokenizer, prompts: PromptDataset, output_dir: str | Path, *, batch_size: int, accumulation: int = 1,
    **changes: Any,
) -> tuple[transformers.Trainer, StepClock]:  # fmt: skip
    """The stock Trainer for one epoch over `prompts`, and the clock of its steps; `changes` are its arguments."""
    clock, settings = StepClock(), SILENT | {"train_sampling_strategy": "group_by_length"} | changes
    arguments = transformers.TrainingArguments(
        output_dir=str(output_dir), per_device_train_batch_size=batch_size, gradient_accumulation_steps=accumulation,
        **settings,
    )  # fmt: skip
    if isinstance(prompts[0]["labels"], list):
        collator = transformers.DataCollatorForSeq2Seq(tokenizer, padding="longest", label_pad_token_id=-100)
    else:
        collator = transformers.DataCollatorWithPadding(tokenizer)
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=prompts, data_collator=collator,
                      processing_class=tokenizer, callbacks=[clock])  # fmt: skip
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer, clock


@torch.inference_mode()
def plain_logits(model, tokenizer, prompts: PromptDataset, batch_size: int = 2) -> torch.Tensor:
    """Logits of each prompt by the stock forward pass, float32 [prompts, labels]."""
    model.eval()
    parts = []
    for start in range(0, len(prompts), batch_size):
        rows = {"input_ids": prompts.prompts[start : start + batch_size]}
        parts.append(model(**tokenizer.pad(rows, return_tensors="pt")).logits.float())
    return torch.cat(parts)


@torch.inference_mode()
def word_probabilities(model, rows: list[tuple[np.ndarray, np.ndarray]], words: list[int]) -> torch.Tensor:
    """Softmax over the words' tokens after every place of every row, in their order, float32 [places, words].

    A row is the token ids [L] of one text and the places [n] of the last tokens of the prompts that it begins with. A
    causal model predicts there what it predicts after each of these prompts alone, and reads their history once.
    """
    model.eval()
    found = []
    for ids, places in rows:
        keep = torch.from_numpy(np.asarray(places, np.int64))
        logits = model(input_ids=torch.from_numpy(np.asarray(ids, np.int64))[None], logits_to_keep=keep).logits
        found.append(logits[0][:, words].float().softmax(1))
    return torch.cat(found)
