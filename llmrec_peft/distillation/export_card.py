"""README.md of an export."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmrec_peft.checkpoints.card_markdown import code

_HEAD = [
    "---", "library_name: onnx", "pipeline_tag: text-classification",
    "tags: [llmrec_peft, recommendation, onnx]", "---", "",
]  # fmt: skip
_USE = [
    "## Use", "", "```python",
    "from llmrec_peft.serving import OnnxScorer", "", 'scorer = OnnxScorer.load("DIRECTORY", items="items.csv")',
    "print(scorer.labels, scorer.score([], [\"ITEM\"]))", "```", "",
    "`pip install llmrec-peft[serve]`, or `[serve-text]` where items are texts; torch is not needed. The graph alone "
    "gives uncalibrated logits: temperature and biases are in `serving.json`.", "",
]  # fmt: skip


def export_card(entries: Mapping[str, Any]) -> str:
    """Markdown from the entries of serving.json; untrusted text appears only as a Python literal in code marks."""
    labels = ", ".join(_code(label) for label in entries["labels"])
    versions = ", ".join(f"{name} {version}" for name, version in entries["versions"].items())
    lines = [
        *_HEAD,
        f"# {_code(entries['domain']['name'])}: behaviour classifier, exported to ONNX",
        "",
        f"It reads a user's events in order and predicts which of {labels} comes next. Opset {entries['opset']}; "
        "batch, length and number of markers are dynamic.",
        "",
        *_USE,
        *_comparison(entries["measured"]),
        *_metrics(entries["metrics"]),
        f"Written with {versions}.",
        "",
    ]
    return "\n".join(lines)


def _comparison(measured: Mapping[str, Any]) -> list[str]:
    """The differences of each graph from torch."""
    rows = [
        f"| {precision} | {found['bytes'] / 1e6:.2f} | {found['max_difference']:.2g} | {found['mean_difference']:.2g} |"
        f" {found['mean_probability']:.2g} | {_auc(found['auc'])} |"
        for precision, found in ((name, measured.get(name)) for name in ("float32", "int8"))
        if found
    ]
    return [
        "## Compared with torch", "",
        f"{measured['answers']} predictions on {_code(measured['streams'])}; the standard deviation of their logits is "
        f"{measured['spread']:.3g}. float32 may differ by {measured['tolerance']:.2g}. AUC of torch: "
        f"{_auc(measured['auc'])}.", "",
        "| precision | MB | largest difference of a logit | mean difference | mean difference of a probability | AUC |",
        "| --- | --- | --- | --- | --- | --- |", *rows, "",
    ]  # fmt: skip


def _metrics(metrics: Mapping[str, Any]) -> list[str]:
    """Metrics that training left in the student's manifest, if there are any."""
    rows = [
        f"| {split} | {', '.join(f'{key} {value:.4f}' for key, value in values.items() if isinstance(value, float))} |"
        for split, values in metrics.items()
        if split in ("valid", "test") and isinstance(values, Mapping)
    ]
    if not rows:
        return []
    head = ["## Metrics", "", "Of the student in torch, before the export.", "", "| split | |", "| --- | --- |"]
    return [*head, *rows, ""]


def _auc(auc: float | None) -> str:
    return "not measured" if auc is None else f"{auc:.4f}"


def _code(value: Any) -> str:
    """A value as a text in code marks, which may stand in a table."""
    return code(str(value)).replace("|", r"\|")
