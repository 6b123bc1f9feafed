"""Scoring many candidates of one history, beside a padded batch of independent prompts.

Real titles and a real user's history; the classifier is a LoRA bundle (r 16, all linear layers). In each round, one
after the other, on the same history and candidates:
- independent: each candidate as a prompt of its own, padded to the longest, in batches of `--batch` rows through the
  same bundle by PEFT, as a user of Transformers would;
- scorer: `Scorer.score` with nothing kept, so the history is encoded in each round;
- kept: `Scorer.score` of the same history again;
- extended: the history has grown by one event since the last call.

python benchmarks/score_speed.py --data DIR --domain recipes/configs/movies/domain.yaml [--bundle OUT/bundle]
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from bank import make_bundle
from measuring import header, machine, memory_mib, quiet, release_memory, reset_peak, spread, stop, write_result

from llmrec_peft import BehaviorLog, Domain, Scorer
from llmrec_peft.checkpoints.loading import load_trained
from llmrec_peft.config.schema import DataConfig
from llmrec_peft.evaluation.calibration import Calibration
from llmrec_peft.runs.split_streams import read_log

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="simulated:shop")
    parser.add_argument("--domain", default=str(ROOT / "recipes/configs/shop/domain.yaml"))
    parser.add_argument("--bundle", help="a trained bundle; by default one of random weights is made")
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--candidates", type=int, default=50)
    parser.add_argument("--tokens", type=int, default=400, help="of the history, at least")
    parser.add_argument("--batch", type=int, default=10, help="rows of a batch of independent prompts")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default=str(ROOT / "benchmarks/results/score_speed.json"))
    options = parser.parse_args()
    with quiet(), tempfile.TemporaryDirectory() as scratch:
        result = header(__file__, sys.argv[1:], options.seed) | measure(options, Path(scratch))
    write_result(options.output, result)
    show(result)


def measure(options: argparse.Namespace, scratch: Path) -> dict:
    log = read_log(DataConfig(path=options.data))
    domain = Domain.from_yaml(options.domain)
    bundle = options.bundle or make_bundle(scratch / "bundle", options.base, domain, options.seed)
    fresh, kept = Scorer.load(bundle, log, cache_bytes=0), Scorer.load(bundle, log)
    history, candidates = pick(log, domain, fresh, options)
    prompts = independent_prompts(fresh, history, candidates)
    loaded = load_trained(bundle)
    calibration = Calibration.from_dict(loaded.calibration)

    def extended() -> np.ndarray:
        kept._bank._engine.prefix_cache.clear()
        kept.score(history[:-1], candidates[:1])
        start = time.perf_counter()
        found = kept.score(history, candidates)
        seconds["extended"].append(time.perf_counter() - start)
        return found

    def timed(name: str, work) -> np.ndarray:
        start = time.perf_counter()
        found = work()
        seconds[name].append(time.perf_counter() - start)
        return found

    seconds: dict[str, list[float]] = {name: [] for name in ("independent", "scorer", "kept", "extended")}
    worst = 0.0
    for number in range(options.rounds + 1):
        wanted = calibration.apply(timed("independent", lambda: run(loaded, prompts, options.batch)))
        found = [timed("scorer", lambda: fresh.score(history, candidates)), extended()]
        found.append(timed("kept", lambda: kept.score(history, candidates)))
        worst = max(worst, *(float(np.abs(one - wanted).max()) for one in found))
        if number == 0:  # a first round warms up
            for times in seconds.values():
                times.clear()
    ratios = {
        name: [a / b for a, b in zip(seconds["independent"], seconds[name], strict=True)]
        for name in ("scorer", "kept", "extended")
    }
    return {
        "settings": {
            "data": log.name, "domain": domain.name, "base": options.base, "candidates": len(candidates),
            "history_events": len(history), "history_tokens": len(prompts[0]) - len(fresh_probe(fresh, candidates[0])),
            "independent_tokens": sum(map(len, prompts)), "batch": options.batch, "rounds": options.rounds,
        },
        "seconds": {name: spread(times) for name, times in seconds.items()},
        "ratio": {name: spread(values) for name, values in ratios.items()},
        "largest_difference": worst,
        "memory_mb": memory(fresh, history, candidates),
        "rounds": seconds,
    }  # fmt: skip


def event_of(log: BehaviorLog, domain: Domain, row: int) -> dict:
    """A row of the log as an event: its item, and the columns of its own that the template names."""
    columns = [name for name in domain.event_columns if name not in log.items.column_names]
    item = log.items.column("item_id")[int(log.item_codes[row])].as_py()
    return {"item_id": item, **{name: log.interactions.column(name)[row].as_py() for name in columns}}


def pick(log: BehaviorLog, domain: Domain, scorer: Scorer, options: argparse.Namespace) -> tuple[list, list]:
    """The first user whose newest events fill the tokens wanted, and candidates from the whole table."""
    classes, rng = domain.classes(log), np.random.default_rng(options.seed)
    encoder = scorer.encoder
    for user in range(log.num_users):
        rows = range(int(log.user_offsets[user]), int(log.user_offsets[user + 1]))
        rows = [row for row in rows if classes[row] >= 0][-encoder.domain.window :]
        history: list = []
        for row in rows:
            history.append((event_of(log, domain, row), domain.labels[classes[row]]))
            prefix = encoder.encode_history(history)
            if len(prefix.header) + sum(map(len, prefix.events)) >= options.tokens:
                items = rng.choice(log.num_items, options.candidates, replace=False)
                extra = {key: value for key, value in event_of(log, domain, row).items() if key != "item_id"}
                ids = log.items.column("item_id").take(items).to_pylist()
                return history, [{"item_id": item, **extra} for item in ids]
    stop("no user of this log has a history of so many tokens; lower --tokens")


def fresh_probe(scorer: Scorer, candidate: dict) -> np.ndarray:
    return scorer.encoder.encode_events([candidate], "candidates")[0]


def independent_prompts(scorer: Scorer, history: list, candidates: list) -> list[np.ndarray]:
    prefix = scorer.encoder.encode_history(history)
    tokens = scorer.encoder.encode_events(candidates, "candidates")
    return [np.concatenate([*prefix.pieces(), candidate]) for candidate in tokens]


def run(loaded, prompts: list[np.ndarray], batch: int) -> np.ndarray:
    found = []
    for start in range(0, len(prompts), batch):
        part = prompts[start : start + batch]
        length = max(map(len, part))
        ids = torch.full((len(part), length), loaded.tokenizer.pad_token_id)
        for row, prompt in enumerate(part):
            ids[row, : len(prompt)] = torch.from_numpy(prompt)
        markers = torch.tensor([row * length + len(prompt) - 1 for row, prompt in enumerate(part)])
        with torch.inference_mode():
            found.append(loaded.classifier(ids, markers=markers).numpy())
    return np.concatenate(found)


def memory(scorer: Scorer, history: list, candidates: list) -> dict[str, float]:
    """Peak above rest while 50 and while many candidates are scored, MB."""
    peaks = {}
    for times in (1, 10):
        many = [dict(one, title=f"{n} {one['item_id']}") for n in range(times) for one in candidates]
        release_memory()
        before = memory_mib("VmRSS")
        reset_peak()
        scorer.score(history, many)
        peaks[str(len(many))] = ((memory_mib() or 0) - (before or 0)) * 2**20 / 1e6
    return peaks


def show(result: dict) -> None:
    settings = result["settings"]
    print(f"{settings['candidates']} candidates after {settings['history_events']} events, "
          f"{settings['history_tokens']} tokens; {machine()['cpu']}")  # fmt: skip
    print(f"independent prompts: {result['seconds']['independent']['median']:.1f} s")
    for name, ratio in result["ratio"].items():
        median = result["seconds"][name]["median"]
        print(f"{name:<9} {median:6.2f} s: {ratio['median']:.1f} times ({ratio['min']:.1f} to {ratio['max']:.1f})")
    print(f"largest difference of a probability: {result['largest_difference']:.1e}")
    for count, peak in result["memory_mb"].items():
        print(f"memory above rest for {count} candidates: {peak:.0f} MB")


if __name__ == "__main__":
    main()
