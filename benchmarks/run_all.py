"""The quick form of the benchmarks, one after the other: `make bench`, under half an hour on two cores.

It trains a small LLM adapter, a fusion and two students by the recipes, compares them with what else there is, and
times training and scoring; then it prints the page of their results. A quick form shows that everything runs and
roughly how it compares: few steps, few targets, one round. The committed figures come from the long forms, whose
commands stand in docs/results.md.

    python benchmarks/run_all.py [--data DIR --domain recipes/configs/movies/domain.yaml] [--only protocol few_shot]

Without --data a simulated shop is drawn. A step that fails is named at the end, and the others go on.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

from measuring import header, write_result
from results_page import page

ROOT = Path(__file__).resolve().parent.parent
LONG = ("batch_tokens", "data_memory", "invariance", "memory", "merge", "negatives", "retrieval", "serve_size")
"""Benchmarks without a quick form: sweeps, processes that are watched, and installations."""


def plan(data: str, domain: Path, out: Path) -> dict[str, list[str]]:
    """Name and arguments of each step, in order; those under `recipes/` make what the others compare."""
    results, config = out / "results", domain.parent
    log = ["--data", data]

    def recipe(name: str, place: str, *arguments: str) -> list[str]:
        return [f"recipes/{name}.py", "--data.path", data, *arguments, "--output_dir", str(out / place)]

    def script(name: str, *arguments: str, result: str = "") -> list[str]:
        return [f"benchmarks/{name}.py", *arguments, "--output", str(results / f"{result or name}.json")]

    few = ["--evaluation.before", "false", "--evaluation.valid_targets", "200", "--evaluation.test_targets", "300"]
    student = ["--config", "recipes/configs/movies/distill.yaml", "--teacher", str(out / "llm/bundle"),
               "--student.content", "false", "--evaluation.before", "false"]  # fmt: skip
    apart = ["--loss.soft", "0", "--loss.pairs", "0"]
    return {
        "lora": recipe("lora", "llm", "--config", str(config / "lora.yaml"), "--domain", str(domain), *few,
                       "--train.max_steps", "8", "--train.eval_steps", "0", "--train.early_stopping", "0"),
        "ids": recipe("distill", "ids", *student, *apart),
        "distill": recipe("distill", "ids_distilled", *student, "--teacher_outputs.targets", "400"),
        "fuse": ["recipes/index.py", "--bundle", str(out / "llm/bundle"), "--data.path", data, "--valid_targets", "200",
                 "--test_targets", "300", "--output_dir", str(out / "fuse")],
        "protocol": script("protocol", *log, "--domain", str(domain), "--no-text", "--bootstrap", "200",
                           f"llm={out / 'llm'}", f"fused={out / 'fuse'}:fused", f"ids={out / 'ids'}",
                           f"ids_distilled={out / 'ids_distilled'}", result=f"protocol_{config.name}"),
        "students": script("students", *log, "--teacher", str(out / "llm"), f"ids={out / 'ids_distilled'}",
                           f"ids_alone={out / 'ids'}", "--requests", "30", "--slow-requests", "1", "--targets", "40",
                           "--candidates", "20"),
        "recommend": script("recommend", *log, "--bundle", str(out / "llm/bundle"), "--targets", "20",
                            "--candidates", "10", result=f"recommend_{config.name}"),
        "few_shot": script("few_shot", *log, "--domain", str(domain), "--targets", "16", "--seeds", "0", "--seen", "16",
                           "--history", "8", "--test-targets", "96"),
        "train_speed": script("train_speed", *log, "--domain", str(domain), "--rounds", "1", "--peer-targets", "3",
                              "--peer-batch-sizes", "1"),
        "step_profile": script("step_profile", *log, "--domain", str(domain), "--rounds", "1"),
        "cost_curves": script("cost_curves", *log, "--domain", str(domain), "--rounds", "1", "--window", "4", "8",
                              "--context", "0", "4", "--targets", "2", "8", "--candidates", "2", "10", "--rank", "4",
                              "16", "--layers", "10", "30", "--step-tokens", "300", "--matmul-sizes", "1024"),
        "score_speed": script("score_speed", *log, "--domain", str(domain), "--rounds", "1", "--candidates", "20"),
        "bank": script("bank", *log, "--domain", str(domain), "--rounds", "1", "--domains", "10"),
        "compare_peers": script("compare_peers", *log, "--domain", str(domain), "--seconds", "40", "--points", "2",
                                "--validation", "60", "--context", "4", "--targets", "4", result="peers"),
    }  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Run the steps and print the page; returns 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="directory of a log; by default a simulated shop")
    parser.add_argument("--domain", default=str(ROOT / "recipes/configs/shop/domain.yaml"))
    parser.add_argument("--out", default=str(ROOT / "out/bench"))
    parser.add_argument("--only", nargs="+", help="names of steps; what they read must be there")
    options = parser.parse_args(arguments)
    out, start = Path(options.out).resolve(), time.perf_counter()
    steps = plan(options.data or str(out / "log"), Path(options.domain).resolve(), out)
    unknown = sorted(set(options.only or []) - set(steps))
    if unknown:
        parser.error(f"--only: no step is called {unknown[0]}; there are {', '.join(steps)}")
    out.mkdir(parents=True, exist_ok=True)
    if options.data is None and not (out / "log").is_dir():
        from llmrec_peft.data.simulate import write_simulated_shop

        write_simulated_shop(out / "log")
    failed, seconds = [], {}
    for name in options.only or steps:
        print(f"== {name}: python {' '.join(steps[name])}", flush=True)
        begun = time.perf_counter()
        done = subprocess.run([sys.executable, *steps[name]], cwd=ROOT, check=False)
        seconds[name] = time.perf_counter() - begun
        print(f"== {name}: {'done' if done.returncode == 0 else 'FAILED'} in {seconds[name]:.0f} s", flush=True)
        if done.returncode:
            failed.append(name)
    write_result(
        out / "results" / "run_all.json",
        header(__file__, sys.argv[1:] if arguments is None else arguments, 0) | {"failed": failed, "seconds": seconds},
    )
    text = page(out / "results")
    (out / "results.md").write_text(text, encoding="utf-8")
    print(text)
    print(f"{(time.perf_counter() - start) / 60:.0f} minutes; the page is {out / 'results.md'}")
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
