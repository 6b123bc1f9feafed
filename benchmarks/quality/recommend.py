"""Candidate sets ranked by the LLM, by the LLM fused with a retrieval index, and by collaborative models alone.

    python -m benchmarks.quality.recommend --data DIR --bundle OUT/bundle [--targets 150] [--candidates 20]

A candidate set is a positive of the test split whose item was new to its user, and uniformly drawn items of the
catalogue that the user had not taken before. Each system ranks it by what came strictly before. Collaborative
models and the fusion are those of the bundle's retrieval index, which recipes/index.py made. gauc is the chance that
the positive ranks above another item of its set, ties half, as a mean over targets.
"""

import argparse
import functools
from pathlib import Path

import numpy as np
import yaml
from accelerate import PartialState

from benchmarks.measuring import Benchmark, plain_intervals, read_log, run
from llmrec_peft import Domain
from llmrec_peft.checkpoints.manifest import read_manifest
from llmrec_peft.config.schema import DataConfig, EvaluateConfig, RankingConfig
from llmrec_peft.evaluation.bootstrap import mean_interval
from llmrec_peft.evaluation.ranking_metrics import one_relevant
from llmrec_peft.retrieval.index_files import DIRECTORY
from llmrec_peft.retrieval.retrieval_index import RetrievalIndex
from llmrec_peft.runs.candidate_sets import CandidateSets
from llmrec_peft.runs.ranking import rank, rank_of
from llmrec_peft.runs.split_streams import split_by_domain

MODELS = ("popularity", "cooccurrence", "factors")
METRICS = ("ndcg@10", "hr@10", "gauc")


def places_of(sets: CandidateSets, options: argparse.Namespace, config: EvaluateConfig) -> dict[str, np.ndarray]:
    """Items above the positive and tied with it, itself included, int [2, targets], by system."""
    table = rank(config, sets, PartialState())[1]
    places = {
        system: np.stack([table.column(f"{system}_{part}").to_numpy() for part in ("above", "tied")])
        for system in ("llm", "fused") if f"{system}_above" in table.column_names
    }  # fmt: skip
    index = RetrievalIndex.load(Path(options.bundle) / DIRECTORY)[0].for_items(sets.log.items.column("item_id"))
    past = sets.histories(sets.rows)
    for model in MODELS:
        scores = (index.models[model].score(past.part(n, n + 1), sets.candidates(int(row)))
                  for n, row in enumerate(sets.rows))  # fmt: skip
        places[model] = np.array([rank_of(one, 0) for one in scores]).T
    return places


def measure(options: argparse.Namespace, scratch: Path) -> dict:
    """Ranking metrics of each system, differences to the best, and those on items without training rows."""
    manifest = read_manifest(options.bundle)
    domain = Domain.of_manifest(manifest["domain"])
    draw = {"samples": options.bootstrap, "seed": options.seed}
    ranking = RankingConfig(candidates=options.candidates, targets=options.targets, bootstrap=options.bootstrap,
                            seed=options.seed)  # fmt: skip
    config = EvaluateConfig(bundle=options.bundle, data=DataConfig(path=options.data), ranking=ranking,
                            batch_tokens=options.batch_tokens)  # fmt: skip
    sets = CandidateSets(split_by_domain(read_log(options), domain), "test", domain, ranking)
    sizes = np.array([len(sets.candidates(int(row))) for row in sets.rows])
    values = {
        system: one_relevant(*place, 10) | {"gauc": 1 - (place[0] + (place[1] - 1) / 2) / (sizes - 1)}
        for system, place in places_of(sets, options, config).items()
    }
    best = "fused" if "fused" in values else "llm"
    train = sets.splits.train.rows
    trained = np.bincount(sets.log.item_codes[train[sets.feedback[train] >= 0]], minlength=sets.log.num_items)
    new = trained[sets.log.item_codes[sets.rows]] == 0

    def means(found: dict[str, np.ndarray], chosen: np.ndarray) -> dict:
        return plain_intervals({name: mean_interval(found[name][chosen], sets.users[chosen], **draw)
                                for name in METRICS})  # fmt: skip

    every = np.ones(len(sets), bool)
    return {
        "domain": domain.name, "trained": {key: manifest["counts"].get(key) for key in ("train", "valid", "test")},
        "method": manifest.get("method", "merged"), "training": training_of(Path(options.bundle).parent),
        "settings": {"targets": len(sets), "users": len(np.unique(sets.users)), "new_items": int(new.sum())},
        "systems": {name: means(found, every) for name, found in values.items()},
        "best_minus": {name: means({key: values[best][key] - found[key] for key in METRICS}, every)
                       for name, found in values.items() if name != best},
        "new_items": {name: means(found, new) for name, found in values.items()} if new.sum() >= 10 else None,
    }  # fmt: skip


def training_of(run_directory: Path) -> dict | None:
    """How much the bundle was trained, by the configuration that its run left beside it."""
    config = run_directory / "config.yaml"
    if not config.is_file():
        return None
    train = yaml.safe_load(config.read_text(encoding="utf-8"))["train"]
    return {key: train[key] for key in ("max_steps", "epochs", "batch_size", "learning_rate")}


BENCHMARK = Benchmark(measure, "recommend_{domain}.json", {
    "bundle": (..., "a bundle with a retrieval index"), "targets": (150, "positives"),
    "candidates": (20, "items of a candidate set"), "batch_tokens": (2500, "tokens of a batch, at most"),
    "bootstrap": (1000, "samples of the intervals"),
}, "movies")  # fmt: skip


main = functools.partial(run, __file__, __doc__, BENCHMARK)

if __name__ == "__main__":
    main()
