"""What each source of candidates finds of held-out positives, and what the merged retriever finds.

    python -m benchmarks.quality.retrieval --data DIR [--logs movies retail] [--split test] [--targets 2000]

DIR holds one directory a log, each with the domain file recipes/configs/<log>/domain.yaml. Models are fitted on the
training rows. A target is a positive of the split whose item was new to its user; its list is the whole catalogue less
what the user took before or at that moment, so that recall@100 is hr@100. Items that a source does not name are tied.
The package's default quotas were chosen with --split valid.
"""

import argparse
import functools
import time
from pathlib import Path

import numpy as np

from benchmarks.measuring import CONFIGS, Benchmark, plain_intervals, run
from benchmarks.quality.protocol import text_vectors
from llmrec_peft import BehaviorLog, Domain
from llmrec_peft.config.schema import RankingConfig
from llmrec_peft.evaluation.bootstrap import mean_interval
from llmrec_peft.evaluation.ranking_metrics import one_relevant
from llmrec_peft.retrieval.retrieval_index import RetrievalIndex
from llmrec_peft.retrieval.retriever import QUOTAS, Retriever
from llmrec_peft.runs.candidate_sets import CandidateSets
from llmrec_peft.runs.split_streams import split_by_domain

MODELS = ("popularity", "cooccurrence", "factors")
NAMED = 100  # candidates that the merged retriever names
FEW = 5  # events of a user who counts as new


def place_of(named: np.ndarray, item: int, size: int) -> tuple[int, int]:
    """Items above `item` in a ranking of `size` items that begins with `named`, and items tied with it, itself too."""
    found = np.flatnonzero(named == item)
    return (int(found[0]), 1) if len(found) else (len(named), size - len(named))


def measure_log(name: str, options: argparse.Namespace) -> dict:
    """All figures of one log."""
    domain, log = Domain.from_yaml(CONFIGS / name / "domain.yaml"), BehaviorLog.read(Path(options.data) / name)
    ranking = RankingConfig(candidates="all", targets=options.targets, seed=options.seed)
    lists = CandidateSets(split_by_domain(log, domain), options.split, domain, ranking)
    start = time.perf_counter()
    index = RetrievalIndex.fit(log, lists.splits.train.rows, lists.feedback, seed=options.seed)
    fit_seconds = time.perf_counter() - start
    vectors = None if options.base == "none" else text_vectors(log, domain, options.base, options.layers)
    sources = [*MODELS, *(["text"] if vectors is not None else [])]
    shares = dict(part.split("=") for part in options.quotas)
    quotas = {source: float(share) for source, share in shares.items() if source != "text" or source in sources}
    retriever, past = Retriever(index, vectors, quotas), lists.past(lists.rows)
    places: dict[str, list[tuple[int, int]]] = {source: [] for source in [*sources, "merged"]}
    seconds = []
    for number, row in enumerate(lists.rows.tolist()):
        history, item, out = past.part(number, number + 1), log.item_codes[row], lists.out(row)
        for source in sources:
            named = retriever.source(source, history, log.num_items, out)
            places[source].append(place_of(named, item, log.num_items - len(out)))
        start = time.perf_counter()
        merged = retriever.retrieve(history, NAMED, out)
        seconds.append(time.perf_counter() - start)
        places["merged"].append(place_of(merged.items, item, log.num_items - len(out)))
    values = {}
    for source, found in places.items():
        above, tied = np.array(found).T
        values[source] = one_relevant(above, tied, 10) | {"recall@100": one_relevant(above, tied, 100)["hr@100"]}

    def means(found: dict[str, np.ndarray], chosen: np.ndarray) -> dict:
        return plain_intervals({key: mean_interval(found[key][chosen], lists.users[chosen], seed=options.seed)
                                for key in ("ndcg@10", "hr@10", "recall@100")})  # fmt: skip

    every = np.ones(len(lists), bool)
    slices = {"all": every, f"users with fewer than {FEW} events": past.counts < FEW,
              "items without training rows": index.item_rows[log.item_codes[lists.rows]] == 0}  # fmt: skip
    return {
        "targets": len(lists), "users": len(np.unique(lists.users)), "left_out": lists.left_out,
        "items": log.num_items, "training": index.note, "half_life_days": index.models["popularity"].half_life,
        "quotas": quotas, "fit_seconds": fit_seconds,
        "merged_milliseconds": {f"p{q}": float(np.percentile(seconds, q) * 1000) for q in (50, 99)},
        "slices": {title: {"targets": int(mask.sum()), "users": len(np.unique(lists.users[mask]))}
                   | {source: means(found, mask) for source, found in values.items()}
                   for title, mask in slices.items() if mask.any()},
        "merged_minus": {source: means({key: values["merged"][key] - found for key, found in values[source].items()},
                                       every) for source in sources},
    }  # fmt: skip


def measure(options: argparse.Namespace, scratch: Path) -> dict:
    """Recall of each source of candidates, log by log."""
    return {"split": options.split, "layers": options.layers,
            "logs": {name: measure_log(name, options) for name in options.logs}}  # fmt: skip


BENCHMARK = Benchmark(measure, "retrieval.json", {
    "logs": (["movies", "retail"], "logs"), "split": ("test", "split of the targets", ("valid", "test")),
    "targets": (2000, "targets of a log, at most"),
    "layers": (0, "layers of the base that encode items' texts; 0: its token embeddings (--base none: no texts)"),
    "quotas": ([f"{name}={share}" for name, share in QUOTAS.items()], "SOURCE=SHARE of the merged retriever"),
}, "movies")  # fmt: skip


main = functools.partial(run, __file__, __doc__, BENCHMARK)

if __name__ == "__main__":
    main()
