"""The rule of sampled negatives and what it does to AUC: systems of the protocol that need no LLM, on one log.

    python -m benchmarks.quality.negatives --data DIR --domain recipes/configs/retail/domain.yaml --rule past

One run measures the rule of the package that it imports and adds it to the result file under --rule. For the former
rule, run the benchmark of commit a100933. A system of its own, `taken_before`, is a logistic regression on how often
the user took the item before, and a slice of the test holds the items that the user had not taken.
"""

import argparse
import functools
import json
from pathlib import Path

import numpy as np

from benchmarks.measuring import Benchmark, read_streams, run
from benchmarks.quality.count_features import Earlier
from benchmarks.quality.protocol import Split, boosted, collaborative, compared, counted, regression
from llmrec_peft.data.streams import StreamDataset


def shares(streams: StreamDataset) -> dict[str, float]:
    """Of a split's sampled negatives: how many, and the shares whose item the user took before, then and later."""
    log, chosen = streams.log, streams.sampled
    rows, items = streams.target_rows[chosen], streams.target_items[chosen]
    pairs = log.user_codes.astype(np.int64) * log.num_items + log.item_codes
    wanted, moment = log.user_codes[rows].astype(np.int64) * log.num_items + items, log.timestamps[rows]
    counts = Earlier(pairs, log.timestamps, rows=np.ones(len(log)))
    before, until, ever = (counts.sums("rows", wanted, np.broadcast_to(at, len(rows)))
                           for at in (moment, np.nextafter(moment, np.inf), np.inf))  # fmt: skip
    return {"positives": int((~chosen).sum()), "negatives": int(chosen.sum()),
            "taken before": float((before > 0).mean()), "taken then": float((until > before).mean()),
            "taken later": float((ever > until).mean())}  # fmt: skip


def measure(options: argparse.Namespace, scratch: Path) -> dict:
    """Counts and quality under one rule, beside the rules of the result file."""
    split = Split(read_streams(options))
    p = counted(split) | boosted(split, options.seed) | collaborative(split, options.seed)
    taken = {name: frame[["pair_count"]] for name, frame in split.frames.items()}
    p["taken_before"] = regression(taken["train"], split.labels["train"])(taken["test"])
    before = taken["test"]["pair_count"].to_numpy() > 0
    old = json.loads(options.output.read_text(encoding="utf-8"))["rules"] if options.output.is_file() else {}
    found = {
        "splits": {name: shares(split.streams[name]) for name in split.points},
        "positives taken before": float(before[split.labels["test"] == 1].mean()),
        "test": compared(p, split.points["test"], {"items new to the user": ~before}, options),
    }
    return {"log": split.log.name, "rules": old | {options.rule: found}}


BENCHMARK = Benchmark(measure, "negatives.json", {
    "rule": ("past", "name of the rule of the package that is imported", ("former", "past")),
    "bootstrap": (1000, "samples of the intervals"),
}, "retail")  # fmt: skip


main = functools.partial(run, __file__, __doc__, BENCHMARK)

if __name__ == "__main__":
    main()
