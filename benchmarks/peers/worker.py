"""One system of compare_peers.py in a process of its own, so that its peak memory is its own.

    python -m peers.worker SYSTEM JOB

Reads JOB/job.json, JOB/train.jsonl and JOB/valid.jsonl. Leaves JOB/SYSTEM.json (the curve without AUC, and what was
measured) and JOB/SYSTEM.npy (probabilities [points, validation targets, labels]).
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from measuring import memory_mib, quiet

from .curves import Recorder


def read_rows(path: Path) -> tuple[list[str], list[int]]:
    """Texts and class numbers of a jsonl file."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [row["text"] for row in rows], [row["label"] for row in rows]


def train_plain(job: dict[str, Any], place: Path, scratch: str) -> tuple[Recorder, dict[str, Any]]:
    """The plain peer: sequence classification."""
    from .plain import PromptDataset, load_plain, plain_logits, plain_trainer

    model, tokenizer = load_plain(job["base"], len(job["words"]), r=job["r"], alpha=job["alpha"], seed=job["seed"])
    train, valid = (PromptDataset(*read_rows(place / f"{name}.jsonl"), tokenizer) for name in ("train", "valid"))
    trainer, _ = plain_trainer(model, tokenizer, train, scratch, **trainer_settings(job))
    return recorded(
        trainer, job, lambda: plain_logits(model, tokenizer, valid, job["evaluation_batch"]).softmax(1).numpy()
    )


def train_instruction(job: dict[str, Any], place: Path, scratch: str) -> tuple[Recorder, dict[str, Any]]:
    """The instruction peer: the answer's word."""
    from .instruction import (
        InstructionDataset,
        answer_tokens,
        instruction_probabilities,
        instruction_trainer,
        load_instruction,
    )

    model, tokenizer = load_instruction(job["base"], r=job["r"], alpha=job["alpha"], seed=job["seed"])
    answers = answer_tokens(tokenizer, read_rows(place / "valid.jsonl")[0][0], job["words"])
    train, valid = (
        InstructionDataset(*read_rows(place / f"{name}.jsonl"), tokenizer, answers) for name in ("train", "valid")
    )
    trainer, _ = instruction_trainer(model, tokenizer, train, scratch, **trainer_settings(job))
    return recorded(
        trainer,
        job,
        lambda: instruction_probabilities(model, tokenizer, valid, answers, job["evaluation_batch"]).numpy(),
    )


def trainer_settings(job: dict[str, Any]) -> dict[str, Any]:
    """Settings of the stock Trainer, the same for both; the file's order is kept, with its batches of like length."""
    return {
        "batch_size": job["peer_batch"] // job["peer_accumulation"],
        "accumulation": job["peer_accumulation"],
        "learning_rate": job["learning_rate"],
        "seed": job["seed"],
        "train_sampling_strategy": "sequential",
        "num_train_epochs": 1000,
    }


def recorded(trainer: transformers.Trainer, job: dict[str, Any], answer) -> tuple[Recorder, dict[str, Any]]:
    """Train until the budget is spent."""
    recorder = Recorder(
        trainer.model, answer, lambda steps: steps * job["peer_batch"], seconds=job["seconds"], steps=job["steps"],
        points=job["points"], at_targets=job["at_targets"],
    )  # fmt: skip
    trainer.add_callback(recorder)
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    return recorder, {"trained_parameters": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)}


def work(system: str, place: Path) -> None:
    """Train one system and write what it left."""
    job = json.loads((place / "job.json").read_text())
    with quiet(), tempfile.TemporaryDirectory() as scratch:
        if system == "swift":
            from .swift import train_swift

            rows = (read_rows(place / f"{name}.jsonl") for name in ("train", "valid"))
            points, answers, stated = train_swift(job, Path(scratch), *rows)
        else:
            if system == "streams":
                from .streams import train_streams

                recorder, stated = train_streams(job, scratch)
            else:
                recorder, stated = {"plain": train_plain, "instruction": train_instruction}[system](job, place, scratch)
            points, answers = recorder.points, recorder.answers
            stated |= {"tokens_per_target": recorder.positions / points[-1]["targets"], "peak_rss_mib": memory_mib()}
    np.save(place / f"{system}.npy", np.stack(answers))
    (place / f"{system}.json").write_text(json.dumps({"curve": points, **stated}))


if __name__ == "__main__":
    work(sys.argv[1], Path(sys.argv[2]))
