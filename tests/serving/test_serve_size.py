"""What serving takes on the disk, as the benchmark measured it and the page says it."""

import json

from tests.conftest import ROOT


def test_the_page_has_the_measured_sizes():
    result = json.loads((ROOT / "benchmarks" / "results" / "serve_size.json").read_text("utf-8"))
    assert result["extras"]["serve"]["mb"] < result["limit_mb"] == 150
    page = (ROOT / "docs" / "deploying.md").read_text("utf-8")
    for extra, found in result["extras"].items():
        (row,) = [line for line in page.splitlines() if line.startswith(f"| `llmrec-peft[{extra}]`")]
        assert row.endswith(f"| {found['mb']:.0f} |")
