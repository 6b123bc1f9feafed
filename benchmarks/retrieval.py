"""What each source of candidates finds of held-out positives, and what the merged retriever finds.

    python benchmarks/retrieval.py --data DIR [--logs movies retail] [--split test] [--targets 2000] [--base NAME]

DIR holds one directory a log, each with the domain file recipes/configs/<log>/domain.yaml. Models are fitted on the
training rows. A target is a positive of the split whose item its user had not taken before; the user's history is all
that came strictly before, and the candidates are the whole catalogue less what the user took before or at that moment.
One item is right in each list, so recall@100 is hr@100. Tied scores share their places. Intervals draw users.
Defaults of the package were chosen with --split valid; the test split is for the figures that are published.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
from measuring import header, plain_interval, stop, write_result

from llmrec_peft.data.domain import Domain
from llmrec_peft.data.log import BehaviorLog
from llmrec_peft.errors import LLMRecError
from llmrec_peft.evaluation.bootstrap import differences, intervals
from llmrec_peft.retrieval.histories import Histories, feedback
from llmrec_peft.retrieval.retrieval_index import RetrievalIndex
from llmrec_peft.retrieval.retriever import QUOTAS, SOURCES, Retriever, recall

ROOT = Path(__file__).resolve().parent.parent
MODELS = ("popularity", "cooccurrence", "factors")
NAMED = 100  # candidates that the merged retriever is asked for
FEW = 5  # events of a user who counts as new


def metrics_of(above: np.ndarray, tied: np.ndarray) -> dict[str, np.ndarray]:
    """Metrics [n] of lists with one right item: `above` items score higher, and `tied` as high, itself among them.

    Means over the orders of the tied items.
    """
    discounts = np.concatenate([[0], np.cumsum(1 / np.log2(np.arange(10) + 2))])
    first, last = np.minimum(above, 10), np.minimum(above + tied, 10)
    return {
        "ndcg@10": (discounts[last] - discounts[first]) / tied,
        "hr@10": (last - first) / tied,
        "recall@100": (np.minimum(above + tied, 100) - np.minimum(above, 100)) / tied,
    }


def targets_of(log: BehaviorLog, labels: np.ndarray, rows: np.ndarray, count: int, seed: int) -> tuple[np.ndarray, int]:
    """At most `count` positives [n] of `rows` whose item was new to the user, drawn at random; how many were not."""
    taken = rows[labels[rows] == 1]
    key = log.user_codes.astype(np.int64) * log.num_items + log.item_codes
    order = np.lexsort((log.timestamps, key))
    order = order[labels[order] >= 0]
    # The first moment of each pair of user and item.
    first = order[np.searchsorted(key[order], key[taken])]
    fresh = taken[log.timestamps[first] == log.timestamps[taken]]
    # A basket may name an item twice.
    fresh = fresh[np.sort(np.unique(key[fresh], return_index=True)[1])]
    drawn = np.random.default_rng(seed).permutation(fresh)[:count]
    return np.sort(drawn), len(taken) - len(fresh)


def excluded(log: BehaviorLog, labels: np.ndarray, row: int) -> np.ndarray:
    """Items that the row's user took before or at its moment, but for the row's own."""
    user = log.user_codes[row]
    start, end = log.user_offsets[user], log.user_offsets[user + 1]
    known = np.flatnonzero((log.timestamps[start:end] <= log.timestamps[row]) & (labels[start:end] >= 0)) + start
    items = np.unique(log.item_codes[known])
    return items[items != log.item_codes[row]]


def place(scores: np.ndarray, item: int, exclude: np.ndarray) -> tuple[int, int]:
    """How many candidates score above `item`, and how many as high, itself among them."""
    allowed = np.ones(len(scores), bool)
    allowed[exclude] = False
    return int((scores[allowed] > scores[item]).sum()), int((scores[allowed] == scores[item]).sum())


def ranked(items: np.ndarray, size: int) -> np.ndarray:
    """Scores [size] by place; what was not named is last together."""
    scores = np.full(size, -1.0)
    scores[items] = np.arange(len(items), 0, -1)
    return scores


def embed(log: BehaviorLog, domain: Domain, base: str, layers: int) -> np.ndarray:
    """float32 [items, d]: mean of the base's hidden states over the tokens of an item's text, after `layers` layers."""
    import torch
    from transformers import AutoModel

    from llmrec_peft.models.base import load_tokenizer, resolve_base

    tokenizer = load_tokenizer(base)
    model = AutoModel.from_pretrained(resolve_base(base), num_hidden_layers=layers + 1, dtype=torch.float32).eval()
    table = {name: log.items.column(name).to_pylist() for name in domain.event_columns}
    texts = [
        domain.event.format(**{name: column[row] for name, column in table.items()}) for row in range(log.num_items)
    ]
    found = np.empty((len(texts), model.config.hidden_size), np.float32)
    order = np.argsort([len(text) for text in texts], kind="stable")
    with torch.inference_mode():
        for start in range(0, len(order), 64):
            part = order[start : start + 64]
            batch = tokenizer([texts[row] for row in part], return_tensors="pt", padding=True, truncation=True)
            hidden = model(**batch, output_hidden_states=True).hidden_states[layers]  # the last has a norm of its own
            mask = batch["attention_mask"][:, :, None].float()
            found[part] = ((hidden * mask).sum(1) / mask.sum(1)).numpy()
    return found


def measure(name: str, options: argparse.Namespace) -> dict:
    """All figures of one log."""
    domain = Domain.from_yaml(ROOT / "recipes" / "configs" / name / "domain.yaml")
    log = BehaviorLog.read(Path(options.data) / name)
    splits = log.split(by=domain.split.by, valid=domain.split.valid, test=domain.split.test)
    labels = feedback(log, domain)
    start = time.perf_counter()
    retrieval_index = RetrievalIndex.fit(log, splits.train.rows, labels, seed=options.seed)
    fit_seconds = time.perf_counter() - start
    embeddings = None if options.base == "none" else embed(log, domain, options.base, options.layers)
    rows, repeats = targets_of(log, labels, splits[options.split].rows, options.targets, options.seed)
    if not len(rows):
        stop(f"log {name} has no positive of a new item in {options.split}; give a larger log")
    quotas = dict(part.split("=") for part in options.quotas) if options.quotas else QUOTAS
    quotas = {key: float(share) for key, share in quotas.items() if key != "text" or embeddings is not None}
    retriever = Retriever(retrieval_index, embeddings, quotas)
    sources = [source for source in SOURCES if source in MODELS or (source == "text" and embeddings is not None)]
    histories = Histories.before(log, labels, log.user_codes[rows], log.timestamps[rows])
    places, seconds, found = {source: [] for source in [*sources, "merged"]}, [], []
    for number, row in enumerate(rows.tolist()):
        history, item, exclude = histories.part(number, number + 1), log.item_codes[row], excluded(log, labels, row)
        for source in sources:
            named = retriever.source(source, history, log.num_items, exclude)
            places[source].append(place(ranked(named, log.num_items), item, exclude))
        start = time.perf_counter()
        merged = retriever.retrieve(history, NAMED, exclude)
        seconds.append(time.perf_counter() - start)
        places["merged"].append(place(ranked(merged.items, log.num_items), item, exclude))
        found.append(recall(merged.items, [item], NAMED))
    users, counts = log.user_codes[rows], histories.counts
    values = {source: metrics_of(*np.array(pairs).T) for source, pairs in places.items()}
    if log.num_items > NAMED and not np.allclose(values["merged"]["recall@100"], found):
        stop("recall@100 from places and from the lists differ; the benchmark is wrong")
    slices = {
        "all": np.ones(len(rows), bool),
        f"users with fewer than {FEW} events": counts < FEW,
        "items without training rows": retrieval_index.item_rows[log.item_codes[rows]] == 0,
    }
    return {
        "targets": len(rows),
        "users": len(np.unique(users)),
        "positives_left_out_as_taken_before": repeats,
        "items": log.num_items,
        "training": retrieval_index.note,
        "half_life_days": retrieval_index.models["popularity"].half_life,
        "quotas": quotas,
        "fit_seconds": fit_seconds,
        "merged_milliseconds": {f"p{q}": float(np.percentile(seconds, q) * 1000) for q in (50, 99)},
        "slices": {
            title: {"targets": int(mask.sum()), "users": len(np.unique(users[mask]))}
            | {source: _intervals(found, users, mask, options.seed) for source, found in values.items()}
            for title, mask in slices.items()
            if mask.any()
        },
        "merged_minus": {
            source: _differences(values[source], values["merged"], users, options.seed) for source in sources
        },
    }


def _as_shares(values: np.ndarray) -> np.ndarray:
    return np.column_stack([1 - values, values])


# With every label 1, po_ratio is the mean of the second column: the bootstrap of a mean over users.
def _intervals(values: dict[str, np.ndarray], users: np.ndarray, mask: np.ndarray, seed: int) -> dict:
    ones = np.ones(int(mask.sum()), int)
    return {
        name: plain_interval(intervals(["po_ratio"], ones, _as_shares(value[mask]), users[mask], seed=seed)["po_ratio"])
        for name, value in values.items()
    }


def _differences(before: dict[str, np.ndarray], after: dict[str, np.ndarray], users: np.ndarray, seed: int) -> dict:
    ones = np.ones(len(users), int)
    return {
        name: plain_interval(
            differences(["po_ratio"], ones, _as_shares(before[name]), _as_shares(after[name]), users, seed=seed)[
                "po_ratio"
            ]
        )
        for name in before
    }


def _shown(value: dict[str, float | None]) -> str:
    ends = ", ".join("none" if value[key] is None else f"{value[key]:.4f}" for key in ("low", "high"))
    return f"{value['value']:.4f} [{ends}]"


def show(name: str, result: dict) -> None:
    """A table for people."""
    print(f"{name}: {result['targets']} targets of {result['users']} users, {result['items']} items")
    for title, part in result["slices"].items():
        print(f"  {title} ({part['targets']} targets of {part['users']} users)")
        for source, values in part.items():
            if isinstance(values, dict):
                cells = (f"{metric} {_shown(value)}" for metric, value in values.items())
                print(f"    {source:<13}", "  ".join(cells))


def main(arguments: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="directory that holds one directory a log")
    parser.add_argument("--logs", nargs="+", default=["movies", "retail"])
    parser.add_argument("--split", choices=["valid", "test"], default="test")
    parser.add_argument("--targets", type=int, default=2000)
    parser.add_argument("--base", default="smollm2-135m", help="encodes the items' texts; none for no text source")
    parser.add_argument("--layers", type=int, default=0, help="of the base, for the texts; 0: its token embeddings")
    parser.add_argument("--quotas", nargs="+", metavar="SOURCE=SHARE", help="of the merged retriever")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default=str(ROOT / "benchmarks" / "results" / "retrieval.json"))
    given = sys.argv[1:] if arguments is None else arguments
    options = parser.parse_args(given)
    result = header(__file__, given, options.seed) | {"split": options.split, "layers": options.layers, "logs": {}}
    try:
        for name in options.logs:
            result["logs"][name] = measure(name, options)
            show(name, result["logs"][name])
    except LLMRecError as error:
        stop(str(error))
    write_result(options.output, result)
    return result


if __name__ == "__main__":
    main()
