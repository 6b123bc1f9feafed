"""Writes docs/results.md, and the tables of two other pages, from the files in benchmarks/results.

    python benchmarks/results_page.py

Every figure on the page stands in a file, and every file says how it was made. A test compares the pages with what this
would write.
"""

import json
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "results.md"
README = ROOT / "README.md"
DISTILLING = ROOT / "docs" / "distilling.md"
IMAGES = "../benchmarks/results/"  # from the page
MARKS = ("<!-- results: python benchmarks/results_page.py -->\n", "<!-- end of results -->\n")

# Systems in the order of their tables, with their names; students that are not named are left out of theirs.
SYSTEMS = {
    "popularity": "popularity", "co_occurrence": "item co-occurrence", "matrix_factorisation": "matrix factorisation",
    "item_rate": "item rate", "user_rate": "user rate", "both_rates": "logistic regression on both rates",
    "lightgbm": "LightGBM on counts", "text": "frozen text embedding, logistic regression",
    "taken_before": "how often the user took the item before, logistic regression",
    "ids": "stream of item ids, from scratch", "ids_distilled": "stream of item ids, distilled", "llm": "LLM, LoRA",
    "fused": "LLM fused with collaborative scores",
}  # fmt: skip
PEERS = {
    "streams": "streams", "plain": "Trainer with PEFT's sequence classification",
    "instruction": "instruction tuning on the answer's word (TALLRec's way)", "swift": "ms-swift, seq_cls",
}  # fmt: skip
STUDENTS = {
    "teacher": "teacher (LoRA on SmolLM2-135M)", "ids": "ids: content and answers", "ids_int8": "ids, int8 ONNX",
    "ids_content": "ids: content alone", "ids_answers": "ids: answers alone", "ids_alone": "ids, without the teacher",
    "shallow": "shallow, 10 of 30 layers", "shallow_alone": "shallow, without the teacher's answers",
}  # fmt: skip
OLDER = {
    "protocol_retail": (
        "2026-11-28",
        "Measured under the former rule of sampled negatives, by which a negative of the test could be an item that "
        "the user had taken before; what the rule changes for systems without an LLM stands under the next heading.",
    ),
}
"""Results that a change of the code left behind: the day of the change, and what the page says until a newer run."""


# -- cells and tables ------------------------------------------------------------------------------


def shown(found: Any, digits: int = 3, sign: str = "", none: str = "not known") -> str:
    """A number, a median with the least and the greatest, or a value with its interval."""
    form = f"{{:{sign},.{digits}f}}" if isinstance(found, float | int) else f"{{:{sign}.{digits}f}}"
    if isinstance(found, str | None):
        return none if found is None else found
    if not isinstance(found, Mapping):
        return form.format(found)
    if "median" in found:
        return f"{form.format(found['median'])} ({form.format(found['min'])} to {form.format(found['max'])})"
    ends = "" if found["low"] is None else f" [{form.format(found['low'])}, {form.format(found['high'])}]"
    return form.format(found["value"]) + ends


def at(found: Any, path: str, default: Any = None) -> Any:
    """The entry of nested mappings at a path such as `metrics/auc`, or the default."""
    for key in path.split("/"):
        if not isinstance(found, Mapping) or found.get(key) is None:
            return default
        found = found[key]
    return found


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *rows])


def table_of(first: str, records: Mapping[str, Any], columns: Mapping[str, tuple]) -> str:
    """A table of a record a row; columns: heading to (path, digits, sign, text for nothing), the last two optional."""
    rows = [[title, *(shown(at(record, path), *form) for path, *form in columns.values())]
            for title, record in records.items()]  # fmt: skip
    return table([first, *columns], rows)


def named(records: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Records by their names, in the order of these."""
    return {names[key]: records[key] for key in names if key in records}


# -- sections --------------------------------------------------------------------------------------

METRICS = {"AUC": ("metrics/auc", 3), "GAUC": ("metrics/gauc", 3), "logloss": ("metrics/logloss", 3)}
SEEDED = ("auc", "gauc", "logloss", "ne", "ece")


def quality(part: dict) -> str:
    """Metrics of the protocol's systems, with differences to the LLM where it is among them."""
    columns = METRICS | {"NE": ("metrics/ne/value", 3), "ECE": ("metrics/ece/value", 3)}
    columns |= {"AUC - LLM": ("minus_llm/auc", 3, "+", "")} if "llm" in part["systems"] else {}
    return table_of("system", named(part["systems"], SYSTEMS), columns)


def by_slice(part: dict) -> str:
    """GAUC of some systems by slice, where all have one."""
    few = ("both_rates", "lightgbm", "ids", "ids_distilled", "llm", "fused")
    chosen = [name for name in few if name in part["systems"]]
    paths = [f"systems/{name}/gauc/value" for name in chosen]
    rows = [[title, f"{one['targets']:,}", *(shown(at(one, path)) for path in paths)]
            for title, one in part["slices"].items() if all(at(one, path) is not None for path in paths)]  # fmt: skip
    return table(["slice", "targets", *(SYSTEMS[name] for name in chosen)], rows) if rows else ""


def protocol(found: dict) -> str:
    """One log: systems on the targets that all predicted, and those that predicted everything on all."""
    parts, budget = [], found["budgets"].get("llm")
    if budget and "seconds" in budget:
        device = f" ({budget['device']})" if "device" in budget else ""
        parts.append(f"The LLM trained {budget.get('max_steps', budget.get('epochs'))} steps: about "
                     f"{budget['targets']:,} of {found['split']['train']:,} training targets in "
                     f"{budget['seconds'] / 60:.0f} minutes{device}; the others saw all of them.")  # fmt: skip
    for key, what in (("shared", "that every system answered"), ("all", "of the test split")):
        if key in found:
            part = found[key]
            parts += [f"The {part['targets']:,} targets {what}, of {part['users']:,} users, {part['positives']:,} of "
                      "them positive:", quality(part)]  # fmt: skip
            slices = by_slice(part)
            parts += [f"GAUC by slice, on the targets {what}:", slices] if slices else []
    if "seeds" in found:
        rows = {}
        for name, one in named(found["seeds"], SYSTEMS).items():
            spreads = {key: {"median": statistics.median(v), "min": min(v), "max": max(v)}
                       for key, v in one["metrics"].items()}  # fmt: skip
            rows[name] = spreads | {"seeds": ", ".join(map(str, one["seeds"]))}
        parts += ["Training again with other seeds, on the targets that every system and seed answered, the median "
                  "with the least and the greatest:",
                  table_of("system", rows, {"seeds": ("seeds",), **{
                      name: (name.lower(), 3) for name in ("AUC", "GAUC", "logloss", "NE", "ECE")}})]  # fmt: skip
    return "\n\n".join(parts)


def negatives(found: dict) -> str:
    """Counts and quality under the former rule of sampled negatives and under the present one."""
    if len(found["rules"]) < 2:
        return quality(*(one["test"] for one in found["rules"].values()))
    rules = {name: found["rules"][key] for name, key in (("former", "former"), ("present", "past"))}
    counts = [[split, rule, f"{part['negatives']:,}",
               *(f"{part[key]:.2%}" for key in ("taken before", "taken then", "taken later"))]
              for split in ("train", "valid", "test") for rule, one in rules.items()
              for part in [one["splits"][split]]]  # fmt: skip
    present, new = rules["present"]["test"], "items new to the user"
    rows = {
        SYSTEMS[name]: {rule: one["test"]["systems"][name]["metrics"]
                        | {"new": one["test"]["slices"][new]["systems"][name]["auc"]} for rule, one in rules.items()}
        for name in SYSTEMS if name in present["systems"]
    }  # fmt: skip
    columns = {}
    for title, key in (("AUC", "auc"), ("GAUC", "gauc"), ("logloss", "logloss"), ("AUC on new items", "new")):
        columns |= {f"{title}, former": (f"former/{key}", 3), title: (f"present/{key}", 3)}
    return (
        "Formerly no negative was an item that the user took in the same split, which let negatives of valid and test "
        "be items taken in an earlier one, and let those of training tell of the future. Now none is an item that the "
        "user has in the log at that moment or before, in any split. Shares of the negatives whose item the user took "
        "before the positive, at its moment, and later, by any row of the log:\n\n"
        + table(["split", "rule", "negatives", "taken before", "taken then", "taken later"], counts)
        + f"\n\nThe test split under both rules, {present['targets']:,} targets in each, by the systems that need no "
        f"LLM; the former rule is the code of commit a100933:\n\n{table_of('system', rows, columns)}\n\n"
        f"{rules['present']['positives taken before']:.1%} of the test's positives are items that the user took "
        "before, and by the present rule no negative is. So a repeat purchase is always a positive, and what sees it "
        "gains most: a part of the present AUC says no more than that. The last two columns leave it out: they are of "
        f"items that the user had not taken, {present['slices'][new]['targets']:,} targets by the present rule. "
        "Figures of the two rules are not to be compared as progress."
    )


def few_shot(found: dict) -> str:
    """Few labelled targets: medians over the seeds, and streams minus instruction tuning by seed."""
    settings, test, metrics = found["settings"], found["test"], ("auc", "gauc", "logloss")
    rows = [
        [targets if targets != "0" else "0 (untrained)", PEERS[name], str(len(found["runs"][name][targets])),
         *(shown(sizes[targets][metric]) for metric in metrics), f"{sizes[targets]['seconds']['median']:.0f}"]
        for targets in found["summary"][settings["systems"][0]] for name, sizes in found["summary"].items()
    ]  # fmt: skip
    rows.append(["", "the user's newest outcomes alone, up to ten, with five more at the log's rate", "",
                 *(shown(found["newest_rate"][metric]) for metric in metrics), ""])  # fmt: skip
    text = (
        f"LoRA on {settings['base']}, trained on the same targets, each after at most {settings['history']} events, in "
        f"whole passes until {settings['seen']} or more are seen, {settings['batch_size'] * settings['window']} a step "
        f"(streams: windows of {settings['window']}); {test['targets']:,} test targets of {test['users']} users. "
        "Median and range over the seeds (the last row: a bootstrap interval); seconds are those of training.\n\n"
    ) + table(["labelled targets", "system", "seeds", "AUC", "GAUC", "logloss", "seconds"], rows)
    rows = [
        [targets, str(run["seed"]), *(shown(run["metrics"][metric], 3, "+") for metric in ("auc", "gauc"))]
        for targets, runs in found["streams_minus_instruction"]["runs"].items() for run in runs
    ]  # fmt: skip
    if rows:
        text += (
            "\n\nOne learning rate for both, untuned. A step of streams has targets of one or a few users, one of "
            "prompts of more. Streams minus instruction tuning, the same targets and seed:\n\n"
        ) + table(["labelled targets", "seed", "AUC", "GAUC"], rows)
    return text


def step_profile(found: dict) -> str:
    """Where a step's time goes, and its share of the matrix-product rate."""
    kinds, masked = found["profile"], found.get("one_mask")
    text = (
        f"A micro-batch of {found['tokens']:,} tokens ({found['targets']} targets) takes {shown(found['seconds'], 2)} "
        f"s: products with weights {kinds['products']:.0%}, attention {kinds['attention']:.0%}, the rest "
        f"{kinds['rest']:.0%}. It reaches {shown(found['matmul_share'], 2)} of the torch.mm rate, attention counted as "
        f"no work, and {shown(found['matmul_share_with_attention'], 2)} with its own products counted. Were these as "
        f"fast as torch.mm and all else free, the first would be {found['ceiling']:.2f}. The last layer counts whole "
        "in all of these, though most of it is left out."
    )
    if masked:
        text += f" It is {shown(masked['ratio'], 2)} times as fast as under one mask ({shown(masked['seconds'], 2)} s)."
    return text


def score_speed(found: dict) -> str:
    """Many candidates of one history beside independent prompts."""
    names = {"scorer": "a new history", "extended": "a history grown by one event", "kept": "a known history"}
    rows = [[names[key], shown(found["seconds"][key], 2), shown(value, 1)] for key, value in found["ratio"].items()]
    return (
        f"{found['settings']['candidates']} candidates after {found['settings']['history_tokens']} tokens, beside a "
        f"padded batch of independent prompts ({shown(found['seconds']['independent'], 1)} s):\n\n"
    ) + table(["", "seconds", "times as fast"], rows)


def train_speed(found: dict) -> str:
    """Streams beside a plain Trainer."""
    summary = found["summary"]
    rows = [[name, *(shown(at(summary[side], key), digits) for side in ("stream", "plain"))] for name, key, digits in (
        ("targets/s", "targets_per_s", 2), ("tokens a target", "tokens_per_target", 0), ("tokens/s", "tokens_per_s", 0),
        ("share of the torch.mm rate", "matmul_share", 2), ("peak memory, MiB", "peak_rss_mib", 0))]  # fmt: skip
    return (
        f"Streams beside a plain Trainer with PEFT, on the same targets: {shown(summary['ratio'], 1)} times as many "
        f"targets/s.\n\n{table(['', 'streams', 'plain'], rows)}"
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
        columns = {f"{curve['unit']}/s": ("per_s", 2), "share of what products allow": ("share", 2),
                   "with attention": ("share_with_attention", 2), "peak MiB": ("peak_mib", 0)}  # fmt: skip
        points = {str(point["x"]): point for point in curve["points"]}
        parts += [table_of(curve["along"], points, columns), f"![{curve['along']}]({IMAGES}cost_{name}.png)"]
    return "\n\n".join(parts)


def bank(found: dict) -> str:
    """Throughput and swaps of a bank."""
    return (
        f"A bank of two bundles on mixed requests reaches {shown(found['throughput_of_merged'], 2)} of one merged "
        f"model's throughput; a swap takes {found['swaps_ms']['in_memory']['median']:.2f} ms in memory and "
        f"{found['swaps_ms']['on_disk']['median']:.0f} ms from disk."
    )


def students(found: dict) -> str:
    """Quality, size, throughput and latency of a teacher and its students."""
    columns = {"AUC": ("quality/auc", 3), "GAUC": ("quality/gauc", 3), "MB": ("mb", 1),
               "targets/s": ("targets_per_second/median", 0, "", ""), "P50 ms": ("latency_ms/p50", 1, "", ""),
               "P99 ms": ("latency_ms/p99", 1, "", "")}  # fmt: skip
    rows = {
        title: system | {"mb": system["bytes"] / 1e6} for title, system in named(found["systems"], STUDENTS).items()
    }
    return f"{found['targets']:,} test targets of {found['users']} users:\n\n{table_of('system', rows, columns)}"


def _seconds(found: dict) -> str:
    """Seconds of training, from the least to the greatest of the systems."""
    values = [entry["seconds"] for entry in found["systems"].values()]
    return f"{min(values):.0f} to {max(values):.0f}"


def _interval(value: float, ends: list[float] | None, sign: str = "") -> str:
    """A value with its interval, if there is one."""
    low, high = ends or (None, None)
    return shown({"value": value, "low": low, "high": high}, 3, sign)


def _gap(entry: dict) -> str:
    """AUC of streams minus that of another system, both at their ends."""
    return _interval(*entry["streams_minus_this_at_the_end"]["auc"].values(), "+")


def peers(found: dict) -> str:
    """Streams beside what a user would pick instead."""
    where, rows = found["compared_at"], {}
    for name, entry in found["systems"].items():
        first, end = entry["curve"][0], entry["curve"][-1]
        rows[PEERS[name]] = entry | {"trained": f"{entry['targets']:,}",
                                     "start": None if first["steps"] else first["auc"],
                                     "end": _interval(end["auc"], end["auc_interval"])}  # fmt: skip
    columns = {
        "targets/s": ("targets_per_s", 2), "tokens a target": ("tokens_per_target", 0), "peak MiB": ("peak_rss_mib", 0),
        "targets trained on": ("trained",), "AUC at the start": ("start", 3, "", "not asked"),
        "AUC at the end": ("end",), f"AUC at {where['seconds']:.0f} s": ("auc_at_equal_seconds", 3),
        f"AUC at {where['targets']} targets": ("auc_at_equal_targets", 3),
        f"s to AUC {where['auc']:.2f}": ("seconds_to_auc", 0, "", "not reached"),
    }  # fmt: skip
    validation, settings = found["validation"], found["settings"]
    text = (
        f"Each trained LoRA of one rank on one base for {_seconds(found)} s on the targets of the "
        f"same windows, and answered {validation['targets']} validation targets of {validation['users']} users. "
        "Seconds are those of training alone; each starts as by default, streams from the label words' rows. Peers "
        f"compute {settings['peer_batch'] // settings['peer_accumulation']} prompts at once, streams "
        f"{settings['micro_tokens']:,} tokens, which their memory shows; the peers' batch was not tuned (plain is "
        "faster with one prompt at a time, see training speed). AUC between two points of a curve is taken to run "
        f"straight. One seed; plain and swift compute the same, and end at the same answers.\n\n"
        f"{table_of('system', rows, columns)}"
    )
    gaps = [f"{PEERS[name]} {_gap(entry)}" for name, entry in found["systems"].items()
            if "streams_minus_this_at_the_end" in entry]  # fmt: skip
    text += f"\n\nAUC of streams at the end minus that of: {'; '.join(gaps)}." if gaps else ""
    return f"{text}\n\n![Validation AUC against seconds of training]({IMAGES}peers.png)"


def run_all(found: dict) -> str:
    """Seconds of the quick forms."""
    steps = ", ".join(f"{name} {seconds:.0f}" for name, seconds in found["seconds"].items())
    failed = f" Failed: {', '.join(found['failed'])}." if found["failed"] else ""
    return f"All quick forms, on what `make bench` takes: {found['minutes']:.1f} minutes. Seconds: {steps}.{failed}"


def serve_size(found: dict) -> str:
    """Sizes of the installed extras."""
    sizes = ", ".join(f"`[{extra}]` {part['mb']:.0f} MB" for extra, part in found["extras"].items())
    return f"Installed in an environment of its own: {sizes} (limit for `[serve]`: {found['limit_mb']} MB)."


SECTIONS: tuple[tuple[str, str, Callable[[dict], str]], ...] = (
    ("protocol_*.json", "Quality", protocol),
    ("negatives.json", "The rule of sampled negatives", negatives),
    ("few_shot.json", "Few labelled targets", few_shot),
    ("train_speed.json", "Training speed", train_speed),
    ("step_profile.json", "Where a training step's time goes", step_profile),
    ("step_profile_*.json", "The same of a window with candidates", step_profile),
    ("peers.json", "Beside what a user would pick instead", peers),
    ("score_speed.json", "Scoring many candidates", score_speed),
    ("cost_curves.json", "What a target costs", cost_curves),
    ("bank.json", "Many domains on one base", bank),
    ("run_all.json", "How long the quick forms take", run_all),
    ("serve_size.json", "What serving installs", serve_size),
)


def section(name: str, found: dict) -> str:
    """What the page says of a result file of this name; its entries where the page has no section for it."""
    for pattern, _, write in SECTIONS:
        if Path(name).match(pattern):
            return write(found)
    if name == "students.json":
        return students(found)
    return json.dumps({key: value for key, value in found.items() if key not in ("machine", "versions", "rounds")},
                      indent=1)  # fmt: skip


# -- pages -----------------------------------------------------------------------------------------

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
    """How each file was made."""
    rows = []
    for path in sorted(results.glob("*.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        machine, versions = found["machine"], found["versions"]
        rows.append([
            f"`{path.name}`", f"`{found['command']}`", found["date"][:10],
            ", ".join(map(str, at(found, "settings/seeds") or [found["seed"]])),
            f"{machine['cpu']} {machine['instructions']}, {machine['threads']} of {machine['cores']} threads",
            ", ".join(f"{name} {versions[name].partition('+')[0]}" for name in ("torch", "transformers", "peft")),
            shown(found.get("minutes"), 0, "", ""),
        ])  # fmt: skip
    return table(["file", "command", "date", "seed", "machine", "versions", "minutes"], rows)


def page(results: Path = RESULTS) -> str:
    """The text of docs/results.md, or the same of another directory of results, for a page beside it."""
    parts = [OPENING + (CLAIMS if results == RESULTS else QUICK)]
    for pattern, title, write in SECTIONS:
        for path in sorted(results.glob(pattern)):
            found = json.loads(path.read_text(encoding="utf-8"))
            full = f"{title}: {path.stem.removeprefix(pattern.partition('*')[0])}" if "*" in pattern else title
            changed, note = OLDER.get(path.stem, ("", ""))
            note = f"{note}\n\n" if found["date"] < changed else ""
            parts.append(f"## {full}\n\n`{found['command']}`\n\n{note}{write(found)}\n")
    parts.append(f"## How each file was made\n\n{provenance(results)}\n")
    text = "\n".join(parts)
    return text if results == RESULTS else text.replace(IMAGES, f"{results.name}/")


def read(name: str) -> dict:
    """A result file of the repository."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def readme_table() -> str:
    """The README's tables: MovieLens, on the targets that every system predicted, and timings beside something else."""
    found = read("protocol_movies")
    part = found.get("shared", found["all"])
    return f"{part['targets']:,} test targets of {part['users']} users:\n\n{quality(part)}\n\n{timings()}\n"


def timings() -> str:
    """What is measured beside something else, one line each."""
    train, score, many, small = (read(name) for name in ("train_speed", "score_speed", "bank", "students"))
    found, settings, swaps = read("peers"), score["settings"], many["swaps_ms"]
    stream, plain = train["summary"]["stream"], train["summary"]["plain"]
    ids, int8, teacher = (small["systems"][name] for name in ("ids", "ids_int8", "teacher"))
    rate = ids["targets_per_second"]["median"] / teacher["targets_per_second"]["median"]
    gap = small["ids_on_all"]["all"]["systems"]["ids"]["minus_ids_alone"]["gauc"]
    rows = [
        ["training, targets/s beside a plain Trainer with PEFT, answers equal",
         f"{stream['targets_per_s']['median']:.1f} and {plain['targets_per_s']['median']:.2f}: "
         f"{shown(train['summary']['ratio'], 1)} times", "train_speed"],
        ["tokens a target, streams and plain",
         f"{stream['tokens_per_target']['median']:.0f} and {plain['tokens_per_target']['median']:.0f}", "train_speed"],
        *([f"{found['settings']['seconds']:.0f} s of training beside {PEERS[name]}: targets/s; AUC less its",
           f"{found['systems']['streams']['targets_per_s']:.1f} and {found['systems'][name]['targets_per_s']:.2f}; "
           f"{_gap(found['systems'][name])}", "peers"] for name in ("instruction", "swift")),
        *([f"{settings['candidates']} candidates after {settings['history_tokens']} tokens, {what}, beside a padded "
           "batch of prompts", f"{shown(score['ratio'][key], 1)} times as fast", "score_speed"]
          for key, what in (("scorer", "a new history"), ("kept", "a known one"))),
        [f"a bank of two domains on {many['settings']['requests']} mixed requests, throughput of one merged model's",
         shown(many["throughput_of_merged"], 2), "bank"],
        [f"a swap in memory; from disk; memory a domain of {many['many']['domains']}",
         f"{swaps['in_memory']['median']:.2f} ms; {swaps['on_disk']['median']:.0f} ms; "
         f"{many['many']['mb_per_domain']:.0f} MB", "bank"],
        ["a student of item ids beside its teacher, one core",
         f"{ids['targets_per_second']['median']:,.0f} targets/s, {rate:,.0f} times; AUC "
         f"{ids['quality']['auc']['value']:.3f} and {teacher['quality']['auc']['value']:.3f}", "students"],
        ["the same as int8 ONNX, 50 candidates", f"{int8['latency_ms']['p99']:.1f} ms at P99", "students"],
        ["the same beside a student without a teacher, GAUC", shown(gap, 3, "+"), "students"],
    ]  # fmt: skip
    trained = {name: entry["targets"] for name, entry in found["systems"].items()}
    others = [targets for name, targets in trained.items() if name != "streams"]
    said = (
        f"In those {_seconds(found)} s streams saw {trained['streams'] / max(others):.0f} to "
        f"{trained['streams'] / min(others):.0f} times as many targets as the peers, whose batch of "
        f"{found['settings']['peer_batch']} prompts was not tuned; on {found['validation']['targets']} validation "
        "targets no AUC can be told from another's: that run shows speed, not quality."
    )
    lines = [[what, figure, f"`{name}.json`"] for what, figure, name in rows]
    return f"{table(['what', 'figure', 'file'], lines)}\n\n{said}"


TABLES: dict[Path, Callable[[], str]] = {README: readme_table, DISTILLING: lambda: students(read("students")) + "\n"}
"""Pages with a table between marks, and what writes it."""


def with_table(path: Path) -> str:
    """A page's text with the present table between its marks."""
    before, _, rest = path.read_text(encoding="utf-8").partition(MARKS[0])
    return before + MARKS[0] + TABLES[path]() + MARKS[1] + rest.partition(MARKS[1])[2]


def main() -> None:
    """Write them all."""
    PAGE.write_text(page(), encoding="utf-8")
    for path in TABLES:
        path.write_text(with_table(path), encoding="utf-8")


if __name__ == "__main__":
    main()
