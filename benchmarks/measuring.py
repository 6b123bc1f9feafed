"""Shared by the benchmarks: options, processes, result files, timing in turns, memory and intervals.

Run a benchmark as a module from the repository's root: `python -m benchmarks.train_speed compare --data DIR`.
"""

import argparse
import ctypes
import gc
import importlib.metadata
import json
import logging
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
import yaml

from benchmarks import results_page
from llmrec_peft import BehaviorLog, Domain, LLMRecError
from llmrec_peft.config.schema import DataConfig
from llmrec_peft.evaluation.bootstrap import differences, intervals
from llmrec_peft.files import plain, write_json
from llmrec_peft.models.base import load_tokenizer, resolve_base
from llmrec_peft.runs.split_streams import SplitStreams, build_split_streams
from llmrec_peft.runs.split_streams import read_log as read_configured_log

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
CONFIGS = ROOT / "recipes" / "configs"
RECIPE = yaml.safe_load((CONFIGS / "movies" / "lora.yaml").read_text(encoding="utf-8"))
PACKAGES = ("torch", "transformers", "peft", "accelerate", "tokenizers", "numpy")
PLACES = ("--data", "--base", "--bundle", "--output", "--teacher", "--swift-env")
STARTED = time.perf_counter()


# -- the command line ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Benchmark:
    """A function of its options and of a scratch directory, and what it takes from the command line.

    options: name to (default, help) or (default, help, choices). An option has its default's type; a list takes
    several values; an integer must be 1 or more unless a default is 0. None is text without a default, and `...` is
    text that must be given. A name with a leading `*` is positional.
    result: name of the result file; `{domain}` stands for the name of the domain file's directory.
    domain: its configuration directory is the default of --domain; `shop` reads a simulated log by default.
    """

    measure: Callable[[argparse.Namespace, Path], dict]
    result: str
    options: Mapping[str, tuple] = field(default_factory=dict)
    domain: str = "shop"

    def add_options(self, parser: argparse.ArgumentParser) -> None:
        """Declare the options."""
        data = "simulated:shop" if self.domain == "shop" else ...
        shared = {
            "data": (data, "directory of a log, or simulated:shop"),
            "domain": (str(CONFIGS / self.domain / "domain.yaml"), "domain file"),
            "base": ("smollm2-135m", "base model"),
            "seed": (0, "seed of everything that is drawn"),
            "output": (None, f"result file (default: benchmarks/results/{self.result})"),
        }
        for name, (default, text, *choices) in (shared | self.options).items():
            several = isinstance(default, list)
            known: dict[str, Any] = {"help": text, "choices": choices[0] if choices else None}
            if isinstance(default, bool):
                known = {"help": text, "action": "store_true"}
            elif default is not None and default is not ...:
                known |= {"type": type(default[0]) if several else type(default), "default": default}
                known["nargs"] = "+" if several else None
            if name.startswith("*"):
                parser.add_argument(name[1:], nargs="*", help=text)
            else:
                parser.add_argument("--" + name.replace("_", "-"), required=default is ..., **known)

    def check(self, options: argparse.Namespace) -> None:
        """End the script with one line for a number that is too small."""
        for name, (default, *_) in self.options.items():
            lists = default if isinstance(default, list) else [default]
            if all(type(number) is int for number in lists):
                least, given = min(1, *lists), getattr(options, name)
                low = min(given if isinstance(given, list) else [given])
                if low < least:
                    stop(f"--{name.replace('_', '-')} must be at least {least}, got {low}")


def run(
    script: str, doc: str, benchmarks: Benchmark | Mapping[str, Benchmark], arguments: Sequence[str] | None = None
) -> dict:
    """Parse the options, measure, write the result and print it; returns it. A usual error ends with one line."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    if isinstance(benchmarks, Benchmark):
        benchmarks.add_options(parser)
    else:
        commands = parser.add_subparsers(dest="benchmark", required=True)
        for name, one in benchmarks.items():
            one.add_options(commands.add_parser(name, help=(one.measure.__doc__ or "").splitlines()[0]))
    given = sys.argv[1:] if arguments is None else list(arguments)
    if given[:1] == ["child"]:
        return _run_child(*given[1:])
    options = parser.parse_args(given)
    benchmark = benchmarks if isinstance(benchmarks, Benchmark) else benchmarks[options.benchmark]
    options.output = Path(options.output or RESULTS / benchmark.result.format(domain=Path(options.domain).parent.name))
    benchmark.check(options)
    try:
        with quiet(), tempfile.TemporaryDirectory() as scratch:
            found = benchmark.measure(options, Path(scratch))
    except LLMRecError as error:
        stop(str(error))
    names = [name.lstrip("*") for name in ("base", *benchmark.options)]
    settings = {name: getattr(options, name) for name in names if f"--{name.replace('_', '-')}" not in PLACES[2:]}
    settings |= {"base": Path(options.base).name, **found.pop("settings", {})}
    result = header(command(script, given), options.seed) | {"settings": settings} | found
    write_result(options.output, result)
    print(results_page.section(benchmark.result, json.loads(options.output.read_text(encoding="utf-8"))))
    return result


def module_of(script: str) -> str:
    """The name by which `python -m` runs a file of the benchmarks."""
    return ".".join(Path(script).resolve().relative_to(ROOT).with_suffix("").parts)


def in_processes(
    script: str, scratch: Path, name: str, *arguments: Any, launcher: Sequence[str] = (sys.executable,), watch=None,
    **environment: str,
) -> tuple[list[dict], Any]:  # fmt: skip
    """Call a function of a benchmark's file in processes of its own: what each returned, and what `watch` returned.

    watch: called with the running process; it may read the standard output and write the standard input.
    """
    for old in scratch.glob("found.*"):
        old.unlink()
    words = [*launcher, "-m", module_of(script), "child", name, json.dumps(arguments), str(scratch / "found")]
    variables = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": str(ROOT), **environment}
    errors = scratch / "errors"
    with (
        errors.open("w") as stderr,
        subprocess.Popen(
            words, env=variables, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True
        ) as process,
    ):
        seen = watch(process) if watch else None
        process.communicate()
    if process.returncode:
        stop(f"{name} {arguments} ended with exit code {process.returncode}:\n{errors.read_text()[-4000:]}")
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(scratch.glob("found.*"))], seen


def _run_child(name: str, arguments: str, place: str) -> dict:
    """The other end of `in_processes`."""
    with quiet():
        found = getattr(sys.modules["__main__"], name)(*json.loads(arguments))
    Path(f"{place}.{os.environ.get('RANK', 0)}").write_text(json.dumps(found), encoding="utf-8")
    return found


def stop(message: str) -> None:
    """End the script with one line and exit code 2."""
    print(message, file=sys.stderr)
    raise SystemExit(2)


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the libraries' warnings about what a benchmark does on purpose."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        # PEFT asks the base for an attribute that Transformers has renamed.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield


# -- result files ----------------------------------------------------------------------------------


def command(script: str, arguments: Sequence[str]) -> str:
    """The command as it was given; a path outside the repository is cut to its last name."""
    words, before = [], ""
    for word in arguments:
        name, equals, place = word.rpartition("=")
        path = Path(place)
        if before in PLACES or (equals and path.is_absolute()):
            shown = f"{name}=OUT/{path.name}" if equals else path.name
        elif path.is_absolute():
            shown = str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name
        else:
            shown = word
        words.append(shown)
        before = word
    return " ".join(["python -m", module_of(script), *words])


def header(text: str, seed: int) -> dict[str, Any]:
    """What every result file starts with: command, date, seed, machine and versions."""
    cpu, cpuinfo = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []:
        if line.startswith("model name"):
            cpu = line.split(":", 1)[1].strip()
    machine = {
        "cpu": cpu,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
    }
    versions = {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in PACKAGES}}
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return {"command": text, "date": now, "seed": seed, "machine": machine, "versions": versions}


def write_result(path: str | Path, result: dict[str, Any]) -> None:
    """Write JSON atomically, with the minutes since the script began, and the result's plots beside it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json({**result, "minutes": (time.perf_counter() - STARTED) / 60}, path)
    if path.stem in ("cost_curves", "peers", "students"):
        from benchmarks import plots

        plots.draw(path)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, minimum and maximum."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


# -- logs ------------------------------------------------------------------------------------------


def read_log(options: argparse.Namespace) -> BehaviorLog:
    """The log of --data."""
    return read_configured_log(DataConfig(path=options.data))


def read_streams(options: argparse.Namespace, domain: Domain | None = None) -> SplitStreams:
    """The streams of --data under --domain, or under another domain, in the tokens of --base."""
    domain = domain or Domain.from_yaml(options.domain)
    return build_split_streams(read_log(options), domain, load_tokenizer(resolve_base(options.base)))


# -- time and memory -------------------------------------------------------------------------------


def in_turns(
    ways: Mapping[str, Callable[[], Any]], rounds: int, before: Callable[[], Any] = lambda: None
) -> dict[str, list[float]]:
    """Seconds of each way in each round, after a round that does not count; every other round goes backwards.

    before: called at the start of each round, outside the time.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(-1, rounds):
        before()
        for name in list(ways) if number % 2 else list(ways)[::-1]:
            start = time.perf_counter()
            ways[name]()
            if number >= 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratios(seconds: Mapping[str, Sequence[float]], slow: str, fast: str) -> dict[str, float]:
    """Spread of how many times as fast one way is as another, round by round."""
    return spread([a / b for a, b in zip(seconds[slow], seconds[fast], strict=True)])


def release_memory() -> None:
    """Give freed memory back to the system, so that it does not count in the next peak."""
    gc.collect()
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def reset_peak() -> None:
    """Start a new peak of resident memory (Linux)."""
    release_memory()
    path = Path("/proc/self/clear_refs")
    if path.exists():
        path.write_text("5")


def memory_mib(key: str = "VmHWM", process: int | str = "self") -> float | None:
    """Peak (VmHWM), present (VmRSS) or anonymous (RssAnon) resident memory in MiB; None where Linux does not tell."""
    path = Path(f"/proc/{process}/status")
    for line in path.read_text().splitlines() if path.exists() else []:
        if line.startswith(key):
            return int(line.split()[1]) / 1024
    return None


# -- intervals -------------------------------------------------------------------------------------


def plain_intervals(found: Mapping[str, Any]) -> dict[str, dict[str, float | None]]:
    """Intervals of evaluation.bootstrap for JSON: value, low and high; null where there is none, as with one user."""
    return plain({name: {key: getattr(one, key) for key in ("value", "low", "high")} for name, one in found.items()})


def metrics_of(
    names: Sequence[str], labels: np.ndarray, p: np.ndarray, users: np.ndarray, *, minus: np.ndarray | None = None,
    **draw: int,
) -> dict[str, dict[str, float | None]]:  # fmt: skip
    """Metrics of probabilities p [n, labels] with intervals over users; with `minus`, paired differences to it."""
    if minus is None:
        return plain_intervals(intervals(names, labels, p, users, **draw))
    return plain_intervals(differences(names, labels, minus, p, users, **draw))


def columns(p: np.ndarray) -> np.ndarray:
    """Probabilities [n, 2] of both labels from the chance [n] of label 1."""
    p = np.clip(p, 1e-7, 1 - 1e-7)
    return np.column_stack([1 - p, p])
