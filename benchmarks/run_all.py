"""The quick form of the benchmarks, one after the other: `make bench`, under half an hour on two cores.

    python -m benchmarks.run_all [--data DIR --domain recipes/configs/movies/domain.yaml] [--only protocol few_shot]

It trains a small LLM adapter, a fusion and two students by the recipes, compares them with the other systems, times
training and scoring, and prints the page of results. Quick forms show that everything runs; there are few steps, few
targets and one round, so quality says nothing. Without --data a simulated shop is drawn. A step that fails is named at
the end, and the others go on. Memory, merging, negatives and the size of an installation have no quick form.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.measuring import ROOT, header, module_of, write_result
from benchmarks.results_page import page


def plan(data: str, domain: Path, out: Path) -> dict[str, list[str]]:
    """Name and words after `python` of each step, in order; the recipes make what the others compare."""
    config, log, bundle = domain.parent, ["--data", data], str(out / "llm/bundle")
    both = [*log, "--domain", str(domain)]

    def recipe(name: str, place: str, *words: str) -> list[str]:
        return [f"recipes/{name}.py", "--data.path", data, *words, "--output_dir", str(out / place)]

    def module(name: str, result: str, *words: str) -> list[str]:
        return ["-m", f"benchmarks.{name}", *words, "--output", str(out / "results" / f"{result}.json")]

    student = ["--config", "recipes/configs/movies/distill.yaml", "--teacher", bundle, "--student.content", "false",
               "--evaluation.before", "false"]  # fmt: skip
    one = ["--rounds", "1"]
    return {
        "lora": recipe("lora", "llm", "--config", str(config / "lora.yaml"), "--domain", str(domain),
                       "--evaluation.before", "false", "--evaluation.valid_targets", "200", "--evaluation.test_targets",
                       "300", "--train.max_steps", "8", "--train.eval_steps", "0", "--train.early_stopping", "0"),
        "ids": recipe("distill", "ids", *student, "--loss.soft", "0", "--loss.pairs", "0"),
        "distill": recipe("distill", "ids_distilled", *student, "--teacher_outputs.targets", "400"),
        "index": recipe("index", "fuse", "--bundle", bundle, "--valid_targets", "200", "--test_targets", "300"),
        "protocol": module("quality.protocol", f"protocol_{config.name}", *both, "--no-text", "--bootstrap", "200",
                           f"llm={out / 'llm'}", f"fused={out / 'fuse'}:fused", f"ids={out / 'ids'}",
                           f"ids_distilled={out / 'ids_distilled'}"),
        "students": module("quality.students", "students", *log, "--teacher", str(out / "llm"),
                           f"ids={out / 'ids_distilled'}", f"ids_alone={out / 'ids'}", "--requests", "30",
                           "--slow-requests", "1", "--targets", "40", "--candidates", "20"),
        "recommend": module("quality.recommend", f"recommend_{config.name}", *log, "--bundle", bundle, "--targets",
                            "20", "--candidates", "10"),
        "few_shot": module("quality.few_shot", "few_shot", *both, "--targets", "16", "--seeds", "0", "--seen", "16",
                           "--history", "8", "--test-targets", "96"),
        "train_speed": module("train_speed", "train_speed", "compare", *both, *one, "--peer-targets", "3",
                              "--peer-batch-sizes", "1"),
        "step_profile": module("train_speed", "step_profile", "profile", *both, *one),
        "cost_curves": module("train_speed", "cost_curves", "curves", *both, *one, "--window", "4", "8", "--context",
                              "0", "4", "--targets", "2", "8", "--candidates", "2", "10", "--rank", "4", "16",
                              "--layers", "10", "30", "--step-tokens", "300", "--matmul-sizes", "1024"),
        "score_speed": module("score_speed", "score_speed", "history", *both, *one, "--candidates", "20"),
        "bank": module("score_speed", "bank", "bank", *both, *one, "--domains", "10"),
        "peers": module("quality.peers.compare", "peers", *both, "--seconds", "40", "--points", "2", "--validation",
                        "60", "--context", "4", "--targets", "4"),
    }  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Run the steps and print the page; returns 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="directory of a log (default: a simulated shop)")
    parser.add_argument("--domain", default=str(ROOT / "recipes/configs/shop/domain.yaml"), help="domain file")
    parser.add_argument("--out", default=str(ROOT / "out/bench"), help="output directory")
    parser.add_argument("--only", nargs="+", help="names of steps; what they read must be there")
    options = parser.parse_args(arguments)
    out = Path(options.out).resolve()
    steps = plan(options.data or str(out / "log"), Path(options.domain).resolve(), out)
    for unknown in set(options.only or []) - set(steps):
        parser.error(f"--only: no step is called {unknown}; there are {', '.join(steps)}")
    out.mkdir(parents=True, exist_ok=True)
    if options.data is None and not (out / "log").is_dir():
        from llmrec_peft.data.simulate import write_simulated_shop

        write_simulated_shop(out / "log")
    failed, seconds = [], {}
    for name in options.only or steps:
        print(f"== {name}: python {' '.join(steps[name])}", flush=True)
        begun = time.perf_counter()
        code = subprocess.run([sys.executable, *steps[name]], cwd=ROOT, check=False).returncode
        seconds[name] = time.perf_counter() - begun
        failed += [name] if code else []
        print(f"== {name}: {'FAILED' if code else 'done'} in {seconds[name]:.0f} s", flush=True)
    words = " ".join(["python -m", module_of(__file__), *(sys.argv[1:] if arguments is None else arguments)])
    write_result(out / "results" / "run_all.json", header(words, 0) | {"failed": failed, "seconds": seconds})
    text = page(out / "results")
    (out / "results.md").write_text(text, encoding="utf-8")
    print(f"{text}\nthe page is {out / 'results.md'}")
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
