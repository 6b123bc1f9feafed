"""A teacher and its students on the same test targets: quality, size, speed, and latency of 50 candidates.

Each system is the output directory of its recipe (recipes/lora.py for the teacher, recipes/distill.py for the others);
`NAME_alone` is a student trained as NAME was, without the teacher. Students of item ids are also exported to ONNX,
and their int8 graph is measured beside them.

- Quality: on the test targets that every directory's predictions.parquet has; brackets are 95 % bootstrap intervals
  over users, and differences are paired. `ids` against `ids_alone` is also compared on all test targets that both
  answered, and on those whose item has no training row.
- Targets a second: windows of the test split answered by one thread, in float32.
- Latency: 50 candidates after a user's history, encoded anew, by one thread; P50 and P99 over users.

python benchmarks/students.py --data DIR --teacher OUT/movies ids=OUT/ids ids_alone=OUT/ids-alone shallow=OUT/shallow
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from measuring import header, plain_intervals, quiet, spread, write_result

from llmrec_peft import Scorer
from llmrec_peft.checkpoints.merged import load_answering, read_answering
from llmrec_peft.config.schema import DataConfig
from llmrec_peft.data.collator import StreamCollator
from llmrec_peft.data.domain import Domain
from llmrec_peft.distillation.export import export_onnx
from llmrec_peft.evaluation.bootstrap import differences, intervals
from llmrec_peft.models.predict import predict
from llmrec_peft.runs.split_streams import read_log, split_by_domain, streams_for_split
from llmrec_peft.serving import OnnxScorer

ROOT = Path(__file__).resolve().parent.parent
METRICS = ("auc", "gauc", "logloss")
KEY = ["user_id", "item_id", "timestamp"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("students", nargs="+", help="NAME=OUT of each student, and NAME_alone=OUT")
    parser.add_argument("--data", required=True)
    parser.add_argument("--teacher", required=True, help="output directory of the teacher's run")
    parser.add_argument("--candidates", type=int, default=50)
    parser.add_argument("--requests", type=int, default=200, help="users of the latency of small students")
    parser.add_argument("--slow-requests", type=int, default=5, help="the same for models that read texts")
    parser.add_argument("--targets", type=int, default=150, help="targets of the speed of models that read texts")
    parser.add_argument("--bootstrap", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default=str(ROOT / "benchmarks/results/students.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    with quiet(), tempfile.TemporaryDirectory() as scratch:
        found = measure(options, Path(scratch))
    words = [part.split("=")[0] for part in options.students]
    shown = ["--data", options.data, "--teacher", Path(options.teacher).name, *(f"{word}=OUT/{word}" for word in words)]
    result = header(__file__, shown, options.seed) | found
    write_result(options.output, result)
    show(result)
    plot(result, Path(options.output).with_suffix(".png"))
    sys.stdout.flush()


def measure(options: argparse.Namespace, scratch: Path) -> dict:
    places = {"teacher": Path(options.teacher)} | {
        name: Path(place) for name, place in (part.split("=", 1) for part in options.students)
    }
    log = read_log(DataConfig(path=options.data))
    answers = {name: predictions(place) for name, place in places.items()}
    systems, label = {}, Domain.of_manifest(read_answering(model_of(places["teacher"]))["domain"]).labels[-1]
    for name, place in places.items():
        directory, fast = model_of(place), read_answering(model_of(place))["domain"]["event"] == "item {item_id}"
        system = {"bytes": size_of(directory)}
        if not name.endswith("_alone"):
            system |= speed(directory, log, options, fast)
            requests = requests_of(log, directory, options, options.requests if fast else options.slow_requests)
            system["latency_ms"] = latency(Scorer.load(directory, log, cache_bytes=0), requests)
        systems[name] = system
        if fast and not name.endswith("_alone"):
            systems[f"{name}_int8"], answers[f"{name}_int8"] = int8(directory, log, scratch / name, requests)
    shared = answers["teacher"].index
    for table in answers.values():
        shared = shared.intersection(table.index)
    for name, values in quality({name: table.loc[shared] for name, table in answers.items()}, label, options).items():
        systems[name] |= values
    result = {"targets": len(shared), "users": int(shared.get_level_values(0).nunique()), "systems": systems}
    if "ids_alone" in answers:
        result["ids_on_all"] = ids_alone(answers, log, places, label, options)
    return result


def model_of(place: Path) -> Path:
    """The bundle or the student that a run left."""
    return next(place / name for name in ("student", "bundle") if (place / name).is_dir())


def size_of(directory: Path) -> int:
    """Bytes of the weights; of an adapter, with its base's."""
    own = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
    manifest = read_answering(directory)
    if manifest.get("kind") != "merged":
        from llmrec_peft.models.base import resolve_base

        own += sum(path.stat().st_size for path in Path(resolve_base(manifest["base"]["name"])).glob("*.safetensors"))
    return own


def predictions(place: Path) -> pd.DataFrame:
    """A run's test answers by user, item and time."""
    table = pd.read_parquet(place / "predictions.parquet")
    return keyed(table[table["split"] == "test"])


def keyed(table: pd.DataFrame) -> pd.DataFrame:
    table = table.set_index(KEY).sort_index()
    return table[~table.index.duplicated()]


def both(table: pd.DataFrame, label: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Classes, probabilities [n, 2] and users of a table of two labels."""
    p = table[f"p_{label}"].to_numpy()
    return (table["label"] == label).to_numpy().astype(int), np.stack([1 - p, p], 1), table.index.get_level_values(0)


def quality(answers: dict[str, pd.DataFrame], label: str, options: argparse.Namespace) -> dict[str, dict]:
    """Metrics of each system, and its difference to the teacher and to the student trained alone."""
    draw, found = {"samples": options.bootstrap, "seed": options.seed}, {}
    for name, table in answers.items():
        classes, p, users = both(table, label)
        found[name] = {"quality": plain_intervals(intervals(METRICS, classes, p, users, **draw))}
        for other in ("teacher", f"{name.removesuffix('_int8')}_alone", name.removesuffix("_int8")):
            if other in answers and other != name:
                before = both(answers[other], label)[1]
                found[name][f"minus_{other}"] = plain_intervals(differences(METRICS, classes, before, p, users, **draw))
    return found


def ids_alone(answers: dict, log, places: dict, label: str, options: argparse.Namespace) -> dict:
    """`ids` and `ids_alone` on all test targets, and on those of items without training rows."""
    domain = Domain.of_manifest(read_answering(model_of(places["ids"]))["domain"])
    seen = np.bincount(log.item_codes[split_by_domain(log, domain).train.rows], minlength=log.num_items)
    cold = set(log.items.column("item_id").filter(seen == 0).to_pylist())
    shared = answers["ids"].index.intersection(answers["ids_alone"].index)
    unseen = shared[shared.get_level_values(1).isin(cold)]
    result = {}
    for name, part in (("all", shared), ("items without training rows", unseen)):
        if not len(part):
            continue  # a log may have no such items
        own = {who: answers[who].loc[part] for who in ("ids", "ids_alone", "ids_int8")}
        result[name] = {"targets": len(part), "systems": quality(own, label, options)}
    return result


def speed(directory: Path, log, options: argparse.Namespace, fast: bool) -> dict:
    """Targets a second over test windows, three times after one to warm up."""
    bundle = load_answering(directory)
    domain = Domain.of_manifest(bundle.domain)
    streams = streams_for_split(split_by_domain(log, domain), "test", domain, bundle.tokenizer)
    part = streams.limited(None if fast else options.targets)
    count = sum(len(part[row].markers) for row in range(len(part)))
    collator, tokens = StreamCollator(bundle.tokenizer.pad_token_id, 4000), 8000 if fast else 1200
    rates = []
    for _ in range(4 if fast else 3):
        start = time.perf_counter()
        predict(bundle.classifier, part, collator, batch_tokens=tokens)
        rates.append(count / (time.perf_counter() - start))
    return {"targets_per_second": spread(rates[1:])}


def requests_of(log, directory: Path, options: argparse.Namespace, count: int) -> list[tuple[list, list]]:
    """The newest history of users, and candidates from the whole table."""
    domain = Domain.of_manifest(read_answering(directory)["domain"])
    classes, rng = domain.classes(log), np.random.default_rng(options.seed)
    ids, requests = log.items.column("item_id").to_pylist(), []
    window = domain.stream.context + domain.stream.targets - 1
    for user in rng.permutation(log.num_users)[:count]:
        rows = np.arange(log.user_offsets[user], log.user_offsets[user + 1])
        rows = rows[classes[rows] >= 0][-window:]
        history = [(ids[log.item_codes[row]], domain.labels[classes[row]]) for row in rows]
        requests.append((history, [ids[n] for n in rng.choice(log.num_items, options.candidates, replace=False)]))
    return requests


def latency(scorer, requests: list) -> dict:
    """Milliseconds of one request after another."""
    scorer.score(*requests[0])
    times = []
    for history, candidates in requests:
        start = time.perf_counter()
        scorer.score(history, candidates)
        times.append(1000 * (time.perf_counter() - start))
    return {"p50": float(np.percentile(times, 50)), "p99": float(np.percentile(times, 99)), "requests": len(times)}


def int8(directory: Path, log, scratch: Path, requests: list) -> tuple[dict, pd.DataFrame]:
    """The int8 export: its size, speed and latency, and its answers to all test targets."""
    bundle = load_answering(directory)
    domain = Domain.of_manifest(bundle.domain)
    streams = streams_for_split(split_by_domain(log, domain), "test", domain, bundle.tokenizer)
    measured = export_onnx(directory, scratch, streams=streams.limited(500))
    scorer = OnnxScorer.load(scratch, precision="int8", threads=1)
    windows = [streams[row] for row in np.argsort(-streams.lengths, kind="stable")]
    rates = []
    for _ in range(4):
        start = time.perf_counter()
        logits = scorer._graph.answers(windows, 8000)
        rates.append(len(logits) / (time.perf_counter() - start))
    targets = np.concatenate([stream.targets for stream in windows])
    table = streams.describe(targets).to_pandas()
    from llmrec_peft.evaluation.calibration import Calibration

    probabilities = Calibration.from_dict(bundle.calibration).apply(logits)
    for number, label in enumerate(domain.labels):
        table[f"p_{label}"] = probabilities[:, number]
    system = {
        "bytes": measured["int8"]["bytes"], "targets_per_second": spread(rates[1:]),
        "latency_ms": latency(scorer, requests),
        "difference_to_torch": {name: measured[name]["max_difference"] for name in ("float32", "int8")},
    }  # fmt: skip
    return system, keyed(table)


def show(result: dict) -> None:
    print(f"{result['targets']} test targets of {result['users']} users")
    print(f"{'':<16}{'auc':>24}{'gauc':>24}{'MB':>8}{'targets/s':>11}{'P50 ms':>9}{'P99 ms':>9}")
    for name, system in result["systems"].items():
        cells = "".join(f"{v['value']:>9.3f} [{v['low']:.3f}, {v['high']:.3f}]"[:24].rjust(24)
                        for key, v in system["quality"].items() if key != "logloss")  # fmt: skip
        rate, wait = system.get("targets_per_second"), system.get("latency_ms")
        cells += f"{system['bytes'] / 1e6:>8.1f}" + (f"{rate['median']:>11.1f}" if rate else "")
        print(f"{name:<16}{cells}" + (f"{wait['p50']:>9.1f}{wait['p99']:>9.1f}" if wait else ""))
    for part, found in result.get("ids_on_all", {}).items():
        for name, system in found["systems"].items():
            value = system["quality"]["gauc"]
            line = f"{part} ({found['targets']} targets), {name}: GAUC {value['value']:.3f} "
            line += f"[{value['low']:.3f}, {value['high']:.3f}]"
            extra = system.get("minus_ids_alone")
            if extra:
                line += "".join(
                    f", {m} - alone {v['value']:+.4f} [{v['low']:+.4f}, {v['high']:+.4f}]" for m, v in extra.items()
                )
            print(line)


def plot(result: dict, path: Path) -> None:
    """Quality against latency: GAUC and AUC over the median milliseconds of 50 candidates."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = {name: system for name, system in result["systems"].items() if "latency_ms" in system}
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for axis, metric in zip(axes, ("auc", "gauc"), strict=True):
        for name, system in shown.items():
            value = system["quality"][metric]
            bars = [[value["value"] - value["low"]], [value["high"] - value["value"]]]
            axis.errorbar(system["latency_ms"]["p50"], value["value"], bars, fmt="o", capsize=3, label=name)
        axis.set_xscale("log")
        axis.set_xlabel("ms for 50 candidates, one core (median)")
        axis.set_ylabel(metric.upper())
    axes[0].legend(fontsize=8, loc="lower center")
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main()
