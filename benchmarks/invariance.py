"""One global batch, one result: trained tensors of every launch beside those of one process, and a plain Trainer's.

    python benchmarks/invariance.py [--data DIR] [--methods lora full ...] [--launchers ddp zero3 ...] [--steps 3]

Each launch trains all methods on the same few streams, of unequal numbers of targets, in float32 by plain SGD: one
process (also with accumulation over 2 and 4 steps), two processes by torchrun (DDP, gloo), and two by accelerate with
the files for ZeRO-1, ZeRO-2 and ZeRO-3. For each is shown the largest absolute and the mean signed difference of all
trained numbers from those of the one process; a lost factor shows in the mean. Exit code 1, with a line a cell, where
the package's are more than `--tolerance` apart.

Beside it the same launches of the plain way (peers/plain.py: PEFT's LoRA, the stock Trainer) on the same targets, as
prompts: equally many a step and a process, so that all launches have the same ones in each step. Both sides go without
Adam and clipping, which take a constant factor out of the gradient (Adam up to its epsilon, clipping where it acts).
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measuring import accelerate_command, header, launch_environment, stop, write_result

ROOT = Path(__file__).resolve().parent
BATCH = 4  # streams of a global batch
REFERENCE = "one"
LAUNCHERS = {  # name: heading, processes, accumulation
    REFERENCE: ("one process", 1, 1),
    "accumulate2": ("accum. 2", 1, 2),
    "accumulate4": ("accum. 4", 1, 4),
    "ddp": ("DDP x2", 2, 1),
    "zero1": ("ZeRO-1 x2", 2, 1),
    "zero2": ("ZeRO-2 x2", 2, 1),
    "zero3": ("ZeRO-3 x2", 2, 1),
}
CASES = {  # name: method, loss; full, which takes most memory, comes last
    "lora": ("lora", "cross_entropy"),
    "lora, weighted": ("lora", "weighted"),
    "lora, listwise": ("lora", "listwise"),
    "qlora": ("qlora", "cross_entropy"),
    "adapter": ("adapter", "cross_entropy"),
    "head": ("head", "cross_entropy"),
    "plain": ("plain", "cross_entropy"),
    "full": ("full", "cross_entropy"),
}
METHODS = ("lora", "qlora", "adapter", "head", "full")


def chosen_cases(options: argparse.Namespace) -> list[dict]:
    """The cases of one launch, in order."""
    return [
        {"name": name, "method": method, "loss": loss}
        for name, (method, loss) in CASES.items()
        if method in (*options.methods, "plain")
    ]


def launch(name: str, options: argparse.Namespace, scratch: Path) -> dict:
    """Run one launch in processes of its own; what they found, of several the worst."""
    _, processes, accumulation = LAUNCHERS[name]
    settings = {
        "base": options.base, "data": options.data, "domain": str(Path(options.domain).resolve()),
        "steps": options.steps, "batch": BATCH, "seed": options.seed, "micro_tokens": options.micro_tokens,
        "learning_rate": options.learning_rate, "accumulation": accumulation, "cases": chosen_cases(options),
        "is_reference": name == REFERENCE, "reference": str(scratch), "scratch": str(scratch / "scratch"),
        "output": str(scratch / name),
    }  # fmt: skip
    worker = [str(ROOT / "invariance_worker.py"), json.dumps(settings)]
    done = subprocess.run(
        [*command_of(name, processes), *worker], env=environment(processes, scratch), capture_output=True, text=True
    )
    if done.returncode == 2 and processes == 1:
        stop(done.stderr.strip().splitlines()[-1])
    if done.returncode:
        raise SystemExit(f"{done.stderr[-4000:]}\nlaunch {name} ended with code {done.returncode}; see above")
    found = [json.loads(Path(f"{scratch / name}.{rank}.json").read_text()) for rank in range(processes)]
    if found[0]["world"] != processes:
        raise SystemExit(f"launch {name} had {found[0]['world']} processes that knew of each other, not {processes}")
    return {"data": found[0]["data"], "cells": {case: worst([rank["cases"][case] for rank in found])
                                                for case in found[0]["cases"]}}  # fmt: skip


def command_of(name: str, processes: int) -> list[str]:
    """The start of a launch's command, as users give it."""
    if processes == 1:
        return [sys.executable]
    if name == "ddp":
        return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return accelerate_command(name, processes)


def environment(processes: int, scratch: Path) -> dict[str, str]:
    """The CPU alone, and its cores shared out."""
    found = launch_environment(scratch, CUDA_VISIBLE_DEVICES="")
    found.pop("ACCELERATE_USE_CPU", None)  # with it Accelerate leaves DeepSpeed out
    found.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    return found


def worst(ranks: list[dict]) -> dict:
    """The rank that ended farthest from the one process; a NaN is farther than all."""
    return max(ranks, key=lambda cell: float("inf") if cell.get("max", 0) != cell.get("max", 0) else cell.get("max", 0))


def failures(cells: dict[str, dict[str, dict]], tolerance: float) -> list[str]:
    """A line for each cell (case, launcher) of the package that is not within `tolerance`, or could not have failed.

    A cell whose weights hardly moved in one process says nothing: they must have moved by 100 tolerances.
    """
    lines = []
    for case, row in cells.items():
        if case == "plain":
            continue
        one = row[REFERENCE]
        if "refused" in one or not one["moved_max"] >= 100 * tolerance:
            why = "is refused" if "refused" in one else f"moves weights by {one['moved_max']:.1e} at most"
            lines.append(f"{case} x {REFERENCE}: {why}, so that nothing can be compared")
            continue
        for name, cell in row.items():
            if "refused" not in cell and not cell["max"] <= tolerance:
                lines.append(f"{case} x {name}: differs by {cell['max']:.1e} at most and {cell['mean']:+.1e} in the "
                             f"mean; no number may differ by more than {tolerance:g}")  # fmt: skip
    return lines


def table(cells: dict[str, dict[str, dict]]) -> str:
    """The cells as text: two lines for each of the package's cases, four for the plain way's."""
    names = [name for name in next(iter(cells.values())) if name != REFERENCE]
    width = max(len("  gradient x"), *map(len, cells))
    lines = [" ".join([" " * width, f"{'moved':>9}", *(f"{LAUNCHERS[name][0]:>10}" for name in names)])]

    def line(title: str, first: str, values: list[str]) -> None:
        lines.append(" ".join([f"{title:<{width}}", f"{first:>9}", *(f"{value:>10}" for value in values)]))

    def each(row: dict[str, dict], form) -> list[str]:
        return ["refused" if "refused" in row[name] else form(row[name]) for name in names]

    for case, row in sorted(cells.items(), key=lambda item: item[0] == "plain"):
        one = row[REFERENCE]
        if case == "plain":
            lines.append("plain Trainer")
        title = "lora" if case == "plain" else case
        line(title, f"{one['moved_max']:.1e}", each(row, lambda cell: f"{cell['max']:.1e}"))
        line("  mean", "", ["" if "refused" in row[name] else f"{row[name]['mean']:+.1e}" for name in names])
        if case == "plain":
            line("  / moved", "", each(row, lambda cell, top=one["moved_max"]: f"{cell['max'] / top:.2g}"))
            line("  gradient x", "", each(row, lambda cell, own=one["first_step"]: f"{cell['first_step'] / own:.3f}"))
    return "\n".join(lines)


def described(result: dict) -> str:
    """What the table was measured on, and how to read it."""
    data, settings = result["data"], result["settings"]
    return (
        f"base {Path(settings['base']).name}, log {data['log']}: {settings['steps']} SGD steps of {BATCH} streams, "
        f"float32 on {result['machine']['cores']} CPU cores\n"
        f"({data['streams']} streams of {min(data['targets'])} to {max(data['targets'])} targets, "
        f"{sum(data['targets'])} in all, {sum(data['tokens'])} tokens)\n"
        "moved: largest change of a number in one process. Then, for each launch, the largest difference from one\n"
        "process, and the mean one. / moved: in units of the largest change. gradient x: length of the first step's\n"
        "change, in units of that in one process."
    )


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="simulated:shop", help="directory of a log, or simulated:shop")
    parser.add_argument("--domain", default=str(ROOT.parent / "recipes/configs/shop/domain.yaml"), help="domain file")
    parser.add_argument("--base", default="smollm2-135m", help="base model")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS, help="methods of the package")
    parser.add_argument("--launchers", nargs="+", default=list(LAUNCHERS), choices=LAUNCHERS, metavar="LAUNCHER",
                        help=f"{', '.join(LAUNCHERS)}; {REFERENCE} is always there")  # fmt: skip
    parser.add_argument("--steps", type=int, default=3, help="SGD steps")
    parser.add_argument("--micro-tokens", type=int, default=300, help="tokens of a micro-batch, at most")
    parser.add_argument("--learning-rate", type=float, default=5e-3,
                        help="of SGD; weights must move enough for a difference to show")  # fmt: skip
    parser.add_argument("--tolerance", type=float, default=1e-5, help="of each trained number")
    parser.add_argument("--seed", type=int, default=0, help="of windows, adapters and order")
    parser.add_argument("--output", default=str(ROOT / "results" / "invariance.json"), help="result file")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> dict:
    """Run the launches, print the table and write the result; returns it."""
    options = parse(arguments)
    launchers = [name for name in LAUNCHERS if name in (REFERENCE, *options.launchers)]
    cells: dict[str, dict[str, dict]] = {case["name"]: {} for case in chosen_cases(options)}
    seconds: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name in launchers:
            began = time.perf_counter()
            found = launch(name, options, Path(scratch))
            seconds[name] = round(time.perf_counter() - began, 1)
            for case, cell in found["cells"].items():
                cells[case][name] = cell
            print(f"{LAUNCHERS[name][0]}: {seconds[name]:.0f} s", file=sys.stderr, flush=True)
    given = sys.argv[1:] if arguments is None else arguments
    settings = {key: value for key, value in vars(options).items() if key not in ("data", "domain", "output")}
    settings["base"] = Path(options.base).name
    result = {
        **header(__file__, given, options.seed),
        "settings": settings,
        "seconds": seconds,
        "data": found["data"],
        "cells": cells,
        "failures": failures(cells, options.tolerance),
    }
    write_result(options.output, result)
    print(described(result), table(cells), sep="\n\n")
    for line in result["failures"]:
        print(line, file=sys.stderr)
    return result


if __name__ == "__main__":
    sys.exit(1 if main()["failures"] else 0)
