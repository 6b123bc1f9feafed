"""Instruction tuning as TALLRec does it: a language model learns to say the answer's word after the prompt.

Bao et al., *TALLRec*, 2023 (arXiv 2305.00447). Nothing here comes from llmrec_peft. The prompts are those of the plain
peer, and end where the answer follows. PEFT's LoRA and Transformers' stock Trainer train a causal language model: the
loss is the cross entropy over the whole vocabulary at the answer's token alone. A target's score is the softmax of the
answer tokens' logits after its prompt's last token.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, TaskType, get_peft_model
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer

from .plain import StepClock, plain_trainer


def answer_tokens(tokenizer, prompt: str, words: list[str]) -> list[int]:
    """The token that each word begins with after `prompt`, in the order of `words`.

    Raises ValueError where a word changes the prompt's own tokens, or where two words begin with the same token.
    """
    before = tokenizer(prompt)["input_ids"]
    found = []
    for word in words:
        ids = tokenizer(prompt + word)["input_ids"]
        if ids[: len(before)] != before or len(ids) == len(before):
            raise ValueError(f"answer {word!r} changes the tokens of the prompt before it; use words after a space")
        found.append(ids[len(before)])
    if len(set(found)) < len(found):
        raise ValueError(f"answers {words} begin with the same token; use words that differ in their first")
    return found


class InstructionDataset(Dataset):
    """Prompts with their answer's token; all labels but that one are -100, so that it alone is learnt.

    `texts` are the prompts, or the token ids of each where they are tokens already.
    """

    def __init__(self, texts: list[str] | list[list[int]], labels: list[int], tokenizer, answers: list[int]):
        self.prompts = tokenizer(texts)["input_ids"] if isinstance(texts[0], str) else texts
        self.answers = [answers[label] for label in labels]
        self.lengths = [len(ids) + 1 for ids in self.prompts]

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, number: int) -> dict:
        prompt, answer = self.prompts[number], self.answers[number]
        return {
            "input_ids": [*prompt, answer],
            "attention_mask": [1] * (len(prompt) + 1),
            "labels": [-100] * len(prompt) + [answer],
        }


def load_instruction(base: str, *, r: int = 16, alpha: int = 32, seed: int = 0):
    """A stock float32 causal language model with LoRA on all linear layers, and its tokenizer."""
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    lora = LoraConfig(task_type=TaskType.CAUSAL_LM, r=r, lora_alpha=alpha, target_modules="all-linear")
    return get_peft_model(model, lora), tokenizer


def instruction_trainer(
    model, tokenizer, prompts: InstructionDataset, output_dir: str | Path, **settings: Any
) -> tuple[Trainer, StepClock]:
    """The stock Trainer for one epoch over `prompts`; `settings` as `plain_trainer` takes them."""
    collator = DataCollatorForSeq2Seq(tokenizer, padding="longest", label_pad_token_id=-100)
    return plain_trainer(model, tokenizer, prompts, output_dir, data_collator=collator, **settings)


@torch.inference_mode()
def instruction_probabilities(
    model, tokenizer, prompts: InstructionDataset, answers: list[int], batch_size: int = 2
) -> torch.Tensor:
    """Softmax over the answer tokens after each prompt, float32 [prompts, answers]."""
    model.eval()
    # By length, to pad little; on the left, so that each prompt ends at the last place, the only one with logits.
    order = sorted(range(len(prompts)), key=lambda number: -prompts.lengths[number])
    found = torch.empty(len(prompts), len(answers))
    for start in range(0, len(order), batch_size):
        numbers = order[start : start + batch_size]
        rows = {"input_ids": [prompts.prompts[number] for number in numbers]}
        batch = tokenizer.pad(rows, padding_side="left", return_tensors="pt")
        places = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
        logits = model(**batch, position_ids=places, logits_to_keep=1).logits[:, -1, answers]
        found[numbers] = logits.float().softmax(1)
    return found


@torch.inference_mode()
def probabilities_at(model, rows: list[tuple[np.ndarray, np.ndarray]], answers: list[int]) -> torch.Tensor:
    """Softmax over the answer tokens after every place of every row, in their order, float32 [places, answers].

    A row is the token ids [L] of one text and the places [n] of the last tokens of the prompts that it begins with. A
    causal model answers there what it answers after each of these prompts alone, and reads their history once.
    """
    model.eval()
    found = []
    for ids, places in rows:
        keep = torch.from_numpy(np.asarray(places, np.int64))
        logits = model(input_ids=torch.from_numpy(np.asarray(ids, np.int64))[None], logits_to_keep=keep).logits
        found.append(logits[0][:, answers].float().softmax(1))
    return torch.cat(found)
