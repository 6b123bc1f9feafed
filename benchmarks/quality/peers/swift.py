"""ms-swift's sequence classification in an environment of its own, as a user would run it: `swift sft` on a JSONL file.

Times are those that ms-swift itself logs: seconds since training began, up to each step's log. They leave out the
start of the process, loading and tokenising, and include saving earlier checkpoints (adapters alone, some 20 MB each).
Peak memory is that of the largest process that `swift sft` starts. Its checkpoints are stock PEFT adapters, so they are
loaded with PEFT here and predict as the plain peer does, outside the time.

Where ms-swift's defaults differ from those of the other systems, they are set to theirs: no LoRA dropout, no weight
decay, AdamW's second beta .999, a constant learning rate, no gradient checkpointing, rows in the file's order.
"""

import json
import os
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

from benchmarks.quality.peers.plain import PromptDataset, load_tokenizer, plain_logits

PACKAGES = ("torch==2.13.0", "ms-swift==4.6.0")
"""Installed in this order, so that ms-swift takes the torch that is there."""

# A small process between, so that the peak of its children is not that of the process that forked them.
WATCH = """
import json, resource, subprocess, sys
code = subprocess.call(sys.argv[2:])
peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
open(sys.argv[1], "w").write(json.dumps({"code": code, "peak_rss_mib": peak / 1024}))
"""


def ensure_environment(directory: str | Path) -> Path:
    """The directory of an environment's programs; made and filled by pip where `swift` is not in it."""
    programs = Path(directory).resolve() / "bin"
    if not (programs / "swift").is_file():
        print(f"making an environment with {' and '.join(PACKAGES)} in {Path(directory).name}, once", file=sys.stderr)
        venv.create(directory, with_pip=True)
        for package in PACKAGES:
            subprocess.run([programs / "python", "-m", "pip", "install", "-q", package], check=True)
    return programs


def write_rows(path: str | Path, texts: list[str], labels: list[int]) -> None:
    """The JSONL that ms-swift reads for sequence classification: one user message and its class number a line."""
    rows = (
        {"messages": [{"role": "user", "content": text}], "label": label}
        for text, label in zip(texts, labels, strict=True)
    )
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def sft_arguments(
    base: str, rows: str | Path, output: str | Path, *, labels: int, batch_size: int, accumulation: int,
    save_steps: int, learning_rate: float, r: int, alpha: int, seed: int, max_length: int,
) -> list[str]:  # fmt: skip
    """What follows `swift`: LoRA for one epoch of `rows`, in their order, on the CPU in float32."""
    options = {
        "model": base, "model_type": "llama", "template": "dummy", "task_type": "seq_cls", "num_labels": labels,
        "tuner_type": "lora", "lora_rank": r, "lora_alpha": alpha, "lora_dropout": 0, "target_modules": "all-linear",
        "dataset": rows, "split_dataset_ratio": 0, "dataset_shuffle": False, "train_dataloader_shuffle": False,
        "max_length": max_length, "torch_dtype": "float32", "use_cpu": True, "num_train_epochs": 1,
        "per_device_train_batch_size": batch_size, "gradient_accumulation_steps": accumulation,
        "learning_rate": learning_rate, "lr_scheduler_type": "constant", "weight_decay": 0, "adam_beta2": 0.999,
        "gradient_checkpointing": False, "dataloader_num_workers": 0, "seed": seed, "data_seed": seed,
        "logging_steps": 1, "report_to": "none", "output_dir": output, "add_version": False, "save_strategy": "steps",
        "save_steps": save_steps, "save_only_model": True, "check_model": False,
    }  # fmt: skip
    words = ["sft"]
    for name, value in options.items():
        words += [f"--{name}", str(value).lower() if isinstance(value, bool) else str(value)]
    return words


def run_swift(programs: Path, arguments: list[str], place: Path) -> float:
    """Run `swift` to its end, its output in place/swift.log; peak memory in MiB. Raises RuntimeError if it fails."""
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    environment |= {"PATH": os.pathsep.join([str(programs), os.environ["PATH"]]), "VIRTUAL_ENV": str(programs.parent),
                    "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}  # fmt: skip
    said = place / "swift.log"
    with said.open("w") as output:
        command = [programs / "python", "-S", "-c", WATCH, place / "watched.json", programs / "swift", *arguments]
        subprocess.run(command, env=environment, stdout=output, stderr=subprocess.STDOUT, check=False)
    watched = json.loads((place / "watched.json").read_text()) if (place / "watched.json").is_file() else {"code": -1}
    if watched["code"]:
        tail = "\n".join(said.read_text(errors="replace").splitlines()[-15:])
        raise RuntimeError(f"swift sft ended with exit code {watched['code']}:\n{tail}")
    return watched["peak_rss_mib"]


def read_seconds(path: str | Path) -> dict[int, float]:
    """Seconds since training began at each step, by ms-swift's logging.jsonl: steps times its mean seconds a step."""
    found = {}
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        if "global_step/max_steps" in entry and "train_speed(s/it)" in entry:
            step = int(entry["global_step/max_steps"].split("/")[0])
            # The last step has a second entry, of the whole run, which comes after its checkpoint.
            found.setdefault(step, step * float(entry["train_speed(s/it)"]))
    return found


def adapter_probabilities(base: str, adapter: Path, prompts: PromptDataset, tokenizer, labels: int, batch_size: int):
    """Probabilities [prompts, labels] of a stock base with a saved adapter. Raises ValueError if it is no such one."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    if (config["peft_type"], config["task_type"]) != ("LORA", "SEQ_CLS"):
        raise ValueError(f"{adapter.name} is no LoRA of SEQ_CLS but {config['peft_type']} of {config['task_type']}")
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=labels, dtype=torch.float32)
    model.config.pad_token_id = tokenizer.pad_token_id
    return plain_logits(PeftModel.from_pretrained(model, adapter), tokenizer, prompts, batch_size).softmax(1).numpy()


def train_swift(job: dict[str, Any], scratch: Path) -> dict:
    """Train as many steps as plain did; the curve with predictions, and what else to state."""
    programs, steps, outcomes = ensure_environment(job["swift_env"]), job["plain_steps"], job["domain"]["outcomes"]
    count, size = steps * job["peer_batch"], job["peer_batch"] // job["peer_accumulation"]
    # Rows that the other peers came to again in a further epoch are written down again.
    texts, labels = ((column * (count // len(column) + 1))[:count] for column in job["training_prompts"])
    write_rows(scratch / "rows.jsonl", texts, labels)
    arguments = sft_arguments(
        job["base"], scratch / "rows.jsonl", scratch / "out", labels=len(outcomes), batch_size=size,
        accumulation=job["peer_accumulation"], save_steps=-(-steps // job["points"]),
        learning_rate=job["learning_rate"], r=job["r"], alpha=job["alpha"], seed=job["seed"],
        max_length=job["domain"]["stream"]["max_length"],
    )  # fmt: skip
    peak = run_swift(programs, arguments, scratch)
    seconds, tokenizer = read_seconds(scratch / "out" / "logging.jsonl"), load_tokenizer(job["base"])
    prompts, lengths = (
        PromptDataset(*job["validation_prompts"], tokenizer),
        PromptDataset(texts, labels, tokenizer).lengths,
    )
    curve = []
    for step in sorted(int(path.name.split("-")[1]) for path in (scratch / "out").glob("checkpoint-*")):
        p = adapter_probabilities(job["base"], scratch / "out" / f"checkpoint-{step}", prompts, tokenizer,
                                  len(outcomes), job["evaluation_batch"])  # fmt: skip
        curve.append({"seconds": seconds[step], "steps": step, "targets": step * job["peer_batch"], "p": p.tolist()})
    return {
        "tokens_per_target": sum(size * max(lengths[n : n + size]) for n in range(0, count, size)) / count,
        "peak_rss_mib": peak,
        "timed": "ms-swift's own log: seconds since training began, checkpoints saved before included", "curve": curve,
    }  # fmt: skip
