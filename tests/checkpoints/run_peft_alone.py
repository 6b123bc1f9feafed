"""Answers bundles with PEFT and Transformers alone: `run_peft_alone.py JOBS.json OUT.json`, in a process of its own.

A job has a `base` and a `bundle`, and `prompts` to answer in one batch padded on the right, or a model card's `code`.
"""

import json
import sys
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

torch.set_num_threads(1)


def answered(job: dict) -> list[list[float]]:
    torch.manual_seed(99)  # what loading starts at random must not matter
    tokenizer = AutoTokenizer.from_pretrained(job["base"])
    stock = AutoModelForSequenceClassification.from_pretrained(job["base"], num_labels=2, dtype=torch.float32)
    model = PeftModel.from_pretrained(stock, job["bundle"]).eval()
    batch = tokenizer(job["prompts"], add_special_tokens=False, padding=True, padding_side="right", return_tensors="pt")
    assert not batch["attention_mask"].all()
    with torch.no_grad():
        return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.tolist()


def run_card(job: dict) -> list[list[float]]:
    if "BitsAndBytesConfig" in job["code"]:
        import bitsandbytes.nn.modules

        # Its kernel for some CPUs rounds to bfloat16, and takes no layer as narrow as those of tiny models.
        bitsandbytes.nn.modules.has_avx512bf16 = lambda: False
    names: dict = {}
    exec(job["code"].replace("OWNER/NAME", job["bundle"]).replace('"BASE"', repr(job["base"])), names)
    return [names["logits"].tolist(), names["probabilities"].tolist()]


if __name__ == "__main__":
    found = [run_card(job) if "code" in job else answered(job) for job in json.loads(Path(sys.argv[1]).read_text())]
    assert "llmrec_peft" not in sys.modules
    Path(sys.argv[2]).write_text(json.dumps(found))
