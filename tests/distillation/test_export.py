"""Verification of an export against torch, and the checks before work starts."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch

from llmrec_peft import Domain, Scorer
from llmrec_peft.checkpoints.loading import load_classifier, load_trained
from llmrec_peft.data.collator import StreamCollator
from llmrec_peft.data.streams import build_streams
from llmrec_peft.distillation import export as export_module
from llmrec_peft.distillation.distill_options import LossOptions, StudentOptions
from llmrec_peft.distillation.export import export_onnx
from llmrec_peft.distillation.item_id_student import write_item_id_student
from llmrec_peft.distillation.quantise import quantise
from llmrec_peft.distillation.student_checkpoint import StudentMetadata, save_student
from llmrec_peft.errors import BundleError, DataError, ModelError
from llmrec_peft.merging.merge_bundle import merge_bundle
from llmrec_peft.models.predict import predict
from llmrec_peft.serving import OnnxScorer
from tests.support.domains import DOMAINS, items  # noqa: F401
from tests.support.requests import HISTORY, MOVIES

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # PEFT's own call
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]


def test_serving_json_holds_the_measurements(exported):
    _, onnx, measured = exported
    manifest = json.loads((onnx / "serving.json").read_text("utf-8"))
    assert manifest["measured"] == {key: value for key, value in measured.items() if key != "seconds"}
    assert 0 < measured["float32"]["max_difference"] <= measured["tolerance"] == 1e-4 * max(1, measured["spread"])
    assert measured["float32"]["mean_difference"] < measured["int8"]["mean_difference"]
    assert measured["auc"] is measured["int8"]["auc"] is None  # synthetic labels
    assert manifest["opset"] == 18 and manifest["metrics"] == {"test": {"auc": 0.7}}
    card = (onnx / "README.md").read_text("utf-8")
    assert f"{measured['int8']['max_difference']:.2g}" in card and "auc 0.7000" in card
    assert sorted(path.name for path in onnx.iterdir()) == [
        "README.md", "model.int8.onnx", "model.onnx", "serving.json", "tokenizer.json",
    ]  # fmt: skip
    for name in ("model.onnx", "model.int8.onnx"):  # the exporter's notes name this machine's files
        assert b".py" not in (onnx / name).read_bytes()


def test_int8_is_smaller_and_predicts_nearly_the_same(exported, items):  # noqa: F811
    _, onnx, measured = exported
    whole, small = (OnnxScorer.load(onnx, items.to_pylist(), precision=name) for name in ("float32", "int8"))
    difference = np.abs(whole.score(HISTORY, MOVIES) - small.score(HISTORY, MOVIES))
    assert 0 < difference.mean() < 0.1
    assert measured["int8"]["bytes"] < 0.7 * measured["float32"]["bytes"]


def test_blocks_keep_one_huge_token_from_ruining_the_others(tmp_path):
    """The first token of an LLM has huge activations: one scale a tensor rounds all other tokens to zero."""
    import onnx
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(0)
    x, inner, head = (rng.normal(size=size).astype(np.float32) for size in ((9, 64), (64, 64), (64, 2)))
    x[0] *= 1000
    made = [numpy_helper.from_array(inner, "inner"), numpy_helper.from_array(head, "head")]
    nodes = [
        helper.make_node("MatMul", ["x", "inner"], ["hidden"], name="one"),
        helper.make_node("MatMul", ["hidden", "head"], ["logits"], name="two"),
    ]
    ends = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [9, size]) for name, size in (("x", 64), ("logits", 2))
    )
    first, last = ends
    graph = helper.make_graph(nodes, "layer", [first], [last], made)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), tmp_path / "a.onnx")
    wanted, error = (x @ inner @ head)[1:], {}
    for blocks in (True, False):
        quantise(tmp_path / "a.onnx", tmp_path / "b.onnx", blocks=blocks)
        session = onnxruntime.InferenceSession(tmp_path / "b.onnx", providers=["CPUExecutionProvider"])
        error[blocks] = np.abs(session.run(None, {"x": x})[0][1:] - wanted).mean() / wanted.std()
    assert error[True] < 0.02 < 0.5 < error[False]


@pytest.mark.slow
def test_a_student_of_item_ids(tmp_path, items):  # noqa: F811
    domain = Domain.from_dict(DOMAINS["movies"]).of_ids(4, 6)
    options = StudentOptions(kind="ids", width=16, heads=2)
    write_item_id_student(items.column("item_id"), domain, options, 0, tmp_path / "start")
    classifier = load_classifier(str(tmp_path / "start"), domain, "full")
    torch.manual_seed(1)
    with torch.no_grad():
        for value in classifier.parameters():
            value.add_(0.2 * torch.randn(value.shape))
    save_student(tmp_path / "student", classifier, domain.to_dict(), StudentMetadata(options, LossOptions()))
    export_onnx(tmp_path / "student", tmp_path / "onnx")
    expected = Scorer.load(tmp_path / "student", items)
    for table in (None, items.to_pylist()):
        found = OnnxScorer.load(tmp_path / "onnx", table)
        for history in ([], HISTORY, HISTORY * 6):
            np.testing.assert_allclose(found.score(history, MOVIES), expected.score(history, MOVIES), atol=1e-4)
    with pytest.raises(DataError, match="'item zz' is unknown to this model of item ids"):
        OnnxScorer.load(tmp_path / "onnx").score(HISTORY, ["zz"])
    grown = OnnxScorer.load(tmp_path / "onnx", [*items.to_pylist(), {"item_id": "zz", "title": "New"}])
    with pytest.raises(DataError, match="'item zz' is unknown to this model of item ids"):
        grown.score([("zz", "like"), *HISTORY], MOVIES)


def test_auc_is_stated_where_labels_are_real(exported, small_log, tmp_path):
    from sklearn.metrics import roc_auc_score

    loaded = load_trained(exported[0])
    streams = build_streams(small_log().split().test, Domain.from_dict(DOMAINS["movies"]), loaded.tokenizer)
    measured = export_onnx(exported[0], tmp_path / "out", streams=streams)
    collator = StreamCollator(loaded.tokenizer.pad_token_id, 500)
    predictions = predict(loaded.classifier, streams, collator, batch_tokens=500)
    expected = roc_auc_score(predictions.labels, predictions.logits[:, 1] - predictions.logits[:, 0])
    assert measured["auc"] == pytest.approx(expected, abs=1e-9)
    assert measured["float32"]["auc"] == pytest.approx(expected, abs=1e-3)
    assert measured["int8"]["auc"] == pytest.approx(expected, abs=0.1)
    assert measured["int8"]["auc"] != measured["auc"]  # of its own predictions
    card = (tmp_path / "out" / "README.md").read_text("utf-8")
    assert f"AUC of torch: {expected:.4f}." in card and f"| {measured['int8']['auc']:.4f} |" in card


def test_streams_of_another_domain_or_tokenizer_are_refused(exported, small_log, tmp_path):
    tokenizer = load_trained(exported[0]).tokenizer
    more = copy.deepcopy(tokenizer)
    more.add_tokens(["brand new"])
    other = Domain.from_dict({**DOMAINS["movies"], "outcomes": {"skip": " no\n", "click": " yes\n"}})
    split = small_log().split().test
    for domain, words, message in (
        (Domain.from_dict(DOMAINS["movies"]), more, "made with another tokenizer than student"),
        (other, tokenizer, r"labels \['skip', 'click'\] were made for another domain"),
    ):
        with pytest.raises(BundleError, match=message):
            export_onnx(exported[0], tmp_path / "out", streams=build_streams(split, domain, words))
    with pytest.raises(ModelError, match="tolerance must be a finite number of at least 0, not -1"):
        export_onnx(exported[0], tmp_path / "out", tolerance=-1)
    assert not list(tmp_path.iterdir())


def test_an_opset_that_the_runtime_lacks(exported, tmp_path):
    for opset in (99, 17, "18"):
        with pytest.raises(ModelError, match=rf"opset must be from 18.* to \d+.*got {opset!r}"):
            export_onnx(exported[0], tmp_path / "out", opset=opset)
    assert not list(tmp_path.iterdir())


def test_an_export_that_differs_leaves_nothing(exported, tmp_path, monkeypatch):
    """A graph of other weights stands in for a faulty exporter."""

    def write(_classifier, path, _opset):
        path.write_bytes((exported[1] / "model.int8.onnx").read_bytes())

    monkeypatch.setattr(export_module, "write_graph", write)
    with pytest.raises(BundleError, match="differs from torch: logits differ by"):
        export_onnx(exported[0], tmp_path / "out", int8=False)
    assert not list(tmp_path.iterdir())


def test_models_that_cannot_be_exported_are_refused(exported, bundle_of, tmp_path):
    merged = exported[0]
    with pytest.raises(BundleError, match="is not a merged model"):
        export_onnx(bundle_of(), tmp_path / "out")
    encoder = tmp_path / "encoder"
    merge_bundle(bundle_of("full", kind="bert"), encoder)
    with pytest.raises(ModelError, match="is a bidirectional encoder"):
        export_onnx(encoder, tmp_path / "out")
    with pytest.raises(BundleError, match="the student itself"):
        export_onnx(merged, merged)
    other = tmp_path / "other"
    other.mkdir()
    (other / "mine.txt").write_text("x")
    with pytest.raises(BundleError, match="holds no export"):
        export_onnx(merged, other)
    assert not (tmp_path / "out").exists()
