"""Writes docs/results.md, and the tables of two other pages, from the files in benchmarks/results.

    python benchmarks/results_page.py

Every figure on the page stands in a file, and every file says how it was made. A test compares the page with what this
would write.
"""

import json
import statistics
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "results.md"
README = ROOT / "README.md"
DISTILLING = ROOT / "docs" / "distilling.md"
IMAGES = "../benchmarks/results/"  # from the page
MARKS = ("<!-- results: python benchmarks/results_page.py -->\n", "<!-- end of results -->\n")

SYSTEMS = {
    "popularity": "popularity",
    "co_occurrence": "item co-occurrence",
    "matrix_factorisation": "matrix factorisation",
    "item_rate": "item rate",
    "user_rate": "user rate",
    "both_rates": "logistic regression on both rates",
    "lightgbm": "LightGBM on counts",
    "text": "frozen text embedding, logistic regression",
    "taken_before": "how often the user took the item before, logistic regression",
    "ids": "stream of item ids, from scratch",
    "ids_distilled": "stream of item ids, distilled",
    "llm": "LLM, LoRA",
    "fused": "LLM fused with collaborative scores",
}
"""Systems of the protocol in the order of its tables, with their names."""

PEERS = {
    "streams": "streams",
    "plain": "Trainer with PEFT's sequence classification",
    "instruction": "instruction tuning on the answer's word (TALLRec's way)",
    "swift": "ms-swift, seq_cls",
}
"""Systems of compare_peers.py, with their names."""

STUDENTS = {
    "teacher": "teacher (LoRA on SmolLM2-135M)",
    "ids": "ids: content and answers",
    "ids_int8": "ids, int8 ONNX",
    "ids_content": "ids: content alone",
    "ids_answers": "ids: answers alone",
    "ids_alone": "ids, without the teacher",
    "shallow": "shallow, 10 of 30 layers",
    "shallow_alone": "shallow, without the teacher's answers",
}
"""Systems of the students' table, with their names; others are left out of it."""


def cell(found: dict, digits: int = 3, sign: str = "") -> str:
    """A value with its interval."""
    form = f"{{:{sign}.{digits}f}}"
    if found["low"] is None:
        return form.format(found["value"])
    return f"{form.format(found['value'])} [{form.format(found['low'])}, {form.format(found['high'])}]"


def spread(found: dict, digits: int = 3) -> str:
    """A median with the least and the greatest."""
    return f"{found['median']:.{digits}f} ({found['min']:.{digits}f} to {found['max']:.{digits}f})"


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def ordered(systems: dict) -> list[str]:
    return [name for name in SYSTEMS if name in systems]


OLDER = {
    "protocol_retail": (
        "2026-11-28",
        "Measured under the former rule of sampled negatives, by which a negative of the test could be an item that "
        "the user had taken before; what the rule changes for systems without an LLM stands under the next heading.",
    ),
}
"""Results that a change of the code left behind: the day of the change, and what the page says until a newer run."""


# -- sections -----------------------------------------------------------------------------------------


def protocol(found: dict) -> str:
    """One log: systems on the targets that all answered, and those that answered everything on all."""
    split, parts = found["split"], []
    budget = found["budgets"].get("llm")
    if budget:
        device = f" ({budget['device']})" if "device" in budget else ""
        parts.append(f"The LLM trained {budget.get('max_steps', budget.get('epochs'))} steps: about "
                     f"{budget['targets']:,} of {split['train']:,} training targets in {budget['seconds'] / 60:.0f} "
                     f"minutes{device}; the others saw all of them.")  # fmt: skip
    for key, what in (("shared", "that every system answered"), ("all", "of the test split")):
        if key not in found:
            continue
        part = found[key]
        positives = f"{part['positives']:,} of them positive"
        parts.append(f"The {part['targets']:,} targets {what}, of {part['users']:,} users, {positives}:")
        parts.append(quality(part))
        slices = by_slice(part)
        if slices:
            parts.append(f"GAUC by slice, on the targets {what}:")
            parts.append(slices)
    if "seeds" in found:
        parts.append("Training again with other seeds, on the targets that every system and seed answered, the median "
                     "with the least and the greatest:")  # fmt: skip
        parts.append(seeds(found["seeds"]))
    return "\n\n".join(parts)


def negatives(found: dict) -> str:
    """Counts and quality under the former rule of sampled negatives and under the present one."""
    rules = {name: found["rules"][key] for name, key in (("former", "former"), ("present", "past"))}
    counts = [[split, rule, f"{part['negatives']:,}",
               *(f"{part[key]:.2%}" for key in ("taken before", "taken then", "taken later"))]
              for split in ("train", "valid", "test") for rule, one in rules.items()
              for part in [one["splits"][split]]]  # fmt: skip
    former, present = (one["test"] for one in rules.values())
    rows = [[SYSTEMS[name], *(cell(one["systems"][name]["metrics"][key]) for key in ("auc", "gauc", "logloss")
                              for one in (former, present)),
             *(cell(one["slices"]["items new to the user"]["systems"][name]["auc"]) for one in (former, present))]
            for name in ordered(present["systems"])]  # fmt: skip
    new = present["slices"]["items new to the user"]["targets"]
    again = rules["present"]["positives taken before"]
    return (
        "Formerly no negative was an item that the user took in the same split, which let negatives of valid and test "
        "be items taken in an earlier one, and let those of training tell of the future. Now none is an item that the "
        "user has in the log at that moment or before, in any split. Shares of the negatives whose item the user took "
        "before the positive, at its moment, and later, by any row of the log:\n\n"
        + table(["split", "rule", "negatives", "taken before", "taken then", "taken later"], counts)
        + f"\n\nThe test split under both rules, {present['targets']:,} targets in each, by the systems that need no "
        "LLM; the former rule is the code of commit a100933:\n\n"
        + table(
            [
                "system",
                *(name for key in ("AUC", "GAUC", "logloss", "AUC on new items") for name in (f"{key}, former", key)),
            ],
            rows,
        )
        + f"\n\n{again:.1%} of the test's positives are items that the user took before, and by the present rule no "
        "negative is. So a repeat purchase is always a positive, and what sees it gains most: a part of the present "
        "AUC says no more than that. The last two columns leave it out: they are of items that the user had not "
        f"taken, {new:,} targets by the present rule. Figures of the two rules are not to be compared as progress."
    )


def seeds(found: dict) -> str:
    metrics = ("auc", "gauc", "logloss", "ne", "ece")
    rows = []
    for name in ordered(found):
        values = found[name]["metrics"]
        spreads = ({"median": statistics.median(v), "min": min(v), "max": max(v)} for v in map(values.get, metrics))
        rows.append([SYSTEMS[name], ", ".join(map(str, found[name]["seeds"])), *(spread(one) for one in spreads)])
    return table(["system", "seeds", "AUC", "GAUC", "logloss", "NE", "ECE"], rows)


def quality(part: dict) -> str:
    rows = []
    for name in ordered(part["systems"]):
        metrics, gap = part["systems"][name]["metrics"], part["systems"][name].get("minus_llm")
        rows.append([SYSTEMS[name], *(cell(metrics[key]) for key in ("auc", "gauc", "logloss")),
                     f"{metrics['ne']['value']:.3f}", f"{metrics['ece']['value']:.3f}",
                     *([cell(gap["auc"], sign="+") if gap else ""] if "llm" in part["systems"] else [])])  # fmt: skip
    head = ["system", "AUC", "GAUC", "logloss", "NE", "ECE"]
    return table(head + (["AUC - LLM"] if "llm" in part["systems"] else []), rows)


def by_slice(part: dict) -> str:
    chosen = [
        name for name in ("both_rates", "lightgbm", "ids", "ids_distilled", "llm", "fused") if name in part["systems"]
    ]
    rows = []
    for title, slice_ in part["slices"].items():
        if all(slice_["systems"][name]["gauc"]["value"] is not None for name in chosen):
            rows.append(
                [title, f"{slice_['targets']:,}", *(f"{slice_['systems'][n]['gauc']['value']:.3f}" for n in chosen)]
            )
    return table(["slice", "targets", *(SYSTEMS[name] for name in chosen)], rows) if rows else ""


def few_shot(found: dict) -> str:
    settings, test, metrics = found["settings"], found["test"], ("auc", "gauc", "logloss")
    rows = [
        [targets if targets != "0" else "0 (untrained)", PEERS[name], str(len(found["runs"][name][targets])),
         *(spread(sizes[targets][metric]) for metric in metrics), f"{sizes[targets]['seconds']['median']:.0f}"]
        for targets in found["summary"][settings["systems"][0]] for name, sizes in found["summary"].items()
    ]  # fmt: skip
    rows.append(["", "the user's newest outcomes alone, up to ten, with five more at the log's rate", "",
                 *(cell(found["newest_rate"][metric]) for metric in metrics), ""])  # fmt: skip
    text = (
        f"LoRA on {settings['base']}, trained on the same targets, each after at most {settings['history']} events, in "
        f"whole passes until {settings['seen']} or more are seen, {settings['batch_size'] * settings['window']} a step "
        f"(streams: windows of {settings['window']}); {test['targets']:,} test targets of {test['users']} users. "
        "Median and range over the seeds (the last row: a bootstrap interval); seconds are those of training.\n\n"
    ) + table(["labelled targets", "system", "seeds", "AUC", "GAUC", "logloss", "seconds"], rows)
    rows = [
        [targets, str(run["seed"]), *(cell(run["metrics"][metric], sign="+") for metric in ("auc", "gauc"))]
        for targets, runs in found["streams_minus_instruction"]["runs"].items() for run in runs
    ]  # fmt: skip
    if rows:
        text += (
            "\n\nOne learning rate for both, untuned. A step of streams has targets of one or a few users, one of "
            "prompts of more. Streams minus instruction tuning, the same targets and seed:\n\n"
        ) + table(["labelled targets", "seed", "AUC", "GAUC"], rows)
    return text


def _seconds(found: dict) -> str:
    """Seconds of training, from the least to the greatest of the systems."""
    values = [entry["seconds"] for entry in found["systems"].values()]
    return f"{min(values):.0f} to {max(values):.0f}"


def _gap(entry: dict) -> str:
    """AUC of streams minus that of another system, both at their ends."""
    gap = entry["streams_minus_this_at_the_end"]["auc"]
    return _with_ends(gap["value"], gap["interval"], sign="+")


def _with_ends(value: float, ends: list[float] | None, sign: str = "") -> str:
    """A value with its interval, if there is one."""
    low, high = ends or (None, None)
    return cell({"value": value, "low": low, "high": high}, sign=sign)


def step_profile(found: dict) -> str:
    kinds, masked = found["profile"], found.get("one_mask")
    faster = (
        f" It is {spread(masked['ratio'], 2)} times as fast as under one mask ({spread(masked['seconds'], 2)} s)."
        if masked
        else ""
    )
    return (
        f"A micro-batch of {found['tokens']:,} tokens ({found['targets']} targets) takes "
        f"{spread(found['seconds'], 2)} s: products with weights {kinds['products']:.0%}, attention "
        f"{kinds['attention']:.0%}, the rest {kinds['rest']:.0%}. It reaches {spread(found['matmul_share'], 2)} of the "
        f"torch.mm rate, attention counted as no work, and {spread(found['matmul_share_with_attention'], 2)} with its "
        f"own products counted. Were these as fast as torch.mm and all else free, the first would be "
        f"{found['ceiling']:.2f}. The last layer counts whole in all of these, though most of it is left out.{faster}"
    )


def score_speed(found: dict) -> str:
    names = {"scorer": "a new history", "extended": "a history grown by one event", "kept": "a known history"}
    rows = [[names[key], spread(found["seconds"][key], 2), spread(value, 1)] for key, value in found["ratio"].items()]
    settings = found["settings"]
    return (
        f"{settings['candidates']} candidates after {settings['history_tokens']} tokens, beside a padded batch of "
        f"independent prompts ({spread(found['seconds']['independent'], 1)} s):\n\n"
    ) + table(["", "seconds", "times as fast"], rows)


def train_speed(found: dict) -> str:
    rows = []
    for name, key, digits in (("targets/s", "targets_per_s", 2), ("tokens a target", "tokens_per_target", 0),
                              ("tokens/s", "tokens_per_s", 0), ("share of the torch.mm rate", "matmul_share", 2),
                              ("peak memory, MiB", "peak_rss_mib", 0)):  # fmt: skip
        rows.append([name, *(spread(found["summary"][side][key], digits) for side in ("stream", "plain"))])
    ratio = spread(found["summary"]["ratio"], 1)
    return (
        f"Streams beside a plain Trainer with PEFT, on the same targets: {ratio} times as many targets/s.\n\n"
        + table(["", "streams", "plain"], rows)
    )


def cost_curves(found: dict) -> str:
    """A table and an image a curve."""
    settings = found["settings"]
    parts = [
        f"A window has {settings['window'][0]} history events and {settings['window'][1]} to answer, LoRA rank "
        f"{settings['default_rank']} and {settings['base']} all of its layers, where a table does not say otherwise. "
        "Shares are of what the tokens' products with weights alone would allow at the torch.mm rate of the same "
        "round; with attention, its own products count too. Both count the last layer whole, though most of it runs at "
        "the answers alone, so that the shares of few layers are too high. The rate is timed once a curve and round, "
        "and swings: small differences between shares say nothing. Memory is the peak of the whole process."
    ]  # fmt: skip
    for name, curve in found["curves"].items():
        rows = [
            [str(point["x"]), spread(point["per_s"], 2), spread(point["share"], 2),
             spread(point["share_with_attention"], 2),
             spread(point["peak_mib"], 0) if point["peak_mib"] else "not known"]
            for point in curve["points"]
        ]  # fmt: skip
        head = [curve["along"], f"{curve['unit']}/s", "share of what products allow", "with attention", "peak MiB"]
        parts += [table(head, rows), f"![{curve['along']}]({IMAGES}cost_{name}.png)"]
    return "\n\n".join(parts)


def bank(found: dict) -> str:
    return (
        f"A bank of two bundles on mixed requests reaches {spread(found['throughput_of_merged'], 2)} of one merged "
        f"model's throughput; a swap takes {found['swaps_ms']['in_memory']['median']:.2f} ms in memory and "
        f"{found['swaps_ms']['on_disk']['median']:.0f} ms from disk."
    )


def students(found: dict) -> str:
    rows = []
    for name, title in STUDENTS.items():
        if name in found["systems"]:
            system = found["systems"][name]
            rate, wait = system.get("targets_per_second"), system.get("latency_ms")
            rows.append([title, cell(system["quality"]["auc"]), cell(system["quality"]["gauc"]),
                         f"{system['bytes'] / 1e6:.1f}", f"{rate['median']:,.0f}" if rate else "",
                         *([f"{wait['p50']:,.1f}", f"{wait['p99']:,.1f}"] if wait else ["", ""])])  # fmt: skip
    return f"{found['targets']:,} test targets of {found['users']} users:\n\n" + table(
        ["system", "AUC", "GAUC", "MB", "targets/s", "P50 ms", "P99 ms"], rows
    )


def peers(found: dict) -> str:
    at, names, rows = found["compared_at"], PEERS, []
    for name, entry in found["systems"].items():
        end, reached = entry["curve"][-1], entry["seconds_to_auc"]
        rows.append([
            names[name], f"{entry['targets_per_s']:.2f}", f"{entry['tokens_per_target']:.0f}",
            f"{entry['peak_rss_mib']:,.0f}" if entry["peak_rss_mib"] else "not known", f"{entry['targets']:,}",
            "not asked" if entry["curve"][0]["steps"] else f"{entry['curve'][0]['auc']:.3f}",
            _with_ends(end["auc"], end["auc_interval"]),
            *("not known" if entry[key] is None else f"{entry[key]:.3f}"
              for key in ("auc_at_equal_seconds", "auc_at_equal_targets")),
            "not reached" if reached is None else f"{reached:.0f}",
        ])  # fmt: skip
    gaps = []
    for name, entry in found["systems"].items():
        if "streams_minus_this_at_the_end" in entry:
            gaps.append(f"{names[name]} {_gap(entry)}")
    head = ["system", "targets/s", "tokens a target", "peak MiB", "targets trained on", "AUC at the start",
            "AUC at the end", f"AUC at {at['seconds']:.0f} s", f"AUC at {at['targets']} targets",
            f"s to AUC {at['auc']:.2f}"]  # fmt: skip
    validation, settings = found["validation"], found["settings"]
    text = (
        f"Each trained LoRA of one rank on one base for {_seconds(found)} s on the targets of the "
        f"same windows, and answered {validation['targets']} validation targets of {validation['users']} users. "
        "Seconds are those of training alone; each starts as by default, streams from the label words' rows. Peers "
        f"compute {settings['peer_batch'] // settings['peer_accumulation']} prompts at once, streams "
        f"{settings['micro_tokens']:,} tokens, which their memory shows; the peers' batch was not tuned (plain is "
        "faster with one prompt at a time, see training speed). AUC between two points of a curve is taken to run "
        "straight. One seed; plain and swift compute the same, and end at the same answers.\n\n"
    ) + table(head, rows)
    if gaps:
        text += f"\n\nAUC of streams at the end minus that of: {'; '.join(gaps)}."
    return f"{text}\n\n![Validation AUC against seconds of training]({IMAGES}peers.png)"


def run_all(found: dict) -> str:
    steps = ", ".join(f"{name} {seconds:.0f}" for name, seconds in found["seconds"].items())
    failed = f" Failed: {', '.join(found['failed'])}." if found["failed"] else ""
    return f"All quick forms, on what `make bench` takes: {found['minutes']:.1f} minutes. Seconds: {steps}.{failed}"


def serve_size(found: dict) -> str:
    sizes = ", ".join(f"`[{extra}]` {part['mb']:.0f} MB" for extra, part in found["extras"].items())
    return f"Installed in an environment of its own: {sizes} (limit for `[serve]`: {found['limit_mb']} MB)."


SECTIONS: tuple[tuple[str, str, Callable[[dict], str]], ...] = (
    ("protocol_*.json", "Quality", protocol),
    ("negatives.json", "The rule of sampled negatives", negatives),
    ("few_shot.json", "Few labelled targets", few_shot),
    ("train_speed.json", "Training speed", train_speed),
    ("step_profile.json", "Where a training step's time goes", step_profile),
    ("step_profile_*.json", "The same of a window with probes", step_profile),
    ("peers.json", "Beside what a user would pick instead", peers),
    ("score_speed.json", "Scoring many candidates", score_speed),
    ("cost_curves.json", "What a target costs", cost_curves),
    ("bank.json", "Many domains on one base", bank),
    ("run_all.json", "How long the quick forms take", run_all),
    ("serve_size.json", "What serving installs", serve_size),
)

OPENING = """# Results

Written by `python benchmarks/results_page.py` from the files in `benchmarks/results`; every figure is in one of them.
Brackets are 95 % bootstrap intervals over users, parentheses the least and the greatest of several rounds or seeds.
Differences are paired on the same users. All of it ran on CPU, in float32 unless said; **nothing here was ever measured
on a GPU**. Ranking of candidates and distilled students have pages of their own: [recommending](recommending.md),
[distilling](distilling.md).
"""

CLAIMS = """
Where this toolkit is better: training and scoring streams takes a fraction of the time of prompts at equal answers
(memory is alike where micro-batches are); a fusion of the LLM with collaborative scores beats the LLM, and is ahead of
everything else on retail; its students of item ids answer thousands of times as fast at the same AUC. Where it is no
better: after six minutes of training beside its peers, its AUC on a hundred targets cannot be told from theirs. Where
it is worse: with 16 labels streams end below instruction tuning in AUC, and below the untrained head, in two of three
seeds; after the few steps that two cores can afford, the LLM alone stays behind gradient boosting on counts on every
log here, behind a regression on both rates on coupons, and near chance on retail's sampled negatives; a few labels of
movies do not take it past a user's newest outcomes in AUC and logloss. A training step of a log with both outcomes
reaches half of the machine's matrix-product rate, as a plain Trainer's does; 80 % was the aim. Not measured: any GPU, a
base above 135 M parameters, long training, more than one seed of the LLM (movies: two, few labels: three). The curve of
candidates below is older than attention in blocks; scoring speed is not. What is said of retail's quality was measured
under the former rule of sampled negatives.
"""


QUICK = """
These are quick forms: few steps, few targets, one round. They show that everything runs, and what it takes; there is
nothing to conclude from their quality.
"""


def provenance(results: Path) -> str:
    rows = []
    for path in sorted(results.glob("*.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        machine, versions = found["machine"], found["versions"]
        rows.append([
            f"`{path.name}`", f"`{found['command']}`", found["date"][:10],
            ", ".join(map(str, found.get("settings", {}).get("seeds", [found["seed"]]))),
            f"{machine['cpu']} {machine['instructions']}, {machine['threads']} of {machine['cores']} threads",
            ", ".join(f"{name} {versions[name].partition('+')[0]}" for name in ("torch", "transformers", "peft")),
            f"{found['minutes']:.0f}" if "minutes" in found else "",
        ])  # fmt: skip
    return table(["file", "command", "date", "seed", "machine", "versions", "minutes"], rows)


def page(results: Path = RESULTS) -> str:
    """The text of docs/results.md, or the same of another directory of results, for a page beside it."""
    parts = [OPENING + (CLAIMS if results == RESULTS else QUICK)]
    for pattern, title, write in SECTIONS:
        for path in sorted(results.glob(pattern)):
            found = json.loads(path.read_text(encoding="utf-8"))
            named = f"{title}: {path.stem.removeprefix(pattern.partition('*')[0])}" if "*" in pattern else title
            changed, note = OLDER.get(path.stem, ("", ""))
            note = f"{note}\n\n" if found["date"] < changed else ""
            parts.append(f"## {named}\n\n`{found['command']}`\n\n{note}{write(found)}\n")
    parts.append(f"## How each file was made\n\n{provenance(results)}\n")
    text = "\n".join(parts)
    return text if results == RESULTS else text.replace(IMAGES, f"{results.name}/")


def readme_table() -> str:
    """The README's tables: MovieLens, on the targets that every system answered, and what speed costs and gives."""
    found = _read("protocol_movies")
    part = found["shared"] if "shared" in found else found["all"]
    return f"{part['targets']:,} test targets of {part['users']} users:\n\n{quality(part)}\n\n{timings()}\n"


def timings() -> str:
    """What is measured beside something else, one line each."""
    train, score, many, small = (_read(name) for name in ("train_speed", "score_speed", "bank", "students"))
    peers = _read("peers")
    stream, plain = train["summary"]["stream"], train["summary"]["plain"]
    settings, ids, int8 = score["settings"], small["systems"]["ids"], small["systems"]["ids_int8"]
    teacher = small["systems"]["teacher"]
    rate = ids["targets_per_second"]["median"] / teacher["targets_per_second"]["median"]
    gap = small["ids_on_all"]["all"]["systems"]["ids"]["minus_ids_alone"]["gauc"]
    rows = [
        ["training, targets/s beside a plain Trainer with PEFT, answers equal",
         f"{stream['targets_per_s']['median']:.1f} and {plain['targets_per_s']['median']:.2f}: "
         f"{spread(train['summary']['ratio'], 1)} times", "train_speed"],
        ["tokens a target, streams and plain",
         f"{stream['tokens_per_target']['median']:.0f} and {plain['tokens_per_target']['median']:.0f}", "train_speed"],
        *([f"{peers['settings']['seconds']:.0f} s of training beside {PEERS[name]}: targets/s; AUC less its",
           f"{peers['systems']['streams']['targets_per_s']:.1f} and {peers['systems'][name]['targets_per_s']:.2f}; "
           f"{_gap(peers['systems'][name])}", "peers"] for name in ("instruction", "swift")),
        *([f"{settings['candidates']} candidates after {settings['history_tokens']} tokens, {what}, beside a padded "
           "batch of prompts", f"{spread(score['ratio'][key], 1)} times as fast", "score_speed"]
          for key, what in (("scorer", "a new history"), ("kept", "a known one"))),
        [f"a bank of two domains on {many['settings']['requests']} mixed requests, throughput of one merged model's",
         spread(many["throughput_of_merged"], 2), "bank"],
        [f"a swap in memory; from disk; memory a domain of {many['many']['domains']}",
         f"{many['swaps_ms']['in_memory']['median']:.2f} ms; {many['swaps_ms']['on_disk']['median']:.0f} ms; "
         f"{many['many']['mb_per_domain']:.0f} MB", "bank"],
        ["a student of item ids beside its teacher, one core",
         f"{ids['targets_per_second']['median']:,.0f} targets/s, {rate:,.0f} times; AUC "
         f"{ids['quality']['auc']['value']:.3f} and {teacher['quality']['auc']['value']:.3f}", "students"],
        ["the same as int8 ONNX, 50 candidates", f"{int8['latency_ms']['p99']:.1f} ms at P99", "students"],
        ["the same beside a student without a teacher, GAUC", cell(gap, sign="+"), "students"],
    ]  # fmt: skip
    trained = {name: entry["targets"] for name, entry in peers["systems"].items()}
    most, least = (
        trained["streams"] / pick(trained[name] for name in trained if name != "streams") for pick in (min, max)
    )
    said = (
        f"In those {_seconds(peers)} s streams saw {least:.0f} to {most:.0f} times as many targets as the "
        f"peers, whose batch of {peers['settings']['peer_batch']} prompts was not tuned; on "
        f"{peers['validation']['targets']} validation targets no AUC can be told from another's: that run shows "
        "speed, not quality."
    )
    found = table(["what", "figure", "file"], [[what, figure, f"`{name}.json`"] for what, figure, name in rows])
    return f"{found}\n\n{said}"


def _read(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def students_table() -> str:
    """The table of docs/distilling.md."""
    return students(_read("students")) + "\n"


TABLES: dict[Path, Callable[[], str]] = {README: readme_table, DISTILLING: students_table}
"""Pages with a table between marks, and what writes it."""


def with_table(path: Path) -> str:
    """A page's text with the present table between its marks."""
    before, _, rest = path.read_text(encoding="utf-8").partition(MARKS[0])
    _, _, after = rest.partition(MARKS[1])
    return before + MARKS[0] + TABLES[path]() + MARKS[1] + after


def main() -> None:
    """Write them all."""
    PAGE.write_text(page(), encoding="utf-8")
    for path in TABLES:
        path.write_text(with_table(path), encoding="utf-8")
    print(f"written: {', '.join(str(path.relative_to(ROOT)) for path in (PAGE, *TABLES))}")


if __name__ == "__main__":
    main()
