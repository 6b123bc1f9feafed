"""Peak memory and time of merging a bundle, beside the size of the merged checkpoint.

    python benchmarks/merge.py [--only NUMBER ...] [--output FILE]

Each case merges in a process of its own, which has merged a tiny model before, so that code and libraries that load at
their first use do not count. Another process reads its resident memory every 2 ms from /proc: anonymous memory
(RssAnon, what the process has written) and all of it (VmRSS, with pages of mapped files, which the system can drop
again). Both count from right before the merge. Freed blocks that glibc keeps count as in use, as they are for a user.

The bases are SmolLM2-135M and random Llamas of about 0.45 GB as they are merged; all need SmolLM2's tokenizer. Those
whose merged checkpoint is bfloat16 have more layers, so that what does not grow with the weights (a tokenizer, the
activations of the answers, one layer in float32: about 0.1 GB) weighs as much.
"""

import argparse
import contextlib
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent
SEED = 0
MIB = 2**20


def case(base: str, method: str, dtype: str, held: str = "float32") -> dict:
    """`held` is the number format of the base in memory, `dtype` that of the merged checkpoint."""
    return {"base": base, "method": method, "held": held, "dtype": dtype}


BASES = {
    # number format on disk, layers, width
    "tiny": ("float32", 1, 64),
    "llama": ("float32", 8, 768),
    "deep llama": ("float32", 20, 768),
    "bfloat16 llama": ("bfloat16", 20, 768),
}
CASES = [
    case("llama", "lora", "float32"),
    case("llama", "qlora", "float32"),
    case("llama", "full", "float32"),
    case("deep llama", "lora", "bfloat16"),
    case("deep llama", "qlora", "bfloat16"),
    case("deep llama", "full", "bfloat16"),
    case("bfloat16 llama", "lora", "bfloat16", held="bfloat16"),
    case("bfloat16 llama", "lora", "float32"),
    case("bfloat16 llama", "lora", "bfloat16"),
    case("smollm2-135m", "lora", "float32"),
    case("smollm2-135m", "qlora", "float32"),
]


# -- what is merged --------------------------------------------------------------------------------


def make_base(directory: Path, dtype: str, layers: int, hidden: int) -> None:
    """A random Llama with SmolLM2's tokenizer."""
    import torch
    import transformers

    from llmrec_peft.models.base import load_tokenizer

    tokenizer = load_tokenizer("smollm2-135m")
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=layers,
        num_attention_heads=hidden // 64, num_key_value_heads=hidden // 64, pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(SEED)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.to(getattr(torch, dtype)).save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def make_bundle(directory: Path, base: str, method: str, held: str) -> None:
    """A bundle whose trained weights were moved by seeded noise, as training might have."""
    import torch

    from llmrec_peft.checkpoints.bundle import save_bundle
    from llmrec_peft.checkpoints.loading import load_classifier
    from llmrec_peft.data.domain import Domain

    domain = Domain.from_yaml(ROOT.parent / "recipes/configs/movies/domain.yaml")
    torch.manual_seed(SEED)
    classifier = load_classifier(base, domain, method, dtype=held)
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for value in classifier.parameters():
            if value.requires_grad:
                value.add_(0.1 * value.std().clamp(min=0.01) * torch.randn(value.shape, generator=generator))
    save_bundle(directory, classifier, classifier.tokenizer, domain.to_dict())


def merge_measured(bundle: str, dtype: str, scratch: Path) -> None:
    """Merge a tiny bundle of the same method, say so, wait for a word, and merge the bundle."""
    from measuring import quiet, release_memory

    from llmrec_peft.merging.merge_bundle import MergeOptions, merge_bundle

    with quiet():
        merge_bundle(scratch / "tiny-bundle", scratch / "tiny-merged", MergeOptions(dtype=dtype))
        release_memory()
        print("ready", flush=True)
        sys.stdin.readline()
        found = merge_bundle(bundle, scratch / "merged", MergeOptions(dtype=dtype))
    (scratch / "found.json").write_text(json.dumps(found))


# -- in the process that measures ------------------------------------------------------------------


def memory_of(pid: int) -> tuple[int, int]:
    """Anonymous and all resident memory of a process, bytes; zeros when it has ended."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
        return tuple(1024 * int(re.search(rf"^{key}:\s+(\d+)", text, re.M)[1]) for key in ("RssAnon", "VmRSS"))
    except (OSError, TypeError):
        return 0, 0


def prepare(*arguments: str | int) -> None:
    """Make something in a process of its own."""
    done = subprocess.run([sys.executable, __file__, "--child", json.dumps(arguments)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{arguments} failed:\n{done.stderr[-4000:]}")


def measure(entry: dict, scratch: Path) -> dict:
    """Merge one case in a process of its own; its peaks above the start and what it measured."""
    for base in ("tiny", entry["base"]):
        if base in BASES and not (scratch / base).exists():
            prepare("base", str(scratch / base), *BASES[base])
    place = str(scratch / entry["base"]) if entry["base"] in BASES else entry["base"]
    for target, base in (("bundle", place), ("tiny-bundle", str(scratch / "tiny"))):
        prepare("bundle", str(scratch / target), base, entry["method"], entry["held"])
    command = json.dumps(["merge", str(scratch / "bundle"), entry["dtype"], str(scratch)])
    log = scratch / "errors"
    with log.open("w") as errors, subprocess.Popen(
        [sys.executable, __file__, "--child", command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
        text=True,
    ) as child:  # fmt: skip
        while child.stdout.readline() not in ("ready\n", ""):
            pass
        start = memory_of(child.pid)
        with contextlib.suppress(BrokenPipeError):
            child.stdin.write("go\n")
            child.stdin.flush()
        peaks, samples = start, 0
        while child.poll() is None:
            peaks = tuple(map(max, peaks, memory_of(child.pid)))
            samples += 1
            time.sleep(0.002)
    if child.returncode:
        raise SystemExit(f"{entry} failed:\n{log.read_text()[-4000:]}")
    found = json.loads((scratch / "found.json").read_text())
    anonymous, resident = (peak - before for peak, before in zip(peaks, start, strict=True))
    return {
        **entry, "checkpoint_mib": found["bytes"] / MIB, "anonymous_mib": anonymous / MIB,
        "resident_mib": resident / MIB, "anonymous_ratio": anonymous / found["bytes"],
        "resident_ratio": resident / found["bytes"], "seconds": found["seconds"], "samples": samples,
        "max_difference": found["max_difference"], "mean_difference": found["mean_difference"],
        "spread": found["spread"], "answers": found["answers"],
    }  # fmt: skip


def main(arguments: list[str] | None = None) -> dict | None:
    """Measure, print and write the result; returns it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", type=int, default=range(len(CASES)), help="numbers of cases, from 0")
    parser.add_argument("--output", default=str(ROOT / "results" / "merge.json"), help="result file")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        kind, first, *rest = json.loads(options.child)
        child = {"base": make_base, "bundle": make_bundle, "merge": merge_measured}[kind]
        if kind == "merge":
            child(first, rest[0], Path(rest[1]))
        else:
            child(Path(first), *rest)
        return None
    from measuring import header, write_result

    given = sys.argv[1:] if arguments is None else arguments
    result = {**header(__file__, given, SEED), "rows": []}
    print(f"{'base':<15} {'method':<6} {'held as':<9} {'saved as':<9} {'MiB':>5} {'anonymous':>9} {'resident':>8} "
          f"{'s':>4} {'max difference':>14}")  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        for number in options.only:
            row = measure(CASES[number], Path(scratch))
            result["rows"].append(row)
            print(f"{row['base']:<15} {row['method']:<6} {row['held']:<9} {row['dtype']:<9} "
                  f"{row['checkpoint_mib']:>5.0f} {row['anonymous_ratio']:>9.2f} {row['resident_ratio']:>8.2f} "
                  f"{row['seconds']:>4.0f} {row['max_difference']:>14.1e}", flush=True)  # fmt: skip
            write_result(options.output, result)
    return result


if __name__ == "__main__":
    main()
