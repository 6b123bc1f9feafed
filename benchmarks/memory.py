"""Peak memory of training by method, with and without activation checkpointing, beside what the estimator says.

    python benchmarks/memory.py [--data DIR] [--domain FILE] [--only METHOD ...] [--zero 0 1 2 3] [--add]

Each case trains two steps of two micro-batches with BehaviorTrainer in a process of its own, or under ZeRO in two
processes launched by accelerate. Measured is the process's peak of resident memory (VmHWM) less what was resident right
before the base's weights were made. What could blur that is kept out:
- A tiny classifier trains first, so that code and libraries that load at their first use do not count.
- The base's weights are copied out of their file, as a GPU would get them. Left as they are, they are pages of the
  mapped file: not resident before something reads them, and resident from then on, also those that qlora has packed.
- The peak is of training; loading has one of its own, which is lower for all methods but qlora.
- glibc gives freed blocks back at once (MALLOC_MMAP_THRESHOLD_, MALLOC_TRIM_THRESHOLD_) and keeps one arena, so that
  resident memory is memory in use. A GPU's allocator keeps freed blocks and counts them apart (allocated, reserved).
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent
MALLOC = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0",
          "MALLOC_TOP_PAD_": "0"}  # fmt: skip
METHODS = ("full", "lora", "adapter", "qlora", "head")
CASE = ("method", "activation_checkpointing", "zero", "gpus")
STEPS, BATCH = 2, 2  # BATCH streams a step and process, each a micro-batch
MIB = 2**20


def cases(options: argparse.Namespace) -> list[dict]:
    """One process for each method with and without checkpointing; two processes for each stage of ZeRO."""
    found = []
    for zero in options.zero:
        for method in options.only:
            checkpointing = (False, True) if zero == 0 else (False,)
            found += [
                {"method": method, "activation_checkpointing": on, "zero": zero, "gpus": 1 if zero == 0 else 2}
                for on in checkpointing
                if not (method == "qlora" and zero == 3)
            ]
    return found


# -- in the process that is measured ---------------------------------------------------------------


def train_measured(case: dict, options: argparse.Namespace, result: Path) -> None:
    """Train on the longest streams within `micro_tokens`, and write this process's peak and the streams' sizes."""
    import numpy as np
    import transformers
    from measuring import memory_mib, quiet, release_memory, reset_peak

    from llmrec_peft.checkpoints.loading import load_classifier
    from llmrec_peft.config.schema import DataConfig
    from llmrec_peft.data.domain import Domain
    from llmrec_peft.data.streams import StreamSubset
    from llmrec_peft.models.base import load_tokenizer
    from llmrec_peft.checkpoints.loading import load_classifier
    from llmrec_peft.runs.split_streams import read_log, split_by_domain, streams_for_split
    from llmrec_peft.runs.trainer_setup import OPTIMIZERS
    from llmrec_peft.training.distributed import device_arguments
    from llmrec_peft.training.trainer import BehaviorTrainer

    domain, tokenizer = Domain.from_yaml(options.domain), load_tokenizer(options.base)
    streams = streams_for_split(
        split_by_domain(read_log(DataConfig(path=options.data)), domain), "train", domain, tokenizer
    )
    fitting = np.flatnonzero(streams.lengths <= options.micro_tokens)
    chosen = fitting[np.argsort(-streams.lengths[fitting], kind="stable")][: STEPS * BATCH * case["gpus"]]
    if len(chosen) < STEPS * BATCH * case["gpus"]:
        raise SystemExit(
            f"only {len(chosen)} streams have {options.micro_tokens} tokens or fewer; raise --micro-tokens"
        )
    with quiet(), tempfile.TemporaryDirectory() as scratch:
        load = {"domain": domain, "method": case["method"]}
        load["activation_checkpointing"] = case["activation_checkpointing"]

        def settings() -> transformers.TrainingArguments:
            return transformers.TrainingArguments(
                output_dir=scratch, num_train_epochs=1, per_device_train_batch_size=BATCH, optim=OPTIMIZERS["adamw"],
                save_strategy="no", logging_strategy="no", report_to=[], disable_tqdm=True, remove_unused_columns=False,
                dataloader_pin_memory=False, **device_arguments(),
            )  # fmt: skip

        def trainer_of(classifier, windows, arguments) -> BehaviorTrainer:
            trainer = BehaviorTrainer(
                classifier, arguments, StreamSubset(streams, windows), tokenizer=tokenizer,
                micro_tokens=options.micro_tokens,
            )  # fmt: skip
            trainer.remove_callback(transformers.PrinterCallback)
            return trainer

        tiny = load_classifier(tiny_base(tokenizer, scratch), **load)
        if case["zero"]:  # a process makes one engine of DeepSpeed, so that the trainer cannot go first
            warm_up(tiny)
        else:
            trainer_of(tiny, chosen[:BATCH], settings()).train()
        arguments = settings()  # ZeRO-3 splits what is loaded from here on
        del tiny
        release_memory()
        before = memory_mib("VmRSS")
        classifier = load_classifier(options.base, **load)
        for parameter in classifier.parameters():
            parameter.data = parameter.data.clone()
        trainer = trainer_of(classifier, chosen, arguments)
        reset_peak()
        trainer.train()
    lengths, targets = streams.lengths[chosen], np.diff(streams.target_offsets)[chosen]
    found = {
        "measured_mib": memory_mib() - before,
        "before_mib": before,
        "length": int(lengths.max()),
        "targets": int(targets[lengths.argmax()]),
        "steps": trainer.state.global_step,
    }
    result.with_suffix(f".{trainer.args.process_index}").write_text(json.dumps(found))


def tiny_base(tokenizer, scratch: str) -> str:
    """Directory of a Llama of one layer for this tokenizer."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=True,
    )  # fmt: skip
    directory = str(Path(scratch, "tiny"))
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def warm_up(classifier) -> None:
    """A step of the tiny classifier."""
    import torch

    trained = [parameter for parameter in classifier.train().parameters() if parameter.requires_grad]
    ids = torch.zeros(1, 64, dtype=torch.int64)
    classifier(input_ids=ids, markers=torch.tensor([63])).sum().backward()
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    torch.optim.AdamW(trained).step()


# -- in the process that measures ------------------------------------------------------------------


def measure(case: dict, options: argparse.Namespace, scratch: Path) -> list[dict]:
    """Run a case in processes of its own; what each found."""
    from measuring import accelerate_command, launch_environment

    result = scratch / "found"
    for old in scratch.glob("found.*"):
        old.unlink()
    command = accelerate_command(f"zero{case['zero']}", case["gpus"]) if case["zero"] else [sys.executable]
    command += [__file__, "--data", options.data, "--domain", options.domain, "--base", options.base]
    command += ["--micro-tokens", str(options.micro_tokens), "--case", json.dumps([case, str(result)])]
    environment = launch_environment(scratch, **MALLOC)
    done = subprocess.run(command, env=environment, cwd=ROOT.parent, capture_output=True, text=True)
    found = [json.loads(path.read_text()) for path in sorted(scratch.glob("found.*"))]
    if done.returncode or len(found) != case["gpus"]:
        raise SystemExit(f"{case} failed:\n{done.stderr[-4000:]}")
    return found


def estimate(case: dict, found: dict, base: str):
    """The estimator's answer for what was measured."""
    from llmrec_peft.memory.estimate import estimate_memory
    from llmrec_peft.memory.memory_options import MemoryConfig

    return estimate_memory(MemoryConfig(base=base, device="cpu", **case, **settings_of(found)))


def settings_of(found: dict) -> dict:
    """The estimator's settings for the micro-batch that was measured."""
    return {"micro_tokens": found["length"], "length": found["length"], "targets": found["targets"]}


def base_config(base: str) -> dict:
    """The base's configuration, by which a result can be estimated again where the base is not at hand."""
    from llmrec_peft.models.base import load_config

    return {key: value for key, value in load_config(base).to_diff_dict().items() if key != "_name_or_path"}


def main(arguments: list[str] | None = None) -> dict | None:
    """Measure, print and write the result; returns it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="simulated:shop", help="directory of a log, or simulated:shop")
    parser.add_argument("--domain", default=str(ROOT.parent / "recipes/configs/shop/domain.yaml"), help="domain file")
    parser.add_argument("--base", default="smollm2-135m", help="base model")
    parser.add_argument("--only", nargs="+", default=list(METHODS), choices=METHODS, help="methods")
    parser.add_argument("--zero", nargs="+", type=int, default=[0, 1, 2, 3], choices=range(4), help="stages of ZeRO")
    parser.add_argument("--micro-tokens", type=int, default=600, help="tokens of a micro-batch, at most")
    parser.add_argument("--output", default=str(ROOT / "results" / "memory.json"), help="result file")
    parser.add_argument("--add", action="store_true", help="keep the other rows of the result file")
    parser.add_argument("--again", action="store_true", help="estimate the file's rows again, and measure nothing")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.case:
        case, result = json.loads(options.case)
        train_measured(case, options, Path(result))
        return None
    from measuring import header

    given = sys.argv[1:] if arguments is None else arguments
    result = {**header(__file__, given, 0), "base_config": base_config(options.base), "rows": []}
    print(f"{'method':<8} {'checkpointing':<14} {'ZeRO':>4} {'measured MiB':>16} {'estimated MiB':>14} {'ratio':>6}")
    with tempfile.TemporaryDirectory() as scratch:
        for case, found in again(options) if options.again else measure_all(options, Path(scratch)):
            row = row_of(case, found, options.base)
            result["rows"].append(row)
            per_rank = "/".join(f"{entry['measured_mib']:.0f}" for entry in found)
            print(f"{case['method']:<8} {str(case['activation_checkpointing']).lower():<14} {case['zero']:>4} "
                  f"{per_rank:>16} {row['estimated_mib']:>14.0f} {row['ratio']:>6.2f}", flush=True)  # fmt: skip
            write(options, result)
    return result


def measure_all(options: argparse.Namespace, scratch: Path) -> Iterator[tuple[dict, list[dict]]]:
    """Each case, and what its processes found."""
    for case in cases(options):
        yield case, measure(case, options, scratch)


def again(options: argparse.Namespace) -> Iterator[tuple[dict, list[dict]]]:
    """The cases of the result file, and what was found then."""
    for row in json.loads(Path(options.output).read_text())["rows"]:
        yield {name: row[name] for name in CASE}, row["processes"]


def write(options: argparse.Namespace, result: dict) -> None:
    """Write the result file; with `--add` or `--again` its other rows and its earlier commands stay."""
    from measuring import write_result

    rows, commands = {key_of(row): row for row in result["rows"]}, [result["command"]]
    if (options.add or options.again) and Path(options.output).exists():
        old = json.loads(Path(options.output).read_text())
        rows = {**{key_of(row): row for row in old["rows"]}, **rows}
        if options.again:  # the measurements are of then and there
            result = {**result, **{name: old[name] for name in ("date", "seed", "machine", "versions")}}
        commands = [*(command for command in old["command"].split("; ") if command not in commands), *commands]
    write_result(
        options.output, {**result, "command": "; ".join(commands), "rows": [rows[key] for key in sorted(rows)]}
    )


def key_of(row: dict) -> tuple:
    """What tells cases apart, in the order of the table."""
    return row["zero"], METHODS.index(row["method"]), row["activation_checkpointing"], row["gpus"]


def row_of(case: dict, found: list[dict], base: str) -> dict:
    """What the result file says of a case; the process with the most memory counts."""
    measured = max(entry["measured_mib"] for entry in found)
    parts = estimate(case, found[0], base)
    return {
        **case, **settings_of(found[0]), "processes": found, "measured_mib": measured,
        "estimated_mib": parts.device / MIB, "ratio": parts.device / MIB / measured,
        "parts_mib": {part.name: part.device / MIB for part in parts.parts},
    }  # fmt: skip


if __name__ == "__main__":
    main()
