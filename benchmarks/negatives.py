"""The rule of sampled negatives and what it does to AUC: systems of the protocol that need no LLM, on one log.

One run measures the rule of the package that it imports and adds it to the result file under --rule. For the former
rule, run it over a checkout of the commit before (PYTHONPATH=CHECKOUT). Everything else is the same in both: the log,
the positives, the systems, the seed.

Of each split it counts the negatives whose item the user took before the positive (by any row of the log), at the same
moment, and later: an item taken before as a negative is a mistake, and one that can never be taken later tells of the
future. A system of its own, `taken_before`, is a logistic regression on how often the user took the item before, and a
slice of the test holds the items that the user had not taken.

    python benchmarks/negatives.py --data DIR --domain recipes/configs/retail/domain.yaml --rule past
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
from count_features import CountFeatures, Points
from measuring import header, quiet, write_result
from protocol import boosted, collaborative, compared, counted, regression

from llmrec_peft.config.schema import DataConfig
from llmrec_peft.data.domain import Domain
from llmrec_peft.data.streams import StreamDataset
from llmrec_peft.models.base import load_tokenizer, resolve_base
from llmrec_peft.runs.split_streams import build_split_streams, read_log

ROOT = Path(__file__).resolve().parent.parent
RULES = ("former", "past")
SHOWN = ("auc", "gauc", "logloss")


def main(arguments: list[str] | None = None) -> dict:
    """Measure one rule, write it beside the other and print the table; returns the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--domain", required=True)
    parser.add_argument("--rule", choices=RULES, required=True, help="the rule of the package that is imported")
    parser.add_argument("--base", default="smollm2-135m", help="whose tokens are counted")
    parser.add_argument("--bootstrap", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default=str(ROOT / "benchmarks/results/negatives.json"))
    options = parser.parse_args(arguments)
    domain = Domain.from_yaml(options.domain)
    with quiet():
        found = measure(options, domain)
    place = Path(options.output)
    rules = json.loads(place.read_text(encoding="utf-8"))["rules"] if place.is_file() else {}
    shown = ["--data", options.data, "--domain", f"recipes/configs/{domain.name}/domain.yaml", "--rule", options.rule]
    own = header(__file__, shown, options.seed)
    result = own | {"log": found.pop("log"), "rules": rules | {options.rule: found | {"date": own["date"]}}}
    write_result(place, result)
    show(result["rules"])
    return result


def measure(options: argparse.Namespace, domain: Domain) -> dict:
    log = read_log(DataConfig(path=options.data))
    streams = build_split_streams(log, domain, load_tokenizer(resolve_base(options.base)))
    points = {name: Points.of(streams[name]) for name in streams.splits}
    counts = CountFeatures(log, domain, streams.splits.train.rows, domain.split.by)
    frames = {name: counts.frame(part) for name, part in points.items()}
    answers = counted(frames, points) | boosted(frames, points, options.seed) | collaborative(streams, points, options)
    fitted = regression(frames["train"][["pair_count"]], points["train"].labels)
    answers["taken_before"] = fitted(frames["test"][["pair_count"]])
    new = {"items new to the user": frames["test"]["pair_count"].to_numpy() == 0}
    return {
        "log": log.name,
        "splits": {name: shares(streams[name]) for name in streams.splits},
        "positives taken before": float((frames["test"]["pair_count"][points["test"].labels == 1] > 0).mean()),
        "test": compared(answers, points["test"], new, options),
    }


def shares(streams: StreamDataset) -> dict[str, float]:
    """Of a split's sampled negatives: how many, and the shares whose item the user took before, then and later."""
    log, chosen = streams.log, streams.sampled
    rows, items = streams.target_rows[chosen], streams.target_items[chosen]
    keys = log.user_codes.astype(np.int64) * log.num_items + log.item_codes
    order = np.lexsort((log.timestamps, keys))
    wanted = log.user_codes[rows].astype(np.int64) * log.num_items + items
    begin, end = (np.searchsorted(keys[order], wanted, side) for side in ("left", "right"))
    times, place = log.timestamps[order], np.minimum(begin, len(order) - 1)
    met, moment = end > begin, log.timestamps[rows]
    first, last = times[place], times[np.maximum(end - 1, 0)]
    # A pair of user and item has few rows, so that a moment of its own is looked up by its exact key.
    same = np.isin(_moments(log, wanted, moment), _moments(log, keys, log.timestamps))
    return {"positives": int((~chosen).sum()), "negatives": int(chosen.sum()),
            "taken before": float((met & (first < moment)).mean()), "taken then": float(same.mean()),
            "taken later": float((met & (last > moment)).mean())}  # fmt: skip


def _moments(log, keys: np.ndarray, times: np.ndarray) -> np.ndarray:
    moments = np.unique(log.timestamps)
    return keys * np.int64(len(moments)) + np.searchsorted(moments, times)


def show(rules: dict) -> None:
    """Print what was counted and measured, rule by rule."""
    for rule in (name for name in RULES if name in rules):
        found = rules[rule]
        for name, part in found["splits"].items():
            print(f"{rule}, {name}: {part['negatives']:,} negatives, taken before {part['taken before']:.2%}, "
                  f"at that moment {part['taken then']:.2%}, later {part['taken later']:.2%}")  # fmt: skip
        print(f"{rule}, test: {found['positives taken before']:.1%} of positives were taken before")
        for name, system in found["test"]["systems"].items():
            values = (system["metrics"][key] for key in SHOWN)
            print(
                f"{rule}, {name:22}" + "".join(f"{v['value']:>8.3f} [{v['low']:.3f}, {v['high']:.3f}]" for v in values)
            )


if __name__ == "__main__":
    main()
    sys.stdout.flush()
