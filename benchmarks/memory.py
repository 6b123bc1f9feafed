"""Peak memory of training and of merging.

    python -m benchmarks.memory train [--data DIR --domain FILE] [--only METHOD ...] [--zero 0 1 2 3] [--add] [--again]
    python -m benchmarks.memory merge [--only NUMBER ...]

Each case runs in processes of its own, which first do the same with something tiny, so that code and libraries that
load at their first use do not count.

train: two steps of two micro-batches by method, with and without activation checkpointing, and under ZeRO in two
processes, beside the estimate. The measure is the peak of resident memory (VmHWM) less what was resident before
the base was loaded. The base's weights are copied out of their file, as a GPU would get them: as pages of a mapped file
they become resident when something reads them. glibc gives freed blocks back at once, so that resident memory is memory
in use. --add keeps the other rows of the result file; --again estimates its rows again and measures nothing.

merge: peaks from right before the merge, beside the size of the merged checkpoint, of anonymous memory (RssAnon, which
the process has written) and of all resident memory (with pages of mapped files, which the system can drop). Bases are
SmolLM2-135M and random Llamas of about 0.45 GB as merged.
"""

import argparse
import contextlib
import functools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
import transformers

from benchmarks import measuring
from benchmarks.measuring import ROOT, Benchmark, in_processes, memory_mib, read_streams, run
from benchmarks.training import behavior_trainer, make_bundle, training_arguments, warm_up
from llmrec_peft import Domain, load_classifier, merge_bundle
from llmrec_peft.data.streams import StreamSubset
from llmrec_peft.memory.estimate import estimate_memory
from llmrec_peft.memory.memory_options import MemoryConfig
from llmrec_peft.merging.merge_bundle import MergeOptions
from llmrec_peft.models.base import load_config, load_tokenizer
from llmrec_peft.training.distributed import device_arguments

MIB = 2**20


# -- train -----------------------------------------------------------------------------------------

METHODS = ("full", "lora", "adapter", "qlora", "head")
CASE = ("method", "activation_checkpointing", "zero", "gpus")
STEPS, BATCH = 2, 2  # BATCH streams a step and process, each a micro-batch
MALLOC = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0",
          "MALLOC_TOP_PAD_": "0"}  # fmt: skip


def train_case(case: dict, given: dict, scratch: str) -> dict:
    """In a process of its own: train on the longest streams of at most `micro_tokens` tokens."""
    options = argparse.Namespace(**given)
    streams, count = read_streams(options).train, STEPS * BATCH * case["gpus"]
    fitting = np.flatnonzero(streams.lengths <= options.micro_tokens)
    chosen = fitting[np.argsort(-streams.lengths[fitting], kind="stable")][:count]
    if len(chosen) < count:
        raise SystemExit(f"only {len(chosen)} streams have {options.micro_tokens} tokens; raise --micro-tokens")
    load = {"domain": streams.domain, "method": case["method"],
            "activation_checkpointing": case["activation_checkpointing"]}  # fmt: skip

    def settings() -> transformers.TrainingArguments:
        return training_arguments(scratch, per_device_train_batch_size=BATCH, optim="adamw_torch", **device_arguments())

    def trainer_of(classifier, windows: np.ndarray, arguments):
        return behavior_trainer(classifier, arguments, StreamSubset(streams, windows), options.micro_tokens)

    tiny_place = Path(scratch, f"tiny-{os.getpid()}")
    make_base(tiny_place, "float32", 1, 64, streams.vocabulary.tokenizer)
    tiny = load_classifier(str(tiny_place), **load)
    if case["zero"]:  # a process makes one engine of DeepSpeed, so that the trainer cannot go first
        warm_up(tiny)
    else:
        trainer_of(tiny, chosen[:BATCH], settings()).train()
    arguments = settings()  # ZeRO-3 partitions what is loaded from here on
    del tiny
    measuring.release_memory()
    before = memory_mib("VmRSS")
    classifier = load_classifier(options.base, **load)
    for parameter in classifier.parameters():
        parameter.data = parameter.data.clone()
    trainer = trainer_of(classifier, chosen, arguments)
    measuring.reset_peak()
    trainer.train()
    lengths, targets = streams.lengths[chosen], np.diff(streams.target_offsets)[chosen]
    return {"measured_mib": memory_mib() - before, "before_mib": before, "length": int(lengths.max()),
            "targets": int(targets[lengths.argmax()]), "steps": trainer.state.global_step}  # fmt: skip


def train(options: argparse.Namespace, scratch: Path) -> dict:
    """Peak memory of training by method, beside the estimate."""
    old = json.loads(options.output.read_text(encoding="utf-8")) if options.add or options.again else {"rows": []}
    rows = {tuple(row[name] for name in CASE): row for row in old["rows"]}
    given = {key: getattr(options, key) for key in ("data", "domain", "base", "micro_tokens")}
    if options.again:
        measured = [({name: row[name] for name in CASE}, row["processes"]) for row in old["rows"]]
    else:
        measured = ((case, train_measured(case, given, scratch)) for case in cases(options))
    for case, processes in measured:
        sizes = {"micro_tokens": processes[0]["length"], **{key: processes[0][key] for key in ("length", "targets")}}
        parts = estimate_memory(MemoryConfig(base=options.base, device="cpu", **case, **sizes))
        peak = max(entry["measured_mib"] for entry in processes)
        rows[tuple(case.values())] = {
            **case, **sizes, "processes": processes, "measured_mib": peak, "estimated_mib": parts.device / MIB,
            "ratio": parts.device / MIB / peak,
            "parts_mib": {part.name: part.device / MIB for part in parts.parts},
        }  # fmt: skip
    # By this a result can be estimated again where the base is not at hand.
    config = {key: value for key, value in load_config(options.base).to_diff_dict().items() if key != "_name_or_path"}
    order = sorted(rows, key=lambda key: (key[2], METHODS.index(key[0]), key[1], key[3]))
    return {"base_config": config, "rows": [rows[key] for key in order]}


def cases(options: argparse.Namespace) -> list[dict]:
    """One process for each method with and without checkpointing; two processes for each stage of ZeRO."""
    return [
        {"method": method, "activation_checkpointing": on, "zero": zero, "gpus": 2 if zero else 1}
        for zero in options.zero for method in options.only for on in ((False,) if zero else (False, True))
        if not (method == "qlora" and zero == 3)
    ]  # fmt: skip


def train_measured(case: dict, given: dict, scratch: Path) -> list[dict]:
    """What each process of a case found."""
    config = ROOT / "accelerate_configs" / f"zero{case['zero']}.yaml"
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config), "--num_processes",
                str(case["gpus"])] if case["zero"] else [sys.executable]  # fmt: skip
    # DeepSpeed compiles at its first use.
    extensions = os.environ.get("TORCH_EXTENSIONS_DIR", str(scratch / "extensions"))
    return in_processes(__file__, scratch, "train_case", case, given, str(scratch), launcher=launcher,
                        DS_ACCELERATOR="cpu", TORCH_EXTENSIONS_DIR=extensions, **MALLOC)[0]  # fmt: skip


# -- merge -----------------------------------------------------------------------------------------


def case(base: str, method: str, dtype: str, held: str = "float32") -> dict:
    """`held` is the number format of the base in memory, `dtype` that of the merged checkpoint."""
    return {"base": base, "method": method, "held": held, "dtype": dtype}


BASES = {"tiny": ("float32", 1, 64), "llama": ("float32", 8, 768), "deep llama": ("float32", 20, 768),
         "bfloat16 llama": ("bfloat16", 20, 768)}  # fmt: skip
"""Number format on the disk, layers, width. With more layers, what does not grow with the weights weighs as much."""
CASES = [
    *(case("llama", method, "float32") for method in ("lora", "qlora", "full")),
    *(case("deep llama", method, "bfloat16") for method in ("lora", "qlora", "full")),
    case("bfloat16 llama", "lora", "bfloat16", held="bfloat16"),
    case("bfloat16 llama", "lora", "float32"),
    case("bfloat16 llama", "lora", "bfloat16"),
    case("smollm2-135m", "lora", "float32"),
    case("smollm2-135m", "qlora", "float32"),
]


def make_base(directory: str | Path, dtype: str, layers: int, width: int, tokenizer=None) -> None:
    """A random Llama, by default with SmolLM2's tokenizer."""
    tokenizer, heads = tokenizer or load_tokenizer("smollm2-135m"), width // 64
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads, pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.to(getattr(torch, dtype)).save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def bundle_case(directory: str, base: str, method: str, held: str) -> None:
    """In a process of its own: make a bundle."""
    domain = Domain.from_yaml(ROOT / "recipes/configs/movies/domain.yaml")
    make_bundle(directory, base, domain, method, dtype=held)


def merge_case(scratch: str, dtype: str) -> dict:
    """In a process of its own: merge a tiny bundle of the same method, wait to be watched, and merge the bundle."""
    merge_bundle(Path(scratch, "tiny-bundle"), Path(scratch, "tiny-merged"), MergeOptions(dtype=dtype))
    measuring.release_memory()
    print("ready", flush=True)
    sys.stdin.readline()
    return merge_bundle(Path(scratch, "bundle"), Path(scratch, "merged"), MergeOptions(dtype=dtype))


def watch_merge(process: subprocess.Popen) -> dict[str, float]:
    """Peaks of anonymous and of all resident memory above the start, read every 2 ms."""
    while process.stdout.readline() not in ("ready\n", ""):
        pass

    def read() -> list[float]:
        with contextlib.suppress(OSError):  # the process may end meanwhile
            return [memory_mib(key, process.pid) or 0.0 for key in ("RssAnon", "VmRSS")]
        return [0.0, 0.0]

    start = peaks = read()
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write("go\n")
        process.stdin.flush()
    samples = 0
    while process.poll() is None:
        peaks, samples = list(map(max, peaks, read())), samples + 1
        time.sleep(0.002)
    return {"anonymous_mib": peaks[0] - start[0], "resident_mib": peaks[1] - start[1], "samples": samples}


def merge_measured(entry: dict, scratch: Path) -> dict:
    """Merge one case in a process of its own."""
    for base in ("tiny", entry["base"]):
        if base in BASES and not (scratch / base).exists():
            in_processes(__file__, scratch, "make_base", str(scratch / base), *BASES[base])
    place = str(scratch / entry["base"]) if entry["base"] in BASES else entry["base"]
    for target, base in (("bundle", place), ("tiny-bundle", str(scratch / "tiny"))):
        in_processes(__file__, scratch, "bundle_case", str(scratch / target), base, entry["method"], entry["held"])
    (found,), seen = in_processes(__file__, scratch, "merge_case", str(scratch), entry["dtype"], watch=watch_merge)
    size = found["bytes"] / MIB
    named = ("seconds", "max_difference", "mean_difference", "spread", "answers")
    return {**entry, "checkpoint_mib": size, **seen, "anonymous_ratio": seen["anonymous_mib"] / size,
            "resident_ratio": seen["resident_mib"] / size, **{key: found[key] for key in named}}  # fmt: skip


def merge(options: argparse.Namespace, scratch: Path) -> dict:
    """Peak memory and time of merging a bundle, beside the size of the merged checkpoint."""
    return {"rows": [merge_measured(CASES[number], scratch) for number in options.only]}


BENCHMARKS = {
    "train": Benchmark(train, "memory.json", {
        "only": (list(METHODS), "methods", METHODS), "zero": ([0, 1, 2, 3], "stages of ZeRO", range(4)),
        "micro_tokens": (600, "tokens of a micro-batch, at most"),
        "add": (False, "keep the other rows of the result file"),
        "again": (False, "estimate the rows of the result file again, and measure nothing"),
    }),
    "merge": Benchmark(merge, "merge.json", {"only": (list(range(11)), "numbers of cases (default: all)")}),
}  # fmt: skip


main = functools.partial(run, __file__, __doc__, BENCHMARKS)

if __name__ == "__main__":
    main()
