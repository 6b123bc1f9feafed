"""Lists of items, ranked by the LLM, by the LLM fused with a log's evidence, and by collaborative models alone.

A positive of the test split whose item was new to its user stands in one list with items of the catalogue that the user
had not taken before, drawn uniformly; each system orders the list knowing what came strictly before. Collaborative
models and the fusion are those in the bundle's `retrieval` directory, fitted by recipes/index.py on training rows (the
fusion: on validation).

- ndcg@10, hr@10: of the one positive; with ties, means over their orders.
- gauc: the chance that the positive stands above another item of its list, ties half; the mean over targets.

Brackets are 95 % bootstrap intervals over users.

python benchmarks/recommend.py --data DIR --bundle OUT/bundle [--targets 150] [--candidates 20]
"""

import argparse
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import yaml
from accelerate import PartialState
from measuring import header, quiet, write_result

from llmrec_peft.checkpoints.merged import read_answering
from llmrec_peft.config.schema import DataConfig, EvaluateConfig, RankingConfig
from llmrec_peft.data.domain import Domain
from llmrec_peft.evaluation.bootstrap import mean_interval
from llmrec_peft.evaluation.ranking_metrics import one_relevant
from llmrec_peft.retrieval.retrieval_index import DIRECTORY, RetrievalIndex
from llmrec_peft.runs.candidate_sets import CandidateSets
from llmrec_peft.runs.ranking import rank, rank_of
from llmrec_peft.runs.split_streams import read_log, split_by_domain

ROOT = Path(__file__).resolve().parent.parent
NAMES = {"popularity": "popularity", "cooccurrence": "item co-occurrence", "factors": "matrix factorisation"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--bundle", required=True)
    parser.add_argument("--targets", type=int, default=150)
    parser.add_argument("--candidates", type=int, default=20)
    parser.add_argument("--batch-tokens", type=int, default=2500)
    parser.add_argument("--bootstrap", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", help="result file; by default benchmarks/results/recommend_<domain>.json")
    options = parser.parse_args()
    with quiet():
        found = measure(options)
    name = found["domain"]
    result = header(__file__, sys.argv[1:], options.seed) | found
    write_result(options.output or ROOT / f"benchmarks/results/recommend_{name}.json", result)
    show(found)


def measure(options: argparse.Namespace) -> dict:
    manifest = read_answering(options.bundle)
    domain = Domain.of_manifest(manifest["domain"])
    ranking = RankingConfig(
        candidates=options.candidates, targets=options.targets, bootstrap=options.bootstrap, seed=options.seed
    )
    config = EvaluateConfig(
        bundle=options.bundle, data=DataConfig(path=options.data), ranking=ranking, batch_tokens=options.batch_tokens
    )
    splits = split_by_domain(read_log(config.data), domain)
    lists = CandidateSets(splits, "test", domain, ranking)
    _, table = rank(config, lists, PartialState())
    retrieval_index, _ = RetrievalIndex.load(Path(options.bundle) / DIRECTORY)
    retrieval_index = retrieval_index.for_items(lists.log.items.column("item_id"))
    places = {
        system: np.stack([table.column(f"{system}_{part}").to_numpy() for part in ("above", "tied")])
        for system in ("llm", "fused")
        if f"{system}_above" in table.column_names
    }
    past = lists.histories(lists.rows)
    codes = [lists.candidates(int(row)) for row in lists.rows]
    for model in NAMES:
        found = [
            rank_of(retrieval_index.models[model].score(past.part(n, n + 1), own), 0) for n, own in enumerate(codes)
        ]
        places[model] = np.array(found).T
    sizes = np.array([len(own) for own in codes])
    values = {
        system: one_relevant(*found, 10) | {"gauc": 1 - (found[0] + (found[1] - 1) / 2) / (sizes - 1)}
        for system, found in places.items()
    }
    best = "fused" if "fused" in values else "llm"
    draw = SimpleNamespace(samples=options.bootstrap, seed=options.seed)
    known = retrieval_index.item_rows[[own[0] for own in codes]] > 0

    def intervals(pick: np.ndarray, of) -> dict:
        return {
            metric: mean_interval(of(metric)[pick], lists.users[pick], samples=draw.samples, seed=draw.seed).to_dict()
            for metric in ("ndcg@10", "hr@10", "gauc")
        }

    everything = np.ones(len(lists), bool)
    return {
        "domain": domain.name,
        "trained": {key: manifest["counts"].get(key) for key in ("train", "valid", "test")},
        "method": manifest.get("method", "merged"),
        "training": training_of(Path(options.bundle).parent / "config.yaml"),
        "settings": {"targets": len(lists), "users": len(np.unique(lists.users)), "candidates": options.candidates,
                     "new_items": int((~known).sum())},
        "systems": {name: intervals(everything, lambda metric, v=v: v[metric]) for name, v in values.items()},
        "best_minus": {
            name: intervals(everything, lambda metric, v=v: values[best][metric] - v[metric])
            for name, v in values.items()
            if name != best
        },
        "new_items": {name: intervals(~known, lambda metric, v=v: v[metric]) for name, v in values.items()}
        if (~known).sum() >= 10 else None,
    }  # fmt: skip


def training_of(config: Path) -> dict | None:
    """How much the bundle was trained, from the configuration that its run left beside it."""
    if not config.is_file():
        return None
    train = yaml.safe_load(config.read_text("utf-8"))["train"]
    return {key: train[key] for key in ("max_steps", "epochs", "batch_size", "learning_rate")}


def show(found: dict) -> None:
    settings = found["settings"]
    print(f"{found['domain']}: {settings['targets']} positives of {settings['users']} users in lists of "
          f"{settings['candidates']}")  # fmt: skip
    parts = {"": found["systems"], "new items: ": found["new_items"] or {}}
    for before, systems in parts.items():
        for name, metrics in systems.items():
            cells = "  ".join(f"{m} {v['value']:.3f} [{v['low']:.3f}, {v['high']:.3f}]" for m, v in metrics.items())
            print(f"{before + NAMES.get(name, name):<32}{cells}")


if __name__ == "__main__":
    main()
