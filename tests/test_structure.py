"""The package's structure: which room imports which, no circles, no file name twice, nothing written twice."""

from __future__ import annotations

import ast
import collections
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import grimp
import pytest

from tests.conftest import ROOT

PACKAGE = ROOT / "llmrec_peft"
GROUND = ("errors", "messages", "documents", "fields", "files", "probabilities", "boundary")
"""Files below all rooms."""
ROOMS = (
    "data", "models", "checkpoints", "training", "evaluation", "merging", "requests", "retrieval", "scoring", "serving",
    "distillation", "config", "runs", "memory", "recipes", "cli", "__main__",
)  # fmt: skip
"""A room imports rooms before it, and the ground."""
WITHOUT_TORCH = ("config.schema", "config.parsing", "cli", "serving.onnx_scorer", "retrieval.retrieval_index")
"""Modules that import neither torch nor Transformers, and so nothing that does."""
EQUAL_LINES = 12


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    """Each module of the package, and those that it imports, also inside functions."""
    found = grimp.build_graph("llmrec_peft", cache_dir=None)
    modules = sorted(name for name in found.modules if name != "llmrec_peft")
    return {name: found.find_modules_directly_imported_by(name) - {"llmrec_peft"} for name in modules}


def room_of(module: str) -> str:
    return module.split(".")[1]


def test_rooms_import_rooms_before_them(graph):
    names = [*GROUND, *ROOMS]
    assert {room_of(module) for module in graph} == set(names)
    backwards = {
        f"{module} imports {other}"
        for module, others in graph.items()
        for other in others
        if room_of(module) in ROOMS
        and room_of(other) != room_of(module)
        and names.index(room_of(other)) > names.index(room_of(module))
    }
    assert not backwards
    above = {module: others for module, others in graph.items() if room_of(module) in GROUND}
    assert not {other for others in above.values() for other in others if room_of(other) not in GROUND}


def test_contributing_names_the_rooms_in_their_order():
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    listed = text.partition("**Imports go one way:**")[2].partition(". The")[0]
    assert re.findall(r"`(\w+)`", listed) == [room for room in ROOMS if room != "__main__"]


def test_no_file_is_in_a_circle(graph):
    assert len(graph) > 100 and sum(map(len, graph.values())) > 300
    graphlib.TopologicalSorter(graph).prepare()  # CycleError names the files


def test_no_two_files_have_one_name():
    counts = collections.Counter(path.name for path in PACKAGE.rglob("*.py") if not path.name.startswith("__"))
    assert not [name for name, count in counts.items() if count > 1]


def test_modules_that_serve_import_no_torch():
    script = "import importlib, sys\n" + "".join(
        f"importlib.import_module('llmrec_peft.{name}')\n" for name in WITHOUT_TORCH
    )
    script += "print(sorted({'torch', 'transformers', 'peft'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def runs_of(lines: list[tuple[int, str]]) -> dict[tuple[str, ...], int]:
    """Each run of `EQUAL_LINES` lines, and the number of its first line."""
    texts = [text for _, text in lines]
    return {
        tuple(texts[start : start + EQUAL_LINES]): lines[start][0] for start in range(len(texts) - EQUAL_LINES, -1, -1)
    }


def code_lines(path: Path) -> list[tuple[int, str]]:
    """Number and text of each line that is neither blank nor of an import, without its indentation."""
    text = path.read_text("utf-8")
    imports = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Import | ast.ImportFrom)]
    skipped = {number for node in imports for number in range(node.lineno, node.end_lineno + 1)}
    lines = enumerate(text.splitlines(), 1)
    return [(number, line.strip()) for number, line in lines if line.strip() and number not in skipped]


def test_nothing_is_written_twice():
    seen: dict[tuple[str, ...], str] = {}
    twice = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for run, number in runs_of(code_lines(path)).items():
            place = f"{path.relative_to(ROOT)}:{number}"
            if run in seen:
                twice.append(f"{place} is {seen[run]}")
            seen.setdefault(run, place)
    assert not twice
