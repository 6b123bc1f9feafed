"""The full protocol on one log: every system on the same held-out targets.

    python -m benchmarks.quality.protocol --data DIR --domain FILE llm=OUT/movies fused=OUT/fuse:fused

Fitted here on the training rows alone; validation chooses settings and fits the last regression on a model's scores,
and test is scored once:
- popularity, co_occurrence, matrix_factorisation: the package's collaborative models; where a log has both outcomes the
  last is that of the labels, with the rates of item and user as its biases;
- item_rate, user_rate, both_rates: rates counted before the target; a logistic regression on both with their counts;
- lightgbm: boosting on count_features.py;
- text: the frozen base's mean hidden state of each item's text; a logistic regression on it, on its products with the
  means of what the user took and left, and on the user's rate.

Read from output directories of recipes, NAME=OUT, or NAME=OUT:PART for a system of recipes/index.py. A name given again
is the same system trained with another seed: the first is compared, and the spread of all is shown. Systems that
predicted all test targets are compared on all of them, and all systems on those that every one predicted. Differences
to `llm` are paired.
"""

import argparse
import functools
import json
from pathlib import Path

import lightgbm
import numpy as np
import pandas as pd
import torch
import yaml
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from benchmarks.measuring import Benchmark, columns, metrics_of, read_streams, run, stop
from benchmarks.quality.count_features import CountFeatures, Earlier, Points
from llmrec_peft import Domain
from llmrec_peft.data.streams import StreamDataset
from llmrec_peft.evaluation.metrics import compute_metrics
from llmrec_peft.evaluation.report_content import count_slices
from llmrec_peft.models.base import load_tokenizer, resolve_base
from llmrec_peft.retrieval.histories import feedback
from llmrec_peft.retrieval.retrieval_index import RetrievalIndex
from llmrec_peft.runs.split_streams import SplitStreams

METRICS = ("auc", "gauc", "logloss", "ne", "ece", "po_ratio")
COMPARED = ("auc", "gauc", "logloss")
LEAVES = (7, 15, 31, 63)  # of the trees; validation chooses
COUNTED = ["item_rate", "user_rate", "item_count", "user_count"]
WIDTH = 64  # principal components of the text embeddings
TOKENS = 4000  # of a batch of item texts

Predictions = dict[str, np.ndarray]
"""Chance of label 1, [targets of test], by system; NaN where a system predicted none."""


# -- systems that are fitted here ------------------------------------------------------------------


class Split:
    """One log's streams with the points and count features of each split."""

    def __init__(self, streams: SplitStreams) -> None:
        self.streams, self.log, self.domain = streams, streams.log, streams.train.domain
        self.points = {name: Points.of(streams[name]) for name in streams.splits}
        counts = CountFeatures(self.log, self.domain, streams.splits.train.rows, self.domain.split.by)
        self.frames = {name: counts.frame(part) for name, part in self.points.items()}
        self.labels = {name: part.labels for name, part in self.points.items()}
        self.feedback = feedback(self.log, self.domain)


def regression(inputs, labels: np.ndarray, strength: float = 1.0):
    """A logistic regression on standardised inputs, as a function from inputs to the chance of label 1."""
    model = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=2000))
    model.fit(np.asarray(inputs, np.float64), labels)
    return lambda other: model.predict_proba(np.asarray(other, np.float64))[:, 1]


def counted(split: Split) -> Predictions:
    """Rates alone, and the logistic regression on both with their counts."""
    test = split.frames["test"]
    found = {name: 1 / (1 + np.exp(-test[name].to_numpy())) for name in ("item_rate", "user_rate")}
    return found | {"both_rates": regression(split.frames["train"][COUNTED], split.labels["train"])(test[COUNTED])}


def boosted(split: Split, seed: int) -> Predictions:
    """LightGBM; validation chooses the leaves and the number of trees."""
    models = []
    for leaves in LEAVES:
        model = lightgbm.LGBMClassifier(
            n_estimators=2000, learning_rate=0.05, num_leaves=leaves, min_child_samples=50, subsample=0.8,
            subsample_freq=1, colsample_bytree=0.8, random_state=seed, deterministic=True, force_row_wise=True,
            n_jobs=torch.get_num_threads(), verbose=-1,
        )  # fmt: skip
        models.append(model.fit(
            split.frames["train"], split.labels["train"], eval_X=split.frames["valid"], eval_y=split.labels["valid"],
            eval_metric="binary_logloss", callbacks=[lightgbm.early_stopping(50, verbose=False)],
        ))  # fmt: skip
    best = min(models, key=lambda model: model.best_score_["valid_0"]["binary_logloss"])
    return {"lightgbm": best.predict_proba(split.frames["test"])[:, 1]}


def collaborative(split: Split, seed: int) -> Predictions:
    """Scores of collaborative models, each turned into a probability by a regression on validation."""
    train, labels = split.streams.splits.train.rows, split.feedback
    index = RetrievalIndex.fit(split.log, train, labels, seed=seed, timed=split.domain.split.by == "time")
    found = {name: index.target_features(split.log, labels, split.points[name].rows, split.points[name].items)
             for name in ("valid", "test")}  # fmt: skip
    both = len(np.unique(labels[train])) > 1 and (labels == 0).any()
    models = {
        "popularity": ["popularity"], "co_occurrence": ["cooccurrence"],
        "matrix_factorisation": ["item_rate", "user_rate", "label_factors"] if both else ["factors"],
    }  # fmt: skip
    p = {}
    for title, names in models.items():
        chosen = [found["valid"].names.index(name) for name in names]
        fitted = regression(found["valid"].values[:, chosen], split.labels["valid"])
        p[title] = fitted(found["test"].values[:, chosen])
    return p


def frozen_text(split: Split, base: str) -> Predictions:
    """A regression on embeddings of the item's text and of what the user took and left before."""
    vectors, inputs = embeddings(split.streams.train, base), {}
    for name, part in split.points.items():
        took, left = (profile(split.log, split.feedback == label, vectors, part) for label in (1, 0))
        own, rate = vectors[part.items], split.frames[name][["user_rate", "user_count"]].to_numpy()
        inputs[name] = np.hstack([own, own * took, own * left, rate]).astype(np.float32)
    truth, fits = split.labels["valid"], []
    for strength in (0.001, 0.01, 0.1):
        fitted = regression(inputs["train"], split.labels["train"], strength)
        p = columns(fitted(inputs["valid"]))
        fits.append((-np.mean(np.log(p[np.arange(len(truth)), truth])), strength, fitted))
    return {"text": min(fits)[2](inputs["test"])}


@torch.inference_mode()
def text_vectors(log, domain: Domain, base: str) -> np.ndarray:
    """float32 [items, width]: mean hidden state of the base over each item's text."""
    from transformers import AutoModel

    items, tokenizer = log.items, load_tokenizer(resolve_base(base))
    model = AutoModel.from_pretrained(resolve_base(base), dtype=torch.float32).eval()
    names = [name for name in domain.event_columns if name in items.column_names] or ["title"]
    rows = zip(*(items.column(name).to_pylist() for name in names), strict=True)
    tokens = tokenizer([", ".join(str(value) for value in row if value) or "-" for row in rows],
                       add_special_tokens=False)["input_ids"]  # fmt: skip
    lengths = np.array([len(ids) for ids in tokens])
    order, size = np.argsort(lengths), max(1, TOKENS // lengths.max())
    found = np.zeros((len(tokens), model.config.hidden_size), np.float32)
    for start in range(0, len(order), size):
        part = order[start : start + size]
        batch = tokenizer.pad({"input_ids": [tokens[item] for item in part]}, padding_side="right", return_tensors="pt")
        mask = batch["attention_mask"][..., None]
        hidden = model(input_ids=batch["input_ids"], attention_mask=mask[..., 0]).last_hidden_state
        found[part] = ((hidden * mask).sum(1) / mask.sum(1)).numpy()
    return found


def embeddings(streams: StreamDataset, base: str) -> np.ndarray:
    """Unit vectors [items, WIDTH]: principal components of the items' text vectors."""
    found = text_vectors(streams.log, streams.domain, base)
    centred = found - found.mean(0)
    reduced = centred @ np.linalg.svd(centred, full_matrices=False)[2][:WIDTH].T
    return reduced / np.maximum(np.linalg.norm(reduced, axis=1, keepdims=True), 1e-9)


def profile(log, chosen: np.ndarray, vectors: np.ndarray, points: Points) -> np.ndarray:
    """Mean vector [n, WIDTH] of a user's chosen rows strictly before each target; zeros without any."""
    rows = np.flatnonzero(chosen)
    # Rows go by user, then time, so the rows of a user before a time are a run.
    begin, end = Earlier(log.user_codes[rows], log.timestamps[rows]).span(points.users, points.times)
    sums = np.cumsum(vectors[log.item_codes[rows]], axis=0, dtype=np.float64)
    sums = np.vstack([np.zeros((1, vectors.shape[1])), sums])
    return ((sums[end] - sums[begin]) / np.maximum(end - begin, 1)[:, None]).astype(np.float32)


# -- systems that recipes ran ----------------------------------------------------------------------


def read_predictions(place: str, streams: StreamDataset) -> np.ndarray:
    """Chance of label 1 [targets of test] by a run's predictions; NaN where it predicted none."""
    directory, _, part = place.partition(":")
    table = pd.read_parquet(Path(directory) / "predictions.parquet")
    table = table[table["split"] == "test"]
    name = "_".join(["p", *([part] if part else []), streams.domain.labels[1 - streams.domain.negative_class]])
    own = streams.describe(np.arange(streams.num_targets)).to_pandas()
    keys = ["user_id", "item_id", "timestamp", "label"]
    for frame in (own, table):  # the same pair can stand twice at one moment
        frame["number"] = frame.groupby(keys).cumcount()
    joined = own.merge(table[[*keys, "number", name]], "left", [*keys, "number"])
    matched = int(joined[name].notna().sum())
    if matched != len(table):
        stop(f"{place}: {len(table) - matched} of {len(table)} test predictions are for other targets")
    return joined[name].to_numpy(np.float64)


def budget(place: str) -> dict:
    """What a run's training took: steps or epochs and seed by its configuration, targets and seconds by its metrics."""
    directory, found = Path(place.partition(":")[0]), {}
    if (directory / "config.yaml").is_file():
        train = yaml.safe_load((directory / "config.yaml").read_text(encoding="utf-8")).get("train", {})
        found = {key: train[key] for key in ("max_steps", "epochs") if train.get(key)} | {"seed": train.get("seed")}
    if (directory / "metrics.json").is_file():
        cost = json.loads((directory / "metrics.json").read_text(encoding="utf-8")).get("cost", {})
        found |= {"targets": cost.get("training targets"), "seconds": cost.get("training steps alone, seconds"),
                  "device": cost.get("device")}  # fmt: skip
    return {key: value for key, value in found.items() if value is not None}


# -- comparing -------------------------------------------------------------------------------------


def sliced(split: Split) -> dict[str, np.ndarray]:
    """Slices of the test targets: by training rows of the item, and by earlier events of the user."""
    log, test = split.log, split.points["test"]
    seen = np.bincount(log.item_codes[split.streams.splits.train.rows], minlength=log.num_items)[test.items]
    order = np.arange(len(log)) - np.repeat(log.user_offsets[:-1], np.diff(log.user_offsets))
    slices = count_slices(seen, (1, 10, 100), "training rows of the item")
    return dict(slices + count_slices(order[test.rows], (1, 10, 50), "earlier events of the user"))


def compared(p: Predictions, points: Points, slices: Predictions, options, only: np.ndarray | None = None) -> dict:
    """Metrics of each system, differences to the LLM, and AUC and GAUC by slice; `only` masks the targets."""
    only = np.ones(len(points), bool) if only is None else only
    labels, users, draw = points.labels[only], points.users[only], {"samples": options.bootstrap, "seed": options.seed}
    chances = {name: columns(one[only]) for name, one in p.items()}
    systems = {name: {"metrics": metrics_of(METRICS, labels, one, users, **draw)} for name, one in chances.items()}
    for name, one in chances.items() if "llm" in chances else ():
        if name != "llm":
            systems[name]["minus_llm"] = metrics_of(COMPARED, labels, one, users, minus=chances["llm"], **draw)
    parts, few = {}, draw | {"samples": 200}
    for title, mask in slices.items():
        mask = mask[only]
        if len(np.unique(labels[mask])) == 2:
            parts[title] = {"targets": int(mask.sum()), "systems": {
                name: metrics_of(("auc", "gauc"), labels[mask], one[mask], users[mask], **few)
                for name, one in chances.items()
            }}  # fmt: skip
    return {"targets": int(only.sum()), "users": len(np.unique(users)), "positives": int(labels.sum()),
            "systems": systems, "slices": parts}  # fmt: skip


def seeded(several: list[np.ndarray], places: list[str], points: Points, only: np.ndarray) -> dict:
    """Seeds of one system's runs, and its metrics by seed on the targets that all predicted."""
    found = [compute_metrics(points.labels[only], columns(p[only]), points.users[only]) for p in several]
    return {"seeds": [budget(place).get("seed") for place in places],
            "metrics": {name: [float(one[name]) for one in found] for name in METRICS[:5]}}  # fmt: skip


def measure(options: argparse.Namespace, scratch: Path) -> dict:
    """All systems on the test targets of one log."""
    split = Split(read_streams(options))
    if len(split.domain.labels) != 2:
        stop(f"the protocol compares two labels; domain {split.domain.name!r} has {len(split.domain.labels)}")
    p = counted(split) | boosted(split, options.seed) | collaborative(split, options.seed)
    if not options.no_text:
        p |= frozen_text(split, options.base)
    given: dict[str, list[str]] = {}
    for name, _, place in (word.partition("=") for word in options.systems):
        given.setdefault(name, []).append(place)
    read = {name: [read_predictions(place, split.streams.test) for place in places] for name, places in given.items()}
    p |= {name: several[0] for name, several in read.items()}
    test, slices = split.points["test"], sliced(split)
    shared = np.isfinite(np.column_stack([*p.values(), *(one for several in read.values() for one in several)])).all(1)
    if not shared.any():
        stop("no test target was predicted by all systems; were they run on this log and domain?")
    whole = {name: one for name, one in p.items() if np.isfinite(one).all()}
    result = {
        "log": split.log.name, "split": {"by": split.domain.split.by, **{k: len(v) for k, v in split.points.items()}},
        "budgets": {name: budget(places[0]) for name, places in given.items()},
        "all": compared(whole, test, slices, options),
    }  # fmt: skip
    if not shared.all():
        result["shared"] = compared(p, test, slices, options, shared)
    again = {name: seeded(several, given[name], test, shared) for name, several in read.items() if len(several) > 1}
    return result | ({"seeds": again} if again else {})


BENCHMARK = Benchmark(measure, "protocol_{domain}.json", {
    "*systems": (None, "NAME=OUT or NAME=OUT:PART of each recipe's output"),
    "no_text": (False, "leave out the text embedding, which takes minutes"),
    "bootstrap": (1000, "samples of the intervals"),
}, "movies")  # fmt: skip


main = functools.partial(run, __file__, __doc__, BENCHMARK)

if __name__ == "__main__":
    main()
