"""Speed of scoring, and what serving takes on the disk.

    python -m benchmarks.score_speed history --data DIR --domain recipes/configs/movies/domain.yaml [--rounds 3]
    python -m benchmarks.score_speed bank [--data DIR --domain FILE] [--rounds 7] [--domains 200]
    python -m benchmarks.score_speed install [--extras serve serve-text]

history: many candidates of one user's real history, by a LoRA bundle (rank 16, all linear layers), in turns with
each candidate as a prompt of its own in padded batches of --batch rows, as a user of Transformers would score them.
`scorer` encodes the history anew, `cached` has it in the prefix cache, `extended` has it less its newest event.

bank: two bundles on one base, mixed requests with histories of 20 items, in turns: one merged model scores all of them
in batches of the same rows; the bank scores each by its domain's bundle. Also the time of swaps, and the memory of
many domains.

install: disk blocks of site-packages, bytecode included, after `pip install llmrec-peft[EXTRA]` in a new environment,
without pip and setuptools. MB are 10^6 bytes.
"""

import argparse
import functools
import shutil
import subprocess
import time
import venv
from pathlib import Path

import numpy as np
import torch

from benchmarks import measuring
from benchmarks.measuring import ROOT, Benchmark, in_turns, memory_mib, ratios, read_log, run, spread, stop
from benchmarks.training import RANK, make_bundle
from llmrec_peft import BehaviorLog, Domain, DomainBank, Scorer
from llmrec_peft.checkpoints.loading import load_trained
from llmrec_peft.data.batches import plan_micro_batches
from llmrec_peft.data.collator import collate
from llmrec_peft.evaluation.calibration import Calibration
from llmrec_peft.requests.batching import CandidateGroup
from llmrec_peft.requests.request import Request
from llmrec_peft.requests.request_encoder import RequestEncoder
from llmrec_peft.runs.logged_events import LoggedEvents

# -- requests --------------------------------------------------------------------------------------


def items_at(log: BehaviorLog, logged: LoggedEvents, user: int, items: np.ndarray) -> list:
    """Items (codes [n]) as events, with the other columns of the template from the user's newest row."""
    return logged.events(items, logged.moments(log.user_offsets[[user + 1]] - 1) * len(items))


def pick_request(log: BehaviorLog, scorer: Scorer, least: int, candidates: int, seed: int) -> tuple[list, list]:
    """The first user whose newest events fill `least` tokens, and candidates from the whole item table."""
    rng, logged = np.random.default_rng(seed), LoggedEvents(log, scorer.domain)
    for user in range(log.num_users):
        history = logged.history(user)
        prefix = scorer.encoder.encode_history(history)
        sizes = len(prefix.header) + np.cumsum([len(event) for event in prefix.events])
        if len(sizes) and sizes[-1] >= least:
            history = history[len(history) - len(sizes) :][: int(np.searchsorted(sizes, least)) + 1]
            return history, items_at(log, logged, user, rng.choice(log.num_items, candidates, replace=False))
    stop("no user of this log has a history of so many tokens; lower --tokens")


def predict_batches(classifier, batches: list[dict]) -> np.ndarray:
    """Logits [markers, labels] of batches."""
    names = ("input_ids", "position_ids", "markers", "attention_mask", "segment")
    with torch.inference_mode():
        return np.concatenate([classifier(**{name: batch[name] for name in names}).numpy() for batch in batches])


# -- history ---------------------------------------------------------------------------------------


def history(options: argparse.Namespace, scratch: Path) -> dict:
    """Many candidates of one history, beside a padded batch of independent prompts."""
    log, domain = read_log(options), Domain.from_yaml(options.domain)
    directory = Path(options.bundle or make_bundle(scratch / "bundle", options.base, domain, seed=options.seed, r=RANK))
    loaded = load_trained(directory)
    fresh, cached = Scorer.load(directory, log, cache_bytes=0), Scorer.load(directory, log)
    past, candidates = pick_request(log, fresh, options.tokens, options.candidates, options.seed)
    encoded = fresh.encoder.encode(Request(past, candidates))
    group, pad = CandidateGroup(None, encoded.prefix.pieces(), encoded.candidates), loaded.tokenizer.pad_token_id
    prompts = [group.stream(number, number + 1) for number in range(len(candidates))]
    batches = [collate(prompts[first : first + options.batch], pad) for first in range(0, len(prompts), options.batch)]
    found: dict[str, np.ndarray] = {}

    def grow() -> None:
        found["grown"] = Scorer.load(directory, log)
        found["grown"].score(past[:-1], candidates[:1])

    ways = {
        "independent": lambda: found.update(independent=predict_batches(loaded.classifier, batches)),
        "scorer": lambda: found.update(scorer=fresh.score(past, candidates)),
        "extended": lambda: found.update(extended=found["grown"].score(past, candidates)),
        "cached": lambda: found.update(cached=cached.score(past, candidates)),
    }
    seconds = in_turns(ways, options.rounds, grow)
    wanted = Calibration.from_dict(loaded.calibration).apply(found["independent"])
    return {
        "settings": {
            "data": log.name, "domain": domain.name, "candidates": len(candidates), "history_events": len(past),
            "history_tokens": len(group.prefix_ids), "independent_tokens": sum(map(len, prompts)),
            "batch": options.batch,
        },
        "seconds": {name: spread(times) for name, times in seconds.items()},
        "ratio": {name: ratios(seconds, "independent", name) for name in ("scorer", "cached", "extended")},
        "largest_difference": max(float(np.abs(found[name] - wanted).max()) for name in ways if name != "independent"),
        "rounds": seconds,
    }  # fmt: skip


# -- bank ------------------------------------------------------------------------------------------


def draw_requests(log: BehaviorLog, domain: Domain, options: argparse.Namespace) -> list[tuple]:
    """Requests (domain, history, candidates, user) of the domains `one` and `two` in turn."""
    rng, logged = np.random.default_rng(options.seed), LoggedEvents(log, domain)
    user = {name: logged.first(0, name) for name in domain.header_columns}

    def events(count: int) -> list:
        return items_at(log, logged, 0, rng.integers(log.num_items, size=count))

    def labels(count: int) -> list[str]:
        return [domain.labels[number] for number in rng.integers(len(domain.labels), size=count)]

    return [(("one", "two")[number % 2], list(zip(events(20), labels(20), strict=True)), events(options.candidates),
             user) for number in range(options.requests)]  # fmt: skip


def request_batches(encoder: RequestEncoder, requests: list[tuple], batch_tokens: int) -> list[dict]:
    """The rows of requests in batches: a shared prefix, and a segment for each candidate."""
    streams = []
    for _, past, candidates, user in requests:
        encoded = encoder.encode(Request(past, candidates, user))
        group = CandidateGroup(None, encoded.prefix.pieces(), encoded.candidates)
        streams.append(group.stream(0, len(candidates)))
    groups = plan_micro_batches(np.array([len(stream) for stream in streams]), batch_tokens)
    return [collate([streams[row] for row in group], 0) for group in groups]


def bank(options: argparse.Namespace, scratch: Path) -> dict:
    """A bank of domains on one base: throughput, swaps and memory."""
    log, domain = read_log(options), Domain.from_yaml(options.domain)
    bundles = [make_bundle(scratch / f"bundle-{n}", options.base, domain, seed=n, r=RANK) for n in range(2)]
    names = dict(zip(("one", "two"), bundles, strict=True))
    served = DomainBank.load(options.base, names, dict.fromkeys(names, log))
    requests = draw_requests(log, domain, options)
    batches = request_batches(served.scorer("one").encoder, requests, options.batch_tokens)
    merged = load_trained(bundles[0]).classifier
    merged.model = merged.model.merge_and_unload()
    merged.eval()
    ways = {
        "merged": lambda: predict_batches(merged, batches),
        "bank": lambda: served.score(requests, batch_tokens=options.batch_tokens),
    }
    seconds = in_turns(ways, options.rounds)
    size = sum(int(batch["input_ids"].numel()) for batch in batches)
    return {
        "settings": {"data": log.name, "domain": domain.name, "tokens": size},
        "seconds": {name: spread(values) for name, values in seconds.items()},
        "throughput_of_merged": ratios(seconds, "merged", "bank"),
        "swaps_ms": swaps(served, bundles, scratch, options.rounds),
        "many": many(options, scratch, bundles[0]), "rounds": seconds,
    }  # fmt: skip


def swaps(served: DomainBank, bundles: list[Path], scratch: Path, rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds of a swap to a bundle in memory and to one on the disk."""
    loaded, fresh = [], []
    for number in range(max(rounds, 10)):
        copy = scratch / f"swap-{number}"
        shutil.copytree(bundles[number % 2], copy)
        for place, times in ((copy, fresh), (bundles[0], loaded), (copy, loaded)):
            start = time.perf_counter()
            served.swap("one", place)
            times.append(1e3 * (time.perf_counter() - start))
    served.swap("one", bundles[0])
    return {"in_memory": spread(loaded), "on_disk": spread(fresh)}


def many(options: argparse.Namespace, scratch: Path, bundle: Path) -> dict[str, float]:
    """Memory of a bank of many domains, all of them in memory."""
    places = [scratch / f"many-{number}" for number in range(options.domains)]
    for place in places:  # one copy on the disk is enough: a bank tells bundles apart by their place
        shutil.copytree(bundle, place, copy_function=lambda source, target: Path(target).hardlink_to(source))
    served = DomainBank.load(options.base, {"first": bundle})
    measuring.release_memory()
    before = memory_mib("RssAnon") or 0
    for place in places:
        served.add(place.name, place, None)
    used = ((memory_mib("RssAnon") or 0) - before) * 2**20 / 1e6
    return {"domains": len(places), "mb_per_domain": used / len(places)}


# -- install ---------------------------------------------------------------------------------------

LIMIT_MB = 150
THERE_BEFORE = ("pip", "setuptools", "pkg_resources", "_distutils_hack", "distutils-precedence.pth")
FORBIDDEN = ("torch", "transformers", "pyarrow")


def install(options: argparse.Namespace, scratch: Path) -> dict:
    """What `pip install llmrec-peft[serve]` takes on the disk."""
    extras = {extra: install_extra(extra, scratch / extra) for extra in options.extras}
    if extras.get("serve", {"mb": 0})["mb"] >= LIMIT_MB:
        stop(f"serve takes {extras['serve']['mb']:.1f} MB, and {LIMIT_MB} are its limit")
    return {"limit_mb": LIMIT_MB, "extras": extras}


def install_extra(extra: str, place: Path) -> dict:
    """Megabytes of an extra in an environment of its own, in all and by directory, the largest first."""
    source = place / "source"  # a build leaves its files beside the source
    shutil.copytree(ROOT / "llmrec_peft", source / "llmrec_peft", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    venv.create(place, with_pip=True)
    python = place / "bin" / "python"
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "-c", ROOT / "constraints.txt", f"{source}[{extra}]"], check=True)
    subprocess.run([python, "-c", "import llmrec_peft.serving"], check=True, cwd=place)
    (site,) = place.glob("lib/python*/site-packages")
    sizes = {path.name: disk_bytes(path) / 1e6 for path in site.iterdir()
             if not path.name.startswith(THERE_BEFORE)}  # fmt: skip
    heavy = sorted(set(sizes) & set(FORBIDDEN))
    if heavy:
        stop(f"{extra} installs {', '.join(heavy)}, which serving must not need")
    largest = sorted(sizes, key=sizes.get, reverse=True)
    return {"mb": round(sum(sizes.values()), 1),
            "packages": {name: round(sizes[name], 1) for name in largest if sizes[name] >= 1}}  # fmt: skip


def disk_bytes(path: Path) -> int:
    """Bytes of the disk blocks of a file or of all files under a directory."""
    return sum(file.lstat().st_blocks * 512 for file in ([path] if path.is_file() else path.rglob("*")))


BENCHMARKS = {
    "history": Benchmark(history, "score_speed.json", {
        "bundle": (None, "a trained bundle (default: one with random weights)"),
        "candidates": (50, "candidates"), "tokens": (400, "tokens of the history, at least"),
        "batch": (10, "rows of a batch of independent prompts"), "rounds": (3, "rounds"),
    }),
    "bank": Benchmark(bank, "bank.json", {
        "requests": (6, "requests of a round"), "candidates": (10, "candidates of a request"), "rounds": (7, "rounds"),
        "domains": (200, "domains of the bank whose memory is measured"),
        "batch_tokens": (4000, "tokens of a batch, at most"),
    }),
    "install": Benchmark(install, "serve_size.json", {"extras": (["serve", "serve-text"], "extras to install")}),
}  # fmt: skip


main = functools.partial(run, __file__, __doc__, BENCHMARKS)

if __name__ == "__main__":
    main()
