"""Bundles from before the domain's key `duplicates`: they are measured on every row, as they were trained.

What fails the same way: evaluating, fusing, recommending and distilling with such a bundle or a merged model of it; all
of them read the domain by `Domain.of_manifest`.
"""

from __future__ import annotations

import ast

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from llmrec_peft import Domain, Scorer, load_classifier
from llmrec_peft.checkpoints.bundle import save_bundle
from tests.conftest import ROOT

DOMAIN = {
    "name": "movies",
    "event": "{title}",
    "outcomes": {"dislike": " no\n", "like": " yes\n"},
    "label": {"column": "rating", "above": 3},
    "stream": {"context": 3, "targets": 4, "max_length": 400},
}


@pytest.mark.parametrize("old", [True, False])
def test_a_bundle_without_the_key_predicts_every_row(recipe, tiny_base, small_tables, tmp_path, old):
    interactions, items = small_tables
    repeated = pa.concat_tables([interactions, interactions])
    log = tmp_path / "log"
    log.mkdir()
    for table, name in ((repeated, "interactions"), (items, "items")):
        pq.write_table(table, log / f"{name}.parquet")
    domain = Domain.from_dict(DOMAIN)
    torch.manual_seed(0)
    classifier = load_classifier(str(tiny_base()), domain, "lora")
    content = {name: value for name, value in domain.to_dict().items() if not (old and name == "duplicates")}
    save_bundle(tmp_path / "bundle", classifier, classifier.tokenizer, content)
    assert Scorer.load(tmp_path / "bundle", items).domain.duplicates == ("keep" if old else "drop")
    out = tmp_path / "out"
    recipe("evaluate")(["--bundle", str(tmp_path / "bundle"), "--data.path", str(log), "--output_dir", str(out)])
    found = pq.read_table(out / "predictions.parquet").to_pandas()
    events = found[["user_id", "item_id", "timestamp"]]
    assert len(events) and len(events) == (2 if old else 1) * len(events.drop_duplicates())


def test_no_manifest_is_read_past_the_rule():
    """`Domain.from_dict` is for domain files and settings; a manifest's domain goes through `of_manifest`."""
    found = []
    for path in sorted((ROOT / "llmrec_peft").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "Domain.from_dict":
                found.append(path.name)
    assert set(found) <= {"parsing.py", "domain.py"}
