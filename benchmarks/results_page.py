"""Writes docs/results.md, and the tables of two other pages, from the files in benchmarks/results.

    python benchmarks/results_page.py

The prose is in results_page.md. Every figure on the page is in a file, and every file says how it was made. A test
compares the pages with what this would write.
"""

import json
import re
import statistics
import string
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGE, README, DISTILLING = ROOT / "docs" / "results.md", ROOT / "README.md", ROOT / "docs" / "distilling.md"
IMAGES = "../benchmarks/results/"  # from the page
MARKS = ("<!-- results: python benchmarks/results_page.py -->\n", "<!-- end of results -->\n")
OLDER = {"protocol_retail": "2026-11-28"}
"""Results that a change of the code left behind, and its day: an older file gets the note of the template."""

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
    "instruction": "instruction tuning on the label word (TALLRec's way)", "swift": "ms-swift, seq_cls",
}  # fmt: skip
STUDENTS = {
    "teacher": "teacher (LoRA on SmolLM2-135M)", "ids": "ids: content and predictions", "ids_int8": "ids, int8 ONNX",
    "ids_content": "ids: content alone", "ids_answers": "ids: predictions alone",
    "ids_alone": "ids, without the teacher", "shallow": "shallow, 10 of 30 layers",
    "shallow_alone": "shallow, without the teacher's predictions",
}  # fmt: skip

# -- cells, tables and prose -----------------------------------------------------------------------


def shown(found: Any, digits: int = 3, sign: str = "", none: str = "not known") -> str:
    """A number, a median with minimum and maximum, or a value with its interval."""
    if isinstance(found, str | None):
        return none if found is None else found
    if isinstance(found, float | int):
        return f"{found:{sign},.{digits}f}"
    names = ("median", "min", "max") if "median" in found else ("value", "low", "high")
    middle, low, high = (found[name] for name in names)
    form = f"{sign}.{digits}f"
    if "median" in found:
        return f"{middle:{form}} ({low:{form}} to {high:{form}})"
    return f"{middle:{form}}" + ("" if low is None else f" [{low:{form}}, {high:{form}}]")


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


class Prose(string.Formatter):
    """Fills `{path/of/an/entry:format}` of a text; the format of a spread or an interval is its number of digits."""

    def get_value(self, key: Any, args: Any, kwargs: Any) -> Any:
        """A value given by name, or an entry of the result."""
        return kwargs[key] if key in kwargs else at(args[0], key)

    def format_field(self, value: Any, format_spec: str) -> str:
        """A spread, an interval or nothing known, or any other value as usual."""
        return format(value, format_spec) if isinstance(value, str | float | int) else shown(value, int(format_spec))


_PARTS = re.split(r"<!-- (.+) -->\n", Path(__file__).with_suffix(".md").read_text(encoding="utf-8"))[1:]
TEXTS = dict(zip(_PARTS[::2], _PARTS[1::2], strict=True))
"""The texts of results_page.md by name."""


def say(name: str, found: Any = None, **values: Any) -> str:
    """A text of the template, a paragraph a line, filled with entries of a result and with other values."""
    parts = TEXTS[name].strip().split("\n\n")
    paragraphs = (part if part.startswith("|") else part.replace("\n", " ") for part in parts)
    return Prose().vformat("\n\n".join(paragraphs), (found,), values)


# -- sections --------------------------------------------------------------------------------------

METRICS = {"AUC": ("metrics/auc", 3), "GAUC": ("metrics/gauc", 3), "logloss": ("metrics/logloss", 3)}
FEW = ("both_rates", "lightgbm", "ids", "ids_distilled", "llm", "fused")
"""Systems of the tables by slice."""


def quality(part: dict) -> str:
    """Metrics of the protocol's systems, with differences to the LLM where it is among them."""
    columns = METRICS | {"NE": ("metrics/ne/value", 3), "ECE": ("metrics/ece/value", 3)}
    columns |= {"AUC - LLM": ("minus_llm/auc", 3, "+", "")} if "llm" in part["systems"] else {}
    return table_of("system", named(part["systems"], SYSTEMS), columns)


def by_slice(part: dict) -> str:
    """GAUC of some systems by slice, where all have one."""
    chosen = [name for name in FEW if name in part["systems"]]
    paths = [f"systems/{name}/gauc/value" for name in chosen]
    rows = [[title, f"{one['targets']:,}", *(shown(at(one, path)) for path in paths)]
            for title, one in part["slices"].items() if all(at(one, path) is not None for path in paths)]  # fmt: skip
    return table(["slice", "targets", *(SYSTEMS[name] for name in chosen)], rows) if rows else ""


def protocol(found: dict) -> str:
    """One log: systems on the targets that all predicted, and those that predicted everything on all."""
    parts, budget = [], found["budgets"].get("llm")
    if budget and "seconds" in budget:
        device = f" ({budget['device']})" if "device" in budget else ""
        steps = budget.get("max_steps", budget.get("epochs"))
        parts.append(say("protocol: budget", budget, steps=steps, train=found["split"]["train"], device=device,
                         minutes=budget["seconds"] / 60))  # fmt: skip
    for key, what in (("shared", "that every system predicted"), ("all", "of the test split")):
        if key in found:
            parts.append(say("protocol: part", found[key], what=what, quality=quality(found[key])))
            slices = by_slice(found[key])
            parts += [say("protocol: slices", what=what, slices=slices)] if slices else []
    if "seeds" in found:
        rows = {}
        for name, one in named(found["seeds"], SYSTEMS).items():
            spreads = {key: {"median": statistics.median(v), "min": min(v), "max": max(v)}
                       for key, v in one["metrics"].items()}  # fmt: skip
            rows[name] = spreads | {"seeds": ", ".join(map(str, one["seeds"]))}
        columns = {name: (name.lower(), 3) for name in ("AUC", "GAUC", "logloss", "NE", "ECE")}
        parts.append(say("protocol: seeds", table=table_of("system", rows, {"seeds": ("seeds",), **columns})))
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
    head = ["split", "rule", "negatives", "taken before", "taken then", "taken later"]
    return say("negatives", present, counts=table(head, counts), quality=table_of("system", rows, columns),
               repeats=rules["present"]["positives taken before"], new=present["slices"][new]["targets"])  # fmt: skip


def few_shot(found: dict) -> str:
    """Few labelled targets: medians over the seeds, and streams minus instruction tuning by seed."""
    settings, metrics = found["settings"], ("auc", "gauc", "logloss")
    rows = [
        [targets if targets != "0" else "0 (untrained)", PEERS[name], str(len(found["runs"][name][targets])),
         *(shown(sizes[targets][metric]) for metric in metrics), f"{sizes[targets]['seconds']['median']:.0f}"]
        for targets in found["summary"][settings["systems"][0]] for name, sizes in found["summary"].items()
    ]  # fmt: skip
    rows.append(["", "the user's newest outcomes alone, up to ten, with five more at the log's rate", "",
                 *(shown(found["newest_rate"][metric]) for metric in metrics), ""])  # fmt: skip
    head = ["labelled targets", "system", "seeds", "AUC", "GAUC", "logloss", "seconds"]
    text = say("few_shot", found, step=settings["batch_size"] * settings["window"], table=table(head, rows))
    rows = [[targets, str(run["seed"]), *(shown(run["metrics"][metric], 3, "+") for metric in metrics[:2])]
            for targets, runs in found["streams_minus_instruction"]["runs"].items() for run in runs]  # fmt: skip
    gaps = table(["labelled targets", "seed", "AUC", "GAUC"], rows)
    return f"{text}\n\n{say('few_shot: gaps', table=gaps)}" if rows else text


def step_profile(found: dict) -> str:
    """Where a step's time goes, and its share of the matrix-product rate."""
    text = say("step_profile", found)
    return f"{text} {say('step_profile: mask', found)}" if found.get("one_mask") else text


def cost_curves(found: dict) -> str:
    """A table and an image a curve."""
    parts = [say("cost_curves", found)]
    for name, curve in found["curves"].items():
        columns = {f"{curve['unit']}/s": ("per_s", 2), "share of what products allow": ("share", 2),
                   "with attention": ("share_with_attention", 2), "peak MiB": ("peak_mib", 0)}  # fmt: skip
        points = {str(point["x"]): point for point in curve["points"]}
        parts += [table_of(curve["along"], points, columns), f"![{curve['along']}]({IMAGES}cost_{name}.png)"]
    return "\n\n".join(parts)


def students(found: dict) -> str:
    """Quality, size, throughput and latency of a teacher and its students."""
    columns = {"AUC": ("quality/auc", 3), "GAUC": ("quality/gauc", 3), "MB": ("mb", 1),
               "targets/s": ("targets_per_second/median", 0, "", ""), "P50 ms": ("latency_ms/p50", 1, "", ""),
               "P99 ms": ("latency_ms/p99", 1, "", "")}  # fmt: skip
    rows = {name: one | {"mb": one["bytes"] / 1e6} for name, one in named(found["systems"], STUDENTS).items()}
    return say("students", found, table=table_of("system", rows, columns))


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
    """Streams beside other tools."""
    where, rows = found["compared_at"], {}
    for name, entry in found["systems"].items():
        first, end = entry["curve"][0], entry["curve"][-1]
        rows[PEERS[name]] = entry | {"trained": f"{entry['targets']:,}",
                                     "start": None if first["steps"] else first["auc"],
                                     "end": _interval(end["auc"], end["auc_interval"])}  # fmt: skip
    columns = {
        "targets/s": ("targets_per_s", 2), "tokens a target": ("tokens_per_target", 0), "peak MiB": ("peak_rss_mib", 0),
        "targets trained on": ("trained",), "AUC at the start": ("start", 3, "", "not measured"),
        "AUC at the end": ("end",), f"AUC at {where['seconds']:.0f} s": ("auc_at_equal_seconds", 3),
        f"AUC at {where['targets']} targets": ("auc_at_equal_targets", 3),
        f"s to AUC {where['auc']:.2f}": ("seconds_to_auc", 0, "", "not reached"),
    }  # fmt: skip
    batch = found["settings"]["peer_batch"] // found["settings"]["peer_accumulation"]
    parts = [say("peers", found, seconds=_seconds(found), batch=batch, table=table_of("system", rows, columns))]
    gaps = [f"{PEERS[name]} {_gap(entry)}" for name, entry in found["systems"].items()
            if "streams_minus_this_at_the_end" in entry]  # fmt: skip
    parts += [say("peers: gaps", gaps="; ".join(gaps))] if gaps else []
    return "\n\n".join([*parts, say("peers: image", images=IMAGES)])


def run_all(found: dict) -> str:
    """Seconds of the quick forms."""
    steps = ", ".join(f"{name} {seconds:.0f}" for name, seconds in found["seconds"].items())
    return say("run_all", found, steps=steps,
               failed=f" Failed: {', '.join(found['failed'])}." if found["failed"] else "")  # fmt: skip


def serve_size(found: dict) -> str:
    """Sizes of the installed extras."""
    sizes = ", ".join(f"`[{extra}]` {part['mb']:.0f} MB" for extra, part in found["extras"].items())
    return say("serve_size", found, sizes=sizes)


SECTIONS: tuple[tuple[str, str, Callable[[dict], str]], ...] = (
    ("protocol_*.json", "Quality", protocol),
    ("negatives.json", "The rule of sampled negatives", negatives),
    ("few_shot.json", "Few labelled targets", few_shot),
    ("train_speed.json", "Training speed", lambda found: say("train_speed", found)),
    ("step_profile.json", "Where a training step's time goes", step_profile),
    ("step_profile_*.json", "A training step of a window with candidates", step_profile),
    ("peers.json", "Comparison with other tools", peers),
    ("score_speed.json", "Scoring many candidates", lambda found: say("score_speed", found)),
    ("cost_curves.json", "Cost of a target", cost_curves),
    ("bank.json", "Many domains on one base", lambda found: say("bank", found)),
    ("run_all.json", "How long the quick forms take", run_all),
    ("serve_size.json", "What serving installs", serve_size),
)


def section(name: str, found: dict) -> str:
    """What the page says of a result file of this name; its entries where the page has no section for it."""
    for pattern, _, write in (*SECTIONS, ("students.json", "", students)):
        if Path(name).match(pattern):
            return write(found)
    shown_keys = [key for key in found if key not in ("machine", "versions", "rounds")]
    return json.dumps({key: found[key] for key in shown_keys}, indent=1)


# -- pages -----------------------------------------------------------------------------------------


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
    parts = [TEXTS["opening"] + TEXTS["claims" if results == RESULTS else "quick"].removesuffix("\n")]
    for pattern, title, write in SECTIONS:
        for path in sorted(results.glob(pattern)):
            found = json.loads(path.read_text(encoding="utf-8"))
            full = f"{title}: {path.stem.removeprefix(pattern.partition('*')[0])}" if "*" in pattern else title
            note = f"{say(f'{path.stem}: older')}\n\n" if found["date"] < OLDER.get(path.stem, "") else ""
            parts.append(f"## {full}\n\n`{found['command']}`\n\n{note}{write(found)}\n")
    parts.append(f"## How each file was made\n\n{provenance(results)}\n")
    text = "\n".join(parts)
    return text if results == RESULTS else text.replace(IMAGES, f"{results.name}/")


def read(name: str) -> dict:
    """A result file of the repository."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def readme_table() -> str:
    """The README's tables: MovieLens, on the targets that every system predicted, and timings beside something else."""
    movies, peer, small = read("protocol_movies"), read("peers"), read("students")
    part, systems = movies.get("shared", movies["all"]), peer["systems"]
    ratios = [systems["streams"]["targets"] / one["targets"] for name, one in systems.items() if name != "streams"]
    rates = {name: small["systems"][name]["targets_per_second"]["median"] for name in ("ids", "teacher")}
    found = {"part": part, "train": read("train_speed"), "peers": peer, "score": read("score_speed"),
             "bank": read("bank"), **small["systems"]}  # fmt: skip
    gain = small["ids_on_all"]["all"]["systems"]["ids"]["minus_ids_alone"]["gauc"]
    return say("readme", found, quality=quality(part), seconds=_seconds(peer), least=min(ratios), most=max(ratios),
               gaps={name: _gap(systems[name]) for name in ("instruction", "swift")}, gain=shown(gain, 3, "+"),
               faster=rates["ids"] / rates["teacher"]) + "\n"  # fmt: skip


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
