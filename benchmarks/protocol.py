"""The full protocol on one log: every system on the same held-out targets, with intervals.

Fitted here, on the training rows alone (validation chooses settings and fits the last regression on a model's scores;
test is scored once):
- popularity, co_occurrence, matrix_factorisation: the package's collaborative models; where a log has both outcomes the
  last is that of the labels, with the rates of item and user as its biases;
- item_rate, user_rate, both_rates: rates counted before the target; a logistic regression on both with their counts;
- lightgbm: boosting on counts, rates, pauses and the categories that the model's text holds (count_features.py);
- text: the frozen base's mean hidden state of each item's text; a logistic regression on it, on its products with the
  means of what the user took and left, and on the user's rate.

Read from the output directories of recipes, NAME=OUT (or NAME=OUT:PART for a system of recipes/index.py): the LLM, the
fusion, a stream model of item ids. A name given again is the same system trained with another seed: the first is
compared, and the spread of all is shown beside. Systems that answered all test targets are compared on all of them, and
all systems on those that every one answered. Differences to `llm` are paired; brackets are 95 % bootstrap intervals
over users.

python benchmarks/protocol.py --data DIR --domain recipes/configs/movies/domain.yaml llm=OUT/movies fused=OUT/fuse:fused
"""

import argparse
import json
import sys
from pathlib import Path

import lightgbm
import numpy as np
import pandas as pd
import torch
import yaml
from count_features import CountFeatures, Points
from measuring import cell, header, plain_intervals, quiet, spread, stop, write_result
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from llmrec_peft.config.schema import DataConfig
from llmrec_peft.data.domain import Domain
from llmrec_peft.data.streams import StreamDataset
from llmrec_peft.evaluation.bootstrap import differences, intervals
from llmrec_peft.evaluation.metrics import compute_metrics
from llmrec_peft.evaluation.report import count_slices
from llmrec_peft.models.base import load_tokenizer, resolve_base
from llmrec_peft.retrieval.histories import feedback
from llmrec_peft.retrieval.retrieval_index import RetrievalIndex
from llmrec_peft.runs.split_streams import SplitStreams, build_split_streams, read_log

ROOT = Path(__file__).resolve().parent.parent
METRICS = ("auc", "gauc", "logloss", "ne", "ece", "po_ratio")
COMPARED = ("auc", "gauc", "logloss")
SEEDED = (*COMPARED, "ne", "ece")
LEAVES = (7, 15, 31, 63)  # of the trees; validation chooses
COUNTED = ("item_rate", "user_rate", "item_count", "user_count")
WIDTH = 64  # principal components of the text embeddings
TOKENS = 4000  # of a batch of item texts


def main(arguments: list[str] | None = None) -> dict:
    """Measure, write the result and print the table; returns the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("systems", nargs="*", help="NAME=OUT or NAME=OUT:PART of each recipe's output")
    parser.add_argument("--data", required=True)
    parser.add_argument("--domain", required=True)
    parser.add_argument("--base", default="smollm2-135m", help="base of the frozen text embedding and of the tokens")
    parser.add_argument("--no-text", action="store_true", help="leave the text embedding out, which takes minutes")
    parser.add_argument("--bootstrap", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", help="default: benchmarks/results/protocol_DOMAIN.json")
    options = parser.parse_args(arguments)
    domain = Domain.from_yaml(options.domain)
    if len(domain.labels) != 2:
        stop("the protocol compares two labels; this domain has more")
    with quiet():
        found = measure(options, domain)
    given = [word.partition("=") for word in options.systems]
    shown = ["--data", options.data, "--domain", f"recipes/configs/{domain.name}/domain.yaml",
             *(f"{name}=OUT/{Path(place).name}" for name, _, place in given)]  # fmt: skip
    result = header(__file__, shown, options.seed) | found
    write_result(options.output or ROOT / f"benchmarks/results/protocol_{domain.name}.json", result)
    show(result)
    return result


def measure(options: argparse.Namespace, domain: Domain) -> dict:
    log = read_log(DataConfig(path=options.data))
    streams = build_split_streams(log, domain, load_tokenizer(resolve_base(options.base)))
    points = {name: Points.of(streams[name]) for name in streams.splits}
    counts = CountFeatures(log, domain, streams.splits.train.rows, domain.split.by)
    frames = {name: counts.frame(part) for name, part in points.items()}
    answers = counted(frames, points) | boosted(frames, points, options.seed) | collaborative(streams, points, options)
    if not options.no_text:
        answers["text"] = frozen_text(streams, points, frames, options)
    given: dict[str, list[str]] = {}
    for name, place in map(parted, options.systems):
        given.setdefault(name, []).append(place)
    read = {name: [read_answers(place, streams.test, points["test"]) for place in places]
            for name, places in given.items()}  # fmt: skip
    answers |= {name: several[0] for name, several in read.items()}
    slices = sliced(streams, points["test"])
    result = {
        "log": log.name,
        "split": {"by": domain.split.by, **{name: len(part) for name, part in points.items()}},
        "budgets": {name: budget(places[0]) for name, places in given.items()},
        "all": compared(
            {name: p for name, p in answers.items() if np.isfinite(p).all()}, points["test"], slices, options
        ),
    }
    again = [p for several in read.values() for p in several[1:]]
    shared = np.isfinite(np.column_stack([*answers.values(), *again])).all(1)
    if not shared.any():
        stop("no test target was answered by all systems; were they run on this log and domain?")
    if not shared.all():
        result["shared"] = compared(answers, points["test"], slices, options, shared)
    if again:
        result["seeds"] = {
            name: seeded(several, given[name], points["test"], shared)
            for name, several in read.items()
            if len(several) > 1
        }
    return result


def parted(word: str) -> tuple[str, str]:
    name, _, place = word.partition("=")
    return name, place


# -- systems that are fitted here ---------------------------------------------------------------------


def counted(frames: dict[str, pd.DataFrame], points: dict[str, Points]) -> dict[str, np.ndarray]:
    """Rates alone, and the logistic regression on both with their counts."""
    test = frames["test"]
    found = {name: 1 / (1 + np.exp(-test[name].to_numpy())) for name in ("item_rate", "user_rate")}
    fitted = regression(frames["train"][list(COUNTED)], points["train"].labels)
    return found | {"both_rates": fitted(test[list(COUNTED)])}


def regression(inputs, labels: np.ndarray, strength: float = 1.0):
    """A logistic regression on standardised inputs, as a function from inputs to the chance of label 1."""
    model = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=2000))
    model.fit(np.asarray(inputs, np.float64), labels)
    return lambda other: model.predict_proba(np.asarray(other, np.float64))[:, 1]


def boosted(frames: dict[str, pd.DataFrame], points: dict[str, Points], seed: int) -> dict[str, np.ndarray]:
    """LightGBM; validation chooses the leaves and the number of trees."""
    best, chosen = np.inf, None
    for leaves in LEAVES:
        model = lightgbm.LGBMClassifier(
            n_estimators=2000, learning_rate=0.05, num_leaves=leaves, min_child_samples=50, subsample=0.8,
            subsample_freq=1, colsample_bytree=0.8, random_state=seed, deterministic=True, force_row_wise=True,
            n_jobs=torch.get_num_threads(), verbose=-1,
        )  # fmt: skip
        model.fit(
            frames["train"], points["train"].labels, eval_X=frames["valid"], eval_y=points["valid"].labels,
            eval_metric="binary_logloss", callbacks=[lightgbm.early_stopping(50, verbose=False)],
        )  # fmt: skip
        loss = model.best_score_["valid_0"]["binary_logloss"]
        if loss < best:
            best, chosen = loss, model
    return {"lightgbm": chosen.predict_proba(frames["test"])[:, 1]}


def collaborative(
    streams: SplitStreams, points: dict[str, Points], options: argparse.Namespace
) -> dict[str, np.ndarray]:
    """Scores of models of the training rows, each brought to a probability by a regression on validation."""
    log, domain = streams.log, streams.train.domain
    marks = feedback(log, domain)
    retrieval_index = RetrievalIndex.fit(
        log, streams.splits.train.rows, marks, seed=options.seed, timed=domain.split.by == "time"
    )
    found = {name: retrieval_index.target_features(log, marks, points[name].rows, points[name].items)
             for name in ("valid", "test")}  # fmt: skip
    both = len(np.unique(marks[streams.splits.train.rows])) > 1 and (marks == 0).any()
    models = {
        "popularity": ["popularity"],
        "co_occurrence": ["cooccurrence"],
        "matrix_factorisation": ["item_rate", "user_rate", "label_factors"] if both else ["factors"],
    }
    answers = {}
    for title, names in models.items():
        columns = [found["valid"].names.index(name) for name in names]
        fitted = regression(found["valid"].values[:, columns], points["valid"].labels)
        answers[title] = fitted(found["test"].values[:, columns])
    return answers


# -- the frozen base ----------------------------------------------------------------------------------


def frozen_text(
    streams: SplitStreams, points: dict[str, Points], frames: dict[str, pd.DataFrame], options: argparse.Namespace
) -> np.ndarray:
    """Chance by a logistic regression on embeddings of the item's text and of what the user took and left before."""
    vectors = embeddings(streams.train, options.base)
    log, marks = streams.log, feedback(streams.log, streams.train.domain)
    inputs = {}
    for name, part in points.items():
        took, left = (profile(log, marks == sign, vectors, part) for sign in (1, 0))
        own = vectors[part.items]
        rate = frames[name][["user_rate", "user_count"]].to_numpy()
        inputs[name] = np.hstack([own, own * took, own * left, rate]).astype(np.float32)
    losses = {}
    for strength in (0.001, 0.01, 0.1):
        fitted = regression(inputs["train"], points["train"].labels, strength)
        p = np.clip(fitted(inputs["valid"]), 1e-7, 1 - 1e-7)
        truth = points["valid"].labels
        losses[strength] = (-np.mean(truth * np.log(p) + (1 - truth) * np.log(1 - p)), fitted)
    return min(losses.values(), key=lambda pair: pair[0])[1](inputs["test"])


@torch.inference_mode()
def embeddings(streams: StreamDataset, base: str) -> np.ndarray:
    """Unit vectors [items, WIDTH]: principal components of the base's mean last hidden state over each item's text."""
    from transformers import AutoModel

    domain, log = streams.domain, streams.log
    directory = resolve_base(base)
    model, tokenizer = AutoModel.from_pretrained(directory, dtype=torch.float32).eval(), load_tokenizer(directory)
    names = [name for name in domain.event_columns if name in log.items.column_names] or ["title"]
    columns = [log.items.column(name).to_pylist() for name in names]
    texts = [", ".join(str(value) for value in row if value) or "-" for row in zip(*columns, strict=True)]
    tokens = tokenizer(texts, add_special_tokens=False)["input_ids"]
    order = np.argsort([len(ids) for ids in tokens])
    found = np.zeros((len(tokens), model.config.hidden_size), np.float32)
    size = max(1, TOKENS // max(len(ids) for ids in tokens))
    for start in range(0, len(order), size):
        part = order[start : start + size]
        longest = max(len(tokens[item]) for item in part)
        ids = torch.full((len(part), longest), tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
        for row, item in enumerate(part):
            ids[row, : len(tokens[item])] = torch.tensor(tokens[item])
            mask[row, : len(tokens[item])] = 1
        hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state * mask[..., None]
        found[part] = (hidden.sum(1) / mask.sum(1, keepdim=True)).numpy()
    centred = found - found.mean(0)
    _, _, axes = np.linalg.svd(centred, full_matrices=False)
    reduced = centred @ axes[:WIDTH].T
    return reduced / np.maximum(np.linalg.norm(reduced, axis=1, keepdims=True), 1e-9)


def profile(log, chosen: np.ndarray, vectors: np.ndarray, points: Points) -> np.ndarray:
    """Mean vector [n, WIDTH] of a user's chosen rows strictly before each target; zeros without any."""
    rows = np.flatnonzero(chosen)
    # Rows go by user, then time, so the rows of a user before a time are a run.
    moments, codes = np.unique(log.timestamps, return_inverse=True)
    width = len(moments) + 1
    places = log.user_codes[rows].astype(np.int64) * width + codes[rows]
    sums = np.vstack(
        [np.zeros((1, vectors.shape[1])), np.cumsum(vectors[log.item_codes[rows]], axis=0, dtype=np.float64)]
    )
    begin = np.searchsorted(places, points.users * width)
    end = np.searchsorted(places, points.users * width + np.searchsorted(moments, points.times))
    return ((sums[end] - sums[begin]) / np.maximum(end - begin, 1)[:, None]).astype(np.float32)


# -- systems that recipes ran -------------------------------------------------------------------------


def read_answers(place: str, streams: StreamDataset, points: Points) -> np.ndarray:
    """Chance of label 1 [targets of test] by a run's predictions; NaN where it answered none."""
    directory, _, part = place.partition(":")
    table = pd.read_parquet(Path(directory) / "predictions.parquet")
    table = table[table["split"] == "test"]
    name = "_".join(["p", *([part] if part else []), streams.domain.labels[1 - streams.domain.negative_class]])
    own = streams.describe(np.arange(len(points))).to_pandas()
    keys = ["user_id", "item_id", "timestamp", "label"]
    for frame in (own, table):  # the same pair can stand twice at one moment
        frame["number"] = frame.groupby(keys).cumcount()
    joined = own.merge(table[[*keys, "number", name]], "left", [*keys, "number"])
    answered = int(joined[name].notna().sum())
    if answered != len(table):
        stop(f"{place}: {len(table) - answered} of {len(table)} test answers are to other targets")
    return joined[name].to_numpy(np.float64)


def budget(place: str) -> dict:
    """What a run's training took: steps or epochs from its configuration, targets and seconds from its metrics."""
    directory = Path(place.partition(":")[0])
    found = {}
    if (directory / "config.yaml").is_file():
        train = yaml.safe_load((directory / "config.yaml").read_text()).get("train", {})
        found = {key: train[key] for key in ("max_steps", "epochs") if train.get(key)}
    if (directory / "metrics.json").is_file():
        cost = json.loads((directory / "metrics.json").read_text()).get("cost", {})
        found |= {"targets": cost.get("training targets"), "seconds": cost.get("training steps alone, seconds"),
                  "device": cost.get("device")}  # fmt: skip
    return {key: value for key, value in found.items() if value is not None}


# -- comparing ----------------------------------------------------------------------------------------


def sliced(streams: SplitStreams, points: Points) -> dict[str, np.ndarray]:
    """Slices of the test targets: by training rows of the item, and by what was seen of the user before."""
    log = streams.log
    seen = np.bincount(log.item_codes[streams.splits.train.rows], minlength=log.num_items)[points.items]
    order = np.arange(len(log)) - np.repeat(log.user_offsets[:-1], np.diff(log.user_offsets))
    slices = count_slices(seen, (1, 10, 100), "training rows of the item")
    return dict(slices + count_slices(order[points.rows], (1, 10, 50), "earlier events of the user"))


def compared(
    answers: dict[str, np.ndarray], points: Points, slices: dict[str, np.ndarray], options: argparse.Namespace,
    only: np.ndarray | None = None,
) -> dict:  # fmt: skip
    """Metrics of each system, differences to the LLM, and AUC and GAUC by slice."""
    only = np.ones(len(points), bool) if only is None else only
    labels, users, draw = points.labels[only], points.users[only], {"samples": options.bootstrap, "seed": options.seed}
    chances = {name: two(p[only]) for name, p in answers.items()}
    systems = {
        name: {"metrics": plain_intervals(intervals(METRICS, labels, p, users, **draw))} for name, p in chances.items()
    }
    if "llm" in chances:
        for name, p in chances.items():
            if name != "llm":
                systems[name]["minus_llm"] = plain_intervals(
                    differences(COMPARED, labels, chances["llm"], p, users, **draw)
                )
    parts = {}
    for title, mask in slices.items():
        mask = mask[only]
        if len(np.unique(labels[mask])) == 2:
            found = {name: plain_intervals(intervals(("auc", "gauc"), labels[mask], p[mask], users[mask], samples=200,
                                           seed=options.seed)) for name, p in chances.items()}  # fmt: skip
            parts[title] = {"targets": int(mask.sum()), "systems": found}
    return {"targets": int(only.sum()), "users": len(np.unique(users)), "positives": int(labels.sum()),
            "systems": systems, "slices": parts}  # fmt: skip


def seeded(several: list[np.ndarray], places: list[str], points: Points, only: np.ndarray) -> dict:
    """Seeds of one system's runs, and the spread of its metrics over them on the targets that all answered."""
    labels, users = points.labels[only], points.users[only]
    found = [compute_metrics(labels, two(p[only]), users) for p in several]
    return {
        "seeds": [seed_of(place) for place in places],
        "metrics": {name: [float(metrics[name]) for metrics in found] for name in SEEDED},
    }


def seed_of(place: str) -> int | None:
    """Training seed of a run by its configuration; None where it has none."""
    config = Path(place.partition(":")[0]) / "config.yaml"
    return yaml.safe_load(config.read_text()).get("train", {}).get("seed") if config.is_file() else None


def two(p: np.ndarray) -> np.ndarray:
    p = np.clip(p, 1e-7, 1 - 1e-7)
    return np.column_stack([1 - p, p])


def show(result: dict) -> None:
    """Print both tables."""
    for part in ("all", "shared"):
        if part in result:
            print(f"{result['log']}, {part}: {result[part]['targets']:,} targets of {result[part]['users']:,} users")
            print(f"{'':22}" + "".join(f"{name:>24}" for name in COMPARED) + f"{'ece':>10}")
            for name, system in result[part]["systems"].items():
                values = system["metrics"]
                cells = "".join(
                    f"{v['value']:>8.3f} [{v['low']:.3f}, {v['high']:.3f}]" for v in (values[m] for m in COMPARED)
                )
                print(f"{name:22}{cells}{values['ece']['value']:>10.3f}")
    for name, found in result.get("seeds", {}).items():
        values = "; ".join(f"{m} {cell(spread(found['metrics'][m]), '{:.3f}')}" for m in COMPARED)
        print(f"{name}, seeds {', '.join(map(str, found['seeds']))}: {values}")


if __name__ == "__main__":
    main()
    sys.stdout.flush()
