"""What the benchmarks share: the machine and its rates, memory, medians with their spread, and the result file."""

import ctypes
import functools
import gc
import importlib.metadata
import itertools
import json
import logging
import math
import os
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

STARTED = time.perf_counter()
PACKAGES = ("torch", "transformers", "peft", "accelerate", "tokenizers", "numpy")


def machine() -> dict[str, Any]:
    """Processor, cores, threads and memory."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "cpu": model,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(memory, 1),
        "system": f"{platform.system()} {platform.machine()}",
    }


def versions() -> dict[str, str]:
    """Python's and the packages' versions."""
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in PACKAGES}}


def command(
    script: str, arguments: Sequence[str], paths: Iterable[str] = ("--data", "--base", "--bundle", "--output")
) -> str:
    """The command as it was given; paths are cut to their last name, those of the repository to their place in it."""
    root = Path(__file__).resolve().parent.parent

    def shown(word: str) -> str:
        path = Path(word)
        if not path.is_absolute():
            return word
        return str(path.relative_to(root)) if path.is_relative_to(root) else path.name

    words = [
        Path(word).name if before in paths else shown(word) for before, word in itertools.pairwise(["", *arguments])
    ]
    return " ".join(["python", f"benchmarks/{Path(script).name}", *words])


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and greatest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def cell(values: dict[str, float] | None, form: str) -> str:
    """A spread as text."""
    if values is None:
        return "not known"
    low, high = form.format(values["min"]), form.format(values["max"])
    return f"{form.format(values['median'])} ({low} to {high})"


def plain_interval(found: Any) -> dict[str, float | None]:
    """An interval of evaluation.bootstrap as JSON: its value and ends, null where there is none, as with one user."""
    numbers = {key: float(getattr(found, key)) for key in ("value", "low", "high")}
    return {key: number if math.isfinite(number) else None for key, number in numbers.items()}


def plain_intervals(found: Mapping[str, Any]) -> dict[str, dict[str, float | None]]:
    """The same of several, by name."""
    return {name: plain_interval(one) for name, one in found.items()}


def matmul_rate(sizes: Sequence[int], operations: float = 1.4e11) -> dict[int, float]:
    """Float32 operations a second of torch.mm on square matrices of each size, over about `operations` or 100 products.

    A product of n x n matrices counts 2 n^3.
    """
    rates = {}
    for size in sizes:
        a, b = torch.rand(size, size), torch.rand(size, size)
        out = torch.mm(a, b)
        repeats = min(100, max(1, round(operations / (2 * size**3))))
        start = time.perf_counter()
        for _ in range(repeats):
            torch.mm(a, b, out=out)
        rates[size] = repeats * 2 * size**3 / (time.perf_counter() - start)
    return rates


def attention_flops(lengths: Sequence[int], width: int, layers: int, *, training: bool = True) -> float:
    """Operations of causal attention's own two products, over rows of `lengths` tokens.

    Scores and their sum with the values take 2 * width each for every pair of a token and one at or before it, `width`
    being heads times a head's size; the backward pass takes twice the forward's (PaLM, arXiv 2204.02311, appendix B,
    counts the same, and pairs that the mask forbids too). What a kernel computes twice counts once.
    """
    pairs = sum(length * (length + 1) / 2 for length in lengths)
    return (3 if training else 1) * 4 * width * pairs * layers


def attention_of(positions: np.ndarray, config, *, training: bool) -> float:
    """Operations of attention's products for tokens at `positions`, int [L], in the order of the model's input.

    A token at position p sees itself and the p before it on its way, whatever probes lie between. Tokens at positions
    a to b thus see as much as a plain row of b + 1 tokens does less what one of a tokens does.
    """
    text = config.get_text_config()
    width = text.num_attention_heads * (getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)
    jumps = np.flatnonzero(np.diff(positions) != 1) + 1
    first, last = positions[np.r_[0, jumps]].tolist(), positions[np.r_[jumps, len(positions)] - 1].tolist()
    count = functools.partial(attention_flops, width=width, layers=text.num_hidden_layers, training=training)
    return count([end + 1 for end in last]) - count(first)


def release_memory() -> None:
    """Give freed memory back to the system, so that the next peak is not the last one's."""
    gc.collect()
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def reset_peak() -> None:
    """Start a new peak of resident memory, where the system can (Linux)."""
    release_memory()
    path = Path("/proc/self/clear_refs")
    if path.exists():
        path.write_text("5")


def memory_mib(key: str = "VmHWM") -> float | None:
    """The peak (VmHWM) or present (VmRSS) resident memory in MiB; None where the system does not tell."""
    path = Path("/proc/self/status")
    for line in path.read_text().splitlines() if path.exists() else []:
        if line.startswith(key):
            return int(line.split()[1]) / 1024
    return None


def accelerate_command(name: str, processes: int) -> list[str]:
    """The start of a command that launches `processes` by a file of accelerate_configs/."""
    config = Path(__file__).resolve().parent.parent / "accelerate_configs" / f"{name}.yaml"
    return [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config),
            "--num_processes", str(processes)]  # fmt: skip


def launch_environment(scratch: Path, **variables: str) -> dict[str, str]:
    """Of a launch on the CPU; DeepSpeed compiles into `scratch` at its first use, unless the user names a place."""
    found = {**os.environ, "DS_ACCELERATOR": "cpu", "TOKENIZERS_PARALLELISM": "false", **variables}
    found.setdefault("TORCH_EXTENSIONS_DIR", str(scratch / "extensions"))
    return found


def write_result(path: str | Path, result: dict[str, Any]) -> None:
    """Write JSON under a temporary name and move it into place; `minutes` since the script began unless it says."""
    path = Path(path)
    result = {**result, "minutes": result.get("minutes", (time.perf_counter() - STARTED) / 60)}
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
    os.replace(scratch, path)


@contextmanager
def quiet() -> Iterator[None]:
    """Without the libraries' notes on what a benchmark does on purpose, so that its table can be read."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        # PEFT asks the base for an attribute that Transformers has renamed.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield


def header(script: str, arguments: Sequence[str], seed: int) -> dict[str, Any]:
    """The part that every result file starts with."""
    return {
        "command": command(script, arguments),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "seed": seed,
        "machine": machine(),
        "versions": versions(),
    }


def stop(message: str) -> None:
    """End the script with one line and exit code 2."""
    print(message, file=sys.stderr)
    raise SystemExit(2)
