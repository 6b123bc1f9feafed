"""What the documentation says is compared with what the code holds."""

from __future__ import annotations

import argparse
import importlib
import json
import re
import shlex
from pathlib import Path

import pytest

import llmrec_peft
from benchmarks import results_page as pages
from benchmarks import run_all
from llmrec_peft.config.schema import CONFIGS, read_config
from llmrec_peft.data.readers import READERS

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_public_names():
    assert llmrec_peft.__all__ == [
        "BehaviorLog",
        "BehaviorTrainer",
        "BundleError",
        "ConfigError",
        "DataError",
        "Domain",
        "DomainBank",
        "DomainError",
        "LLMRecError",
        "MergeOptions",
        "ModelError",
        "Scorer",
        "StreamError",
        "build_streams",
        "distill",
        "load_classifier",
        "merge_bundle",
    ]
    for name in llmrec_peft.__all__:
        assert getattr(llmrec_peft, name).__name__ == name


def test_formats_page_lists_the_readers():
    text = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", text, flags=re.M))
    assert {name: layout.replace("\\|", "|") for name, layout in rows.items()} == {
        name: reader.layout for name, reader in READERS.items()
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_files_exist(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", text):
        if "://" not in target:
            assert (page.parent / target).exists(), target
    folders = "recipes|llmrec_peft|tests|benchmarks|docs|accelerate_configs|ds_configs"
    for name in re.findall(rf"`((?:{folders})/[\w./-]*)`", text):
        assert (ROOT / name).exists(), name


def commands(text: str) -> list[str]:
    """Commands of the page's blocks, joined over line ends with a backslash."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.M | re.S)
    shell = [block for language, block in blocks if language in ("", "bash", "sh")]
    lines = [line for block in shell for line in block.replace("\\\n", " ").splitlines()]
    return [line for line in lines if re.search(r"recipes/\w+\.py", line)]


ALL = [(page.name, line) for page in PAGES for line in commands(page.read_text(encoding="utf-8"))]


def test_there_are_commands():
    assert len(ALL) >= 3


@pytest.mark.parametrize(("page", "line"), ALL)
def test_commands_are_accepted(page, line, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = shlex.split(re.sub(r"\[[^\]]*\]", "", line), comments=True)
    place = next(number for number, word in enumerate(words) if re.fullmatch(r"recipes/\w+\.py", word))
    assert Path(words[place]).is_file()
    read_config(CONFIGS[Path(words[place]).stem], words[place + 1 :])


def test_the_library_example_runs(tiny_base, tmp_path, monkeypatch, capsys):
    """The README's Python block as it stands, on a tiny base and in a directory of its own."""
    block = re.search(r"^```python\n(.*?)^```", PAGES[0].read_text(encoding="utf-8"), flags=re.M | re.S)[1]
    assert "smollm2-135m" in block
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    exec(compile(block.replace("smollm2-135m", str(tiny_base("llama"))), "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert "300 users" in printed and "['skip', 'click']" in printed


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_placeholder_is_left(page):
    assert not re.findall(r"^[A-Z]{4,}$", page.read_text(encoding="utf-8"), flags=re.M)


def test_results_in_the_readme_are_those_of_the_files():
    results = ROOT / "benchmarks" / "results"
    speed, bank, score, students = (
        json.loads((results / f"{name}.json").read_text(encoding="utf-8"))
        for name in ("train_speed", "bank", "score_speed", "students")
    )
    flat = " ".join(PAGES[0].read_text(encoding="utf-8").split())
    page = " ".join((ROOT / "docs" / "results.md").read_text(encoding="utf-8").split())

    def cell(value: dict, digits: int) -> str:
        return f"{value['median']:.{digits}f} ({value['min']:.{digits}f} to {value['max']:.{digits}f})"

    assert f"{cell(speed['summary']['ratio'], 1)} times" in flat
    share, swaps, many = bank["throughput_of_merged"], bank["swaps_ms"], bank["many"]
    assert f"| {cell(share, 2)} |" in flat
    assert f"{swaps['in_memory']['median']:.2f} ms" in flat and f"{swaps['on_disk']['median']:.0f} ms" in flat
    assert f"memory a domain of {many['domains']} |" in flat and f"{many['mb_per_domain']:.0f} MB" in flat
    for name, ratio in score["ratio"].items():
        assert f"{cell(ratio, 1)}" in (page if name == "extended" else flat)
    assert f"after {score['settings']['history_tokens']} tokens" in flat
    ids, gap = students["systems"]["ids"], students["ids_on_all"]["all"]["systems"]["ids"]["minus_ids_alone"]["gauc"]
    assert f"{ids['targets_per_second']['median']:,.0f} targets/s" in flat
    assert f"{students['systems']['ids_int8']['latency_ms']['p99']:.1f} ms at P99" in flat
    assert f"GAUC | {gap['value']:+.3f} [{gap['low']:+.3f}, {gap['high']:+.3f}]" in flat


def test_the_page_of_results_matches_the_files():
    assert pages.PAGE.read_text(encoding="utf-8") == pages.page(), "run python benchmarks/results_page.py"
    for path in pages.TABLES:
        assert path.read_text(encoding="utf-8") == pages.with_table(path), path.name
        assert pages.MARKS[0] in path.read_text(encoding="utf-8")
    # Every file is accounted for.
    for path in pages.RESULTS.glob("*.json"):
        assert f"`{path.name}`" in pages.page()


def test_quick_forms_have_options_that_exist(tmp_path):
    for words in run_all.plan("DIR", ROOT / "recipes" / "configs" / "movies" / "domain.yaml", tmp_path).values():
        if words[0].startswith("recipes/"):
            read_config(CONFIGS[Path(words[0]).stem], words[1:])
            continue
        module, rest = importlib.import_module(words[1]), words[2:]
        known = getattr(module, "BENCHMARK", None) or module.BENCHMARKS[rest.pop(0)]
        parser = argparse.ArgumentParser()
        known.add_options(parser)
        assert parser.parse_args(rest).data == "DIR"


def test_the_tables_of_recommending_are_those_of_the_files():
    text = (ROOT / "docs" / "recommending.md").read_text(encoding="utf-8")
    for name in ("movies", "retail"):
        found = json.loads((ROOT / "benchmarks" / "results" / f"recommend_{name}.json").read_text(encoding="utf-8"))
        for system in [*found["systems"].values(), *(found["new_items"] or {}).values()]:
            cells = (f"{v['value']:.3f} [{v['low']:.3f}, {v['high']:.3f}]" for v in system.values())
            assert " | ".join(cells) in text
        assert f"{found['training']['max_steps']}" in text and f"{name}, {found['settings']['users']} users" in text


def test_the_table_of_students_is_that_of_the_file():
    text = " ".join((ROOT / "docs" / "distilling.md").read_text(encoding="utf-8").split())
    found = json.loads((ROOT / "benchmarks" / "results" / "students.json").read_text(encoding="utf-8"))

    def cell(value: dict, form: str) -> str:
        return f"{value['value']:{form}} [{value['low']:{form}}, {value['high']:{form}}]"

    whole, cold = found["ids_on_all"]["all"], found["ids_on_all"]["items without training rows"]
    assert cell(whole["systems"]["ids"]["minus_ids_alone"]["gauc"], "+.4f") in text
    assert cell(cold["systems"]["ids"]["quality"]["gauc"], ".3f") in text
