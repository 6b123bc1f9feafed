"""A teacher and its students on the same test targets: quality, size, throughput, and latency of 50 candidates.

    python -m benchmarks.quality.students --data DIR --teacher OUT/movies ids=OUT/ids ids_alone=OUT/alone

Each system is the output directory of its recipe; `NAME_alone` is a student trained as NAME was, without the teacher.
Students of item ids are also exported to ONNX, and their int8 graph is measured beside them. One thread, float32.

Quality is on the test targets that every directory's predictions.parquet has; `ids` and `ids_alone` are also compared
on all that both predicted, and on those whose item has no training row. Latency is that of 50 candidates after a user's
history, encoded anew.
"""

import argparse
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from benchmarks.measuring import Benchmark, in_turns, metrics_of, read_log, run, spread
from benchmarks.score_speed import items_at
from llmrec_peft import Domain, Scorer
from llmrec_peft.checkpoints.loading import load_trained
from llmrec_peft.checkpoints.manifest import read_manifest
from llmrec_peft.checkpoints.manifest_schema import GRAPHS
from llmrec_peft.data.collator import StreamCollator
from llmrec_peft.distillation.export import export_onnx
from llmrec_peft.evaluation.calibration import Calibration
from llmrec_peft.models.base import resolve_base
from llmrec_peft.models.predict import predict
from llmrec_peft.runs.logged_events import LoggedEvents
from llmrec_peft.runs.split_streams import split_by_domain, streams_for_split
from llmrec_peft.serving import OnnxScorer
from llmrec_peft.serving.onnx_graph import Graph

METRICS = ("auc", "gauc", "logloss")
KEY = ["user_id", "item_id", "timestamp"]


class Student:
    """A trained directory, its domain and its test streams."""

    def __init__(self, place: Path, log) -> None:
        self.directory = next(place / name for name in ("student", "bundle") if (place / name).is_dir())
        self.bundle, self.log = load_trained(self.directory), log
        self.domain = Domain.of_manifest(self.bundle.domain)
        self.splits = split_by_domain(log, self.domain)
        self.streams = streams_for_split(self.splits, "test", self.domain, self.bundle.tokenizer)

    @property
    def bytes(self) -> int:
        """Size of the weights; of an adapter, with its base's."""
        manifest, places = read_manifest(self.directory), [self.directory]
        if manifest.get("kind") != "merged":
            places.append(Path(resolve_base(manifest["base"]["name"])))
        return sum(path.stat().st_size for place in places for path in place.glob("*.safetensors"))

    def requests(self, options: argparse.Namespace, count: int) -> list[tuple[list, list]]:
        """The newest history of users, and candidates from the whole item table."""
        log, logged, rng = self.log, LoggedEvents(self.log, self.domain), np.random.default_rng(options.seed)
        window, requests = self.domain.stream.context + self.domain.stream.targets - 1, []
        for user in rng.permutation(log.num_users)[:count]:
            items = rng.choice(log.num_items, options.candidates, replace=False)
            requests.append((logged.history(user)[-window:], items_at(log, logged, user, items)))
        return requests


def throughput(work: Callable[[], Any], targets: int, rounds: int) -> dict[str, float]:
    """Targets a second, after one round that does not count."""
    return spread([targets / seconds for seconds in in_turns({"work": work}, rounds)["work"]])


def latency(scorer, requests: list) -> dict:
    """Milliseconds of one request after another."""
    scorer.score(*requests[0])
    times = []
    for history, candidates in requests:
        start = time.perf_counter()
        scorer.score(history, candidates)
        times.append(1000 * (time.perf_counter() - start))
    return {"p50": float(np.percentile(times, 50)), "p99": float(np.percentile(times, 99)), "requests": len(times)}


def measure_student(student: Student, options: argparse.Namespace) -> tuple[dict, list]:
    """Throughput over test windows, and latency, of the model in PyTorch; and the requests."""
    fast = student.domain.reads_ids
    part = student.streams.limited(None if fast else options.targets)
    targets = sum(len(part[row].markers) for row in range(len(part)))
    collator = StreamCollator(student.bundle.tokenizer.pad_token_id, 4000)
    tokens, rounds = (8000, 3) if fast else (1200, 2)
    rate = throughput(lambda: predict(student.bundle.classifier, part, collator, batch_tokens=tokens), targets, rounds)
    requests = student.requests(options, options.requests if fast else options.slow_requests)
    wait = latency(Scorer.load(student.directory, student.log, cache_bytes=0), requests)
    return {"targets_per_second": rate, "latency_ms": wait}, requests


def measure_int8(student: Student, place: Path, requests: list) -> tuple[dict, pd.DataFrame]:
    """The int8 export: size, throughput, latency, and its predictions of all test targets."""
    measured = export_onnx(student.directory, place, streams=student.streams.limited(500))
    scorer = OnnxScorer.load(place, precision="int8", threads=1)
    windows = [student.streams[row] for row in np.argsort(-student.streams.lengths, kind="stable")]
    graph = Graph(place / GRAPHS["int8"], student.bundle.tokenizer.pad_token_id, threads=1)
    logits = graph.predict(windows, 8000)
    table = student.streams.describe(np.concatenate([window.targets for window in windows])).to_pandas()
    probabilities = Calibration.from_dict(student.bundle.calibration).apply(logits)
    table[[f"p_{label}" for label in student.domain.labels]] = probabilities
    return {
        "bytes": measured["int8"]["bytes"],
        "targets_per_second": throughput(lambda: graph.predict(windows, 8000), len(logits), 3),
        "latency_ms": latency(scorer, requests),
        "difference_to_torch": {name: measured[name]["max_difference"] for name in ("float32", "int8")},
    }, keyed(table)  # fmt: skip


def keyed(table: pd.DataFrame) -> pd.DataFrame:
    """Predictions by user, item and time, the first of each."""
    table = table.set_index(KEY).sort_index()
    return table[~table.index.duplicated()]


def quality(tables: dict[str, pd.DataFrame], label: str, options: argparse.Namespace) -> dict[str, dict]:
    """Metrics of each system, and its differences to the teacher, to the student trained alone and to float32."""
    draw, found = {"samples": options.bootstrap, "seed": options.seed}, {}
    p = {name: np.stack([1 - table[f"p_{label}"], table[f"p_{label}"]], 1) for name, table in tables.items()}
    for name, table in tables.items():
        truth, users = (table["label"] == label).to_numpy().astype(int), table.index.get_level_values(0)
        found[name] = {"quality": metrics_of(METRICS, truth, p[name], users, **draw)}
        own = name.removesuffix("_int8")
        for other in ("teacher", f"{own}_alone", own):
            if other in p and other != name:
                found[name][f"minus_{other}"] = metrics_of(METRICS, truth, p[name], users, minus=p[other], **draw)
    return found


def ids_on_all(tables: dict, student: Student, options: argparse.Namespace) -> dict:
    """`ids` and `ids_alone` on all test targets, and on those of items without training rows, if there are any."""
    log = student.log
    seen = np.bincount(log.item_codes[student.splits.train.rows], minlength=log.num_items)
    cold = set(log.items.column("item_id").filter(seen == 0).to_pylist())
    shared = tables["ids"].index.intersection(tables["ids_alone"].index)
    parts = {"all": shared, "items without training rows": shared[shared.get_level_values(1).isin(cold)]}
    return {
        name: {"targets": len(part), "systems": quality(
            {who: tables[who].loc[part] for who in ("ids", "ids_alone", "ids_int8")}, student.domain.labels[-1], options
        )} for name, part in parts.items() if len(part)
    }  # fmt: skip


def measure(options: argparse.Namespace, scratch: Path) -> dict:
    """The teacher and all students."""
    torch.set_num_threads(1)
    log = read_log(options)
    places = {"teacher": options.teacher} | dict(word.split("=", 1) for word in options.students)
    systems, tables, students = {}, {}, {}
    for name, place in places.items():
        student = students[name] = Student(Path(place), log)
        table = pd.read_parquet(Path(place) / "predictions.parquet")
        tables[name] = keyed(table[table["split"] == "test"])
        systems[name] = {"bytes": student.bytes}
        if not name.endswith("_alone"):
            measured, requests = measure_student(student, options)
            systems[name] |= measured
            if student.domain.reads_ids:
                systems[f"{name}_int8"], tables[f"{name}_int8"] = measure_int8(student, scratch / name, requests)
    shared = tables["teacher"].index
    for table in tables.values():
        shared = shared.intersection(table.index)
    label = students["teacher"].domain.labels[-1]
    for name, found in quality({name: table.loc[shared] for name, table in tables.items()}, label, options).items():
        systems[name] |= found
    result = {"targets": len(shared), "users": int(shared.get_level_values(0).nunique()), "systems": systems}
    return result | ({"ids_on_all": ids_on_all(tables, students["ids"], options)} if "ids_alone" in tables else {})


BENCHMARK = Benchmark(measure, "students.json", {
    "*students": (None, "NAME=OUT of each student, and NAME_alone=OUT"),
    "teacher": (..., "output directory of the teacher's run"), "candidates": (50, "candidates of a request"),
    "requests": (200, "users of the latency of students of item ids"),
    "slow_requests": (5, "the same for models that read texts"),
    "targets": (150, "targets of the throughput of models that read texts"),
    "bootstrap": (1000, "samples of the intervals"),
}, "movies")  # fmt: skip


main = functools.partial(run, __file__, __doc__, BENCHMARK)

if __name__ == "__main__":
    main()
