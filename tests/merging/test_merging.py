"""Merging: the written checkpoint answers as the bundle did, by stock classes too, and nothing else is ever left."""

from __future__ import annotations

import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from llmrec_peft.checkpoints.bundle import save_bundle
from llmrec_peft.checkpoints.loading import LoadOptions, load_classifier, load_trained
from llmrec_peft.checkpoints.manifest import read_manifest
from llmrec_peft.checkpoints.manifest_schema import ADAPTER, MANIFEST, MERGED
from llmrec_peft.data.domain import Domain
from llmrec_peft.data.streams import build_streams
from llmrec_peft.errors import BundleError, ModelError
from llmrec_peft.merging import merge_bundle as merge_module
from llmrec_peft.merging.merge_bundle import MergeOptions, merge_bundle
from llmrec_peft.merging.synthetic_inputs import CANDIDATES, EVENTS, WINDOWS, SyntheticStreams
from llmrec_peft.models.base_weights import base_fingerprint
from llmrec_peft.models.stock_parts import head_of
from tests.conftest import ROOT
from tests.support.bundles import DOMAIN, answers, edit, edit_manifest, stock_answers, write_bundle
from tests.support.pairwise import diagonal

KINDS = ("llama", "qwen2", "mistral", "gpt2", "bert")
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # PEFT's own call
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]


def files_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def check_merged(bundle: Path, merged: Path, base: Path, atol: float = 2e-5) -> None:
    """Adapted, merged and stock answers agree, and are not those of the base with the same head."""
    adapted = load_trained(bundle)
    expected = answers(adapted)
    assert torch.allclose(answers(merged), expected, atol=atol)
    assert torch.allclose(stock_answers(merged), expected, atol=atol)
    head = load_classifier(str(base), DOMAIN, "head").model
    trained = head_of(adapted.classifier.stock).state_dict()
    trained = {name: value for name, value in trained.items() if "original_module" not in name}
    trained = {name.removeprefix("modules_to_save.default."): value for name, value in trained.items()}
    head_of(head).load_state_dict(trained)
    plain = load_trained(merged)
    plain.classifier.model = head
    assert not torch.allclose(answers(plain), expected, atol=0.05)


# -- equality ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "method"), diagonal(KINDS, ("lora", "full", "qlora")))
def test_merged_predicts_as_adapted_and_not_as_the_base(kind, method, tiny_base, tmp_path):
    bundle = write_bundle(tmp_path / "bundle", tiny_base(kind), method)
    found = merge_bundle(bundle, tmp_path / "merged")
    assert found["max_difference"] <= 2e-5 and 0 <= found["mean_difference"] <= found["max_difference"]
    assert found["spread"] > 0.1, "answers that hardly differ from each other would agree whatever the weights"
    check_merged(bundle, tmp_path / "merged", tiny_base(kind))


@pytest.mark.parametrize(
    ("kind", "method", "options"),
    [
        ("llama", "lora", {"dora": True}),
        ("gpt2", "lora", {"dora": True}),
        ("llama", "lora", {"rslora": True, "r": 4}),
        ("llama", "lora", {"init": "pissa", "r": 4}),
        ("gpt2", "lora", {"init": "pissa_niter_4", "r": 4}),
        ("llama", "lora", {"init": "olora", "r": 4, "rslora": True}),
        ("llama", "lora", {"layers": [1], "target_modules": ["q_proj", "down_proj"]}),
        ("llama", "lora", {"target_modules": ["embed_tokens", "v_proj"]}),
        ("gpt2", "lora", {"bias": "all"}),
        ("qwen2", "lora", {"bias": "lora_only"}),
        ("bert", "lora", {"bias": "all", "dora": True}),
        ("llama", "qlora", {"dora": True}),
        ("gpt2", "qlora", {"dora": True}),
        ("llama", "qlora", {"init": "loftq", "r": 4}),
        ("llama", "qlora", {"layers": [0], "target_modules": ["v_proj"], "quant_type": "fp4", "double_quant": False}),
        ("qwen2", "qlora", {"bias": "all"}),
    ],
)
def test_variants(kind, method, options, tiny_base, tmp_path):
    bundle = write_bundle(tmp_path / "bundle", tiny_base(kind), method, **options)
    assert merge_bundle(bundle, tmp_path / "merged")["max_difference"] <= 5e-5
    check_merged(bundle, tmp_path / "merged", tiny_base(kind), atol=5e-5)


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_head_alone(kind, tiny_base, tmp_path):
    bundle = write_bundle(tmp_path / "bundle", tiny_base(kind), "head")
    found = merge_bundle(bundle, tmp_path / "merged")
    assert found["max_difference"] == 0
    assert torch.allclose(answers(tmp_path / "merged"), answers(bundle), atol=1e-6)
    assert torch.allclose(stock_answers(tmp_path / "merged"), answers(bundle), atol=1e-5)


def test_weights_are_those_that_peft_merges(tiny_base, tmp_path):
    bundle = write_bundle(tmp_path / "bundle", tiny_base("llama"), r=4)
    merge_bundle(bundle, tmp_path / "merged")
    stock = AutoModelForSequenceClassification.from_pretrained(tiny_base("llama"), num_labels=2, dtype=torch.float32)
    theirs = PeftModel.from_pretrained(stock, bundle).merge_and_unload().state_dict()
    ours = load_file(tmp_path / "merged" / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_quantised_weights_are_those_that_the_bundle_computes_with(tiny_base, tmp_path):
    """Merged into the base's own weights instead, the answers would be others by more than the adapter changes."""
    bundle = write_bundle(tmp_path / "bundle", tiny_base("llama"), "qlora", scale=0.01)
    merge_bundle(bundle, tmp_path / "merged")
    unquantised = write_bundle(tmp_path / "other", tiny_base("llama"), "lora", scale=0.01)
    assert torch.allclose(answers(tmp_path / "merged"), answers(bundle), atol=1e-5)
    assert not torch.allclose(answers(unquantised), answers(bundle), atol=0.02)
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())


@pytest.mark.parametrize("method", ["lora", "full", "qlora"])
def test_bfloat16(method, tiny_base, tmp_path):
    bundle = write_bundle(tmp_path / "bundle", tiny_base("llama"), method)
    found = merge_bundle(bundle, tmp_path / "merged", MergeOptions(dtype="bfloat16"))
    tensors = load_file(tmp_path / "merged" / "model.safetensors")
    head = tensors.pop("score.weight")
    assert {value.dtype for value in tensors.values()} == {torch.bfloat16} and head.dtype == torch.float32
    assert not torch.equal(head, head.bfloat16().float())
    loaded = load_trained(tmp_path / "merged").classifier
    assert loaded.stock.dtype == torch.bfloat16 and torch.equal(loaded.head.weight, head)
    assert 1e-5 < found["max_difference"] <= found["tolerance"]
    assert found["bytes"] == sum(v.nbytes for v in tensors.values()) + head.nbytes
    # In float32 the rounded weights answer with less noise than bfloat16 arithmetic adds.
    whole = load_trained(tmp_path / "merged", LoadOptions(dtype="float32"))
    assert torch.allclose(answers(whole), answers(bundle), atol=found["tolerance"])
    assert torch.equal(whole.classifier.head.weight, head)
    assert torch.allclose(stock_answers(tmp_path / "merged", dtype=torch.float32), answers(whole), atol=1e-5)
    assert torch.allclose(stock_answers(tmp_path / "merged"), answers(bundle), atol=found["tolerance"])


def test_tolerance_follows_the_formats(tiny_base, tmp_path):
    base = tiny_base("llama")
    whole, half = (
        write_bundle(tmp_path / kind, base, "qlora", r=4, compute_dtype=kind) for kind in ("float32", "bfloat16")
    )
    found = merge_bundle(whole, tmp_path / "merged", MergeOptions(dtype="float32"))
    assert found["tolerance"] == 1e-3 * max(1, found["spread"])
    found = merge_bundle(half, tmp_path / "merged", MergeOptions(dtype="float32"))
    assert found["tolerance"] == 0.25 * max(1, found["spread"]) and found["max_difference"] > 1e-3


def test_sums_are_rounded_once(tiny_base, tmp_path):
    """A bundle trained on a bfloat16 base: the update is added in float32, not to weights in bfloat16."""
    bundle = write_bundle(tmp_path / "bundle", tiny_base("llama"), r=4, scale=0.02, dtype="bfloat16")
    merge_bundle(bundle, tmp_path / "half")
    merge_bundle(bundle, tmp_path / "whole", MergeOptions(dtype="float32"))
    half, whole = (load_file(tmp_path / name / "model.safetensors") for name in ("half", "whole"))
    assert half["model.norm.weight"].dtype == torch.bfloat16 and whole["model.norm.weight"].dtype == torch.float32
    assert all(torch.equal(half[name], whole[name].to(half[name].dtype)) for name in half)


def test_a_base_in_bfloat16_on_disk(tiny_base, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(tiny_base("llama"), base)
    tensors = {name: value.bfloat16() for name, value in load_file(base / "model.safetensors").items()}
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    edit(base / "config.json", lambda config: config.update(dtype="bfloat16"))
    bundle = write_bundle(tmp_path / "bundle", base)
    assert merge_bundle(bundle, tmp_path / "merged")["max_difference"] <= 2e-5
    assert torch.allclose(stock_answers(tmp_path / "merged"), answers(bundle), atol=2e-5)


def test_shards(tiny_base, tmp_path):
    bundle = write_bundle(tmp_path / "bundle", tiny_base("llama"))
    merge_bundle(bundle, tmp_path / "one")
    merge_bundle(bundle, tmp_path / "many", MergeOptions(max_shard_size="20KB"))
    shards = sorted((tmp_path / "many").glob("model-*.safetensors"))
    assert len(shards) > 2 and (tmp_path / "many" / "model.safetensors.index.json").is_file()
    fingerprints = [read_manifest(tmp_path / name)["weights"] for name in ("one", "many")]
    assert fingerprints[0] == fingerprints[1]
    assert torch.equal(answers(tmp_path / "many"), answers(tmp_path / "one"))
    assert torch.equal(stock_answers(tmp_path / "many"), stock_answers(tmp_path / "one"))
    shards[0].unlink()
    with pytest.raises(BundleError, match=f"has no {shards[0].name}"):
        load_trained(tmp_path / "many")


def test_a_second_run_is_equal_to_the_bit(tiny_base, tmp_path):
    bundle = write_bundle(tmp_path / "bundle", tiny_base("llama"), "qlora")
    merge_bundle(bundle, tmp_path / "first")
    torch.manual_seed(99)
    merge_bundle(bundle, tmp_path / "second")
    assert files_of(tmp_path / "first") == files_of(tmp_path / "second")


# -- what is written ---------------------------------------------------------------------------


def test_manifest_and_config_follow_the_contract(tiny_base, tmp_path):
    calibration = {"temperature": 1.5, "bias": [0.0, 0.1]}
    bundle = write_bundle(tmp_path / "bundle", tiny_base("llama"), calibration=calibration)
    found = merge_bundle(bundle, tmp_path / "merged")
    source, manifest = read_manifest(bundle), read_manifest(tmp_path / "merged")
    assert manifest["format_version"] == 1 and manifest["kind"] == "merged" and manifest["combination"] is None
    weights = source["files"]["adapter_model.safetensors"]
    assert manifest["merged_from"] == [{"name": "movies", "method": "lora", "weights_sha256": weights, "weight": 1.0}]
    for key in ("base", "domain", "labels", "words", "stream", "calibration", "counts", "metrics", "tokenizer"):
        assert manifest[key] == source[key], key
    assert manifest["calibration"] == calibration and manifest["dtype"] == "float32"
    measured = {key: found[key] for key in manifest["measured"]}
    assert manifest["measured"] == measured and {"max_difference", "mean_difference", "answers"} <= measured.keys()
    assert measured["streams"] == "samples" and measured["auc_adapted"] is None
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["id2label"] == {"0": "dislike", "1": "like"} and config["label2id"] == {"dislike": 0, "like": 1}
    assert config["problem_type"] == "single_label_classification" and config["pad_token_id"] == 1
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    assert str(tiny_base("llama")) not in json.dumps(config)
    stock = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert stock.config.num_labels == 2
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").pad_token == "<|pad|>"
    card = (tmp_path / "merged" / "README.md").read_text("utf-8")
    assert "library_name: transformers" in card and "largest difference of a logit" in card
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "merged").iterdir()}
    assert set(modes.values()) == {0o644}, modes
    assert (tmp_path / "merged").stat().st_mode & 0o777 == 0o755


def test_loaded_merged_model(tiny_base, tmp_path):
    bundle = write_bundle(tmp_path / "bundle", tiny_base("llama"))
    merge_bundle(bundle, tmp_path / "merged")
    loaded = load_trained(tmp_path / "merged")
    classifier = loaded.classifier
    assert classifier.method == "merged" and classifier.labels == ["dislike", "like"] and not classifier.training
    assert not any(value.requires_grad for value in classifier.parameters())
    assert loaded.domain == DOMAIN and loaded.manifest == read_manifest(tmp_path / "merged")
    assert load_trained(bundle).classifier.method == "lora" and read_manifest(bundle) == read_manifest(bundle)
    with pytest.raises(BundleError, match="does not know its options"):
        save_bundle(tmp_path / "again", classifier, loaded.tokenizer, DOMAIN)
    with pytest.raises(BundleError, match="holds its base's weights already"):
        load_trained(tmp_path / "merged", LoadOptions(base="other"))


def test_a_tokenizer_without_a_pad_token_gets_one_that_is_saved(tiny_base, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(tiny_base("llama"), base)
    edit(base / "tokenizer_config.json", lambda config: config.pop("pad_token"))
    bundle = write_bundle(tmp_path / "bundle", base)
    merge_bundle(bundle, tmp_path / "merged")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert tokenizer.pad_token == "<|endoftext|>"
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["pad_token_id"] == tokenizer.pad_token_id
    assert torch.allclose(stock_answers(tmp_path / "merged"), answers(bundle), atol=2e-5)


# -- what is compared---------------------------------------------------------------------------


def test_synthetic_streams_have_history_several_predictions_and_candidates(tiny_tokenizer):
    domain = Domain.from_dict(DOMAIN | {"header": "Viewer {name}, {age:d}:\n", "stream": {"max_length": 512}})
    inputs = SyntheticStreams(domain, tiny_tokenizer)
    again = SyntheticStreams(domain, tiny_tokenizer)
    assert len(inputs) == WINDOWS and max(inputs.lengths) <= 384
    whole = [stream for stream in inputs if len(stream.markers) == EVENTS + CANDIDATES]
    assert whole and all((stream.segment[stream.markers] > 0).sum() == CANDIDATES for stream in whole)
    texts = [tiny_tokenizer.decode(stream.input_ids) for stream in inputs]
    assert texts == [tiny_tokenizer.decode(stream.input_ids) for stream in again] and len(set(texts)) == WINDOWS
    assert all(text.startswith("Viewer ") and text.count(" ->") >= 2 for text in texts)
    targets = [number for stream in inputs for number in stream.targets]
    assert targets == list(range(len(targets)))
    alone = SyntheticStreams(domain, tiny_tokenizer, independent=True)
    assert len(alone) == len(targets) and all(len(stream.markers) == 1 for stream in alone)
    short = SyntheticStreams(Domain.from_dict(DOMAIN | {"stream": {"max_length": 60}}), tiny_tokenizer)
    assert max(short.lengths) <= 60


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_streams_of_a_log_give_auc_of_both(kind, small_log, tiny_base, tiny_tokenizer, tmp_path):
    domain = DOMAIN | {"event": "{title}", "stream": {"context": 3, "targets": 5, "max_length": 400}}
    bundle = write_bundle(tmp_path / "bundle", tiny_base(kind), domain=domain)
    splits = small_log().split(by="time", valid=0.2, test=0.2)
    streams = build_streams(splits.test, Domain.from_dict(domain), tiny_tokenizer)
    found = merge_bundle(bundle, tmp_path / "merged", MergeOptions(streams=streams))
    assert found["answers"] == streams.num_targets and found["streams"] == "test of small"
    assert 0 < found["auc_adapted"] < 1 and found["auc_merged"] == pytest.approx(found["auc_adapted"], abs=1e-6)
    assert read_manifest(tmp_path / "merged")["measured"]["auc_merged"] == found["auc_merged"]


def test_auc_is_of_each_models_own_predictions(small_log, tiny_base, tiny_tokenizer, tmp_path, monkeypatch):
    """Negated logits of the merged model give one minus the AUC."""
    domain = DOMAIN | {"event": "{title}", "stream": {"context": 3, "targets": 5, "max_length": 400}}
    bundle = write_bundle(tmp_path / "bundle", tiny_base("llama"), domain=domain)
    splits = small_log().split(by="time", valid=0.2, test=0.2)
    streams = build_streams(splits.valid, Domain.from_dict(domain), tiny_tokenizer)
    original = merge_module.unload

    def turned(classifier, dtype):
        model = original(classifier, dtype)
        model.score.weight.data.neg_()
        return model

    monkeypatch.setattr(merge_module, "unload", turned)
    found = merge_bundle(bundle, tmp_path / "merged", MergeOptions(streams=streams, tolerance=1e3))
    assert found["auc_merged"] == pytest.approx(1 - found["auc_adapted"], abs=1e-6)
    assert abs(found["auc_merged"] - 0.5) > 0.01


# -- refusals ----------------------------------------------------------------------------------


@pytest.fixture
def bundle(tiny_base, tmp_path):
    return write_bundle(tmp_path / "bundle", tiny_base("llama"), r=4)


@pytest.fixture
def merged(bundle, tmp_path):
    merge_bundle(bundle, tmp_path / "merged")
    return tmp_path / "merged"


def names_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.parametrize(("factor", "tolerance"), [(1.1, None), (1 + 1e-5, 1e-7)])
def test_predictions_that_differ_are_refused_and_leave_nothing(factor, tolerance, bundle, tmp_path, monkeypatch):
    original = merge_module.unload

    def wrong(classifier, dtype):
        model = original(classifier, dtype)
        model.model.layers[1].mlp.down_proj.weight.data.mul_(factor)
        return model

    monkeypatch.setattr(merge_module, "unload", wrong)
    with pytest.raises(BundleError, match=r"logits differ by [\d.e-]+ at most and .* over the tolerance [\d.e-]+"):
        merge_bundle(bundle, tmp_path / "merged", MergeOptions(tolerance=tolerance))
    assert names_in(tmp_path) == ["bundle"]


def test_differences_are_looked_for_in_what_was_written(bundle, tmp_path, monkeypatch):
    """The model in memory is right, and its file is not."""
    original = merge_module.save_merged

    def spoilt(scratch, model, *args, **kwargs):
        model.score.weight.data.mul_(1.5)
        original(scratch, model, *args, **kwargs)
        model.score.weight.data.div_(1.5)

    monkeypatch.setattr(merge_module, "save_merged", spoilt)
    with pytest.raises(BundleError, match="differs from what it was merged from"):
        merge_bundle(bundle, tmp_path / "merged")
    assert names_in(tmp_path) == ["bundle"]


def test_a_second_merge_is_refused(merged, tmp_path):
    for refused in (
        lambda: merge_bundle(merged, tmp_path / "twice"),
        lambda: load_trained(merged, kind=ADAPTER),
        lambda: read_manifest(merged, ADAPTER),
    ):
        with pytest.raises(BundleError, match=r"merged is a merged model, not a bundle: .* in its weights already"):
            refused()
    assert names_in(tmp_path) == ["bundle", "merged"]


def test_a_bottleneck_adapter_is_refused_with_advice(tiny_base, tmp_path):
    bundle = write_bundle(tmp_path / "bundle", tiny_base("llama"), "adapter", size=4)
    with pytest.raises(BundleError, match="serve it in a DomainBank, train method lora, or distil it"):
        merge_bundle(bundle, tmp_path / "merged")
    assert names_in(tmp_path) == ["bundle"]


def test_a_wrong_base_is_refused(bundle, tiny_base, tmp_path):
    with pytest.raises(BundleError, match="load it on the base that it was trained on"):
        merge_bundle(bundle, tmp_path / "merged", MergeOptions(base=str(tiny_base("mistral"))))
    assert names_in(tmp_path) == ["bundle"]


def test_a_damaged_bundle_is_refused(bundle, tmp_path):
    path = bundle / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(BundleError, match="its header says"):
        merge_bundle(bundle, tmp_path / "merged")
    assert names_in(tmp_path) == ["bundle"]


def test_what_is_no_bundle_is_refused(tmp_path):
    with pytest.raises(BundleError, match="name the directory `bundle` that a training run left"):
        merge_bundle(tmp_path / "none", tmp_path / "merged")


@pytest.mark.parametrize(
    ("settings", "message"), [({"dtype": "int8"}, "float32 or bfloat16"), ({"tolerance": -1.0}, "at least 0")]
)
def test_settings_out_of_range(settings, message, bundle, tmp_path):
    with pytest.raises(ModelError, match=message):
        merge_bundle(bundle, tmp_path / "merged", MergeOptions(**settings))


def test_an_output_that_is_something_else_is_not_replaced(bundle, merged, tiny_base, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    (tmp_path / "file").write_text("keep")
    base = tmp_path / "base"
    shutil.copytree(tiny_base("llama"), base)
    for place, message in (("mine", "holds no merged model"), ("file", "is a file"), ("bundle", "is what is merged")):
        with pytest.raises(BundleError, match=message):
            merge_bundle(bundle, tmp_path / place)
    with pytest.raises(BundleError, match="base is what is merged"):
        merge_bundle(bundle, base, MergeOptions(base=str(base)))
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep"


def test_a_merged_model_is_replaced_and_an_empty_directory_used(bundle, merged, tiny_base, tmp_path):
    before = read_manifest(merged)["weights"]
    other = write_bundle(tmp_path / "other", tiny_base("llama"), seed=6, r=4)
    merge_bundle(other, merged)
    assert read_manifest(merged)["weights"] != before
    assert torch.allclose(answers(merged), answers(other), atol=2e-5)
    (tmp_path / "empty").mkdir()
    merge_bundle(bundle, tmp_path / "empty")
    assert read_manifest(tmp_path / "empty")["weights"] == before
    assert names_in(tmp_path) == ["bundle", "empty", "merged", "other"]


def test_a_refused_merge_leaves_the_old_one(bundle, merged, tmp_path, monkeypatch):
    before = files_of(merged)
    with pytest.raises(BundleError, match="over the tolerance"):
        merge_bundle(bundle, merged, MergeOptions(dtype="bfloat16", tolerance=1e-9))
    assert files_of(merged) == before and names_in(tmp_path) == ["bundle", "merged"]


class TestTampering:
    """A merged model that was edited or damaged is refused with a line that names what differs."""

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda m: m["labels"].reverse(), "has the labels"),
            (lambda m: m["words"].reverse(), "with the words"),
            (lambda m: m["domain"].update(marker=" =>"), "so it was edited"),
            (lambda m: m["domain"].update(outcomes=dict(reversed(m["domain"]["outcomes"].items()))), "has the labels"),
            (lambda m: m.update(calibration={"temperature": 2.0, "bias": None}), "so it was edited"),
            (lambda m: m.update(calibration={"temperature": 0.0, "bias": None}), "finite temperature"),
            (lambda m: m["measured"].update(max_difference=0.0), "so it was edited"),
            (lambda m: m["base"].update(name="other"), "so it was edited"),
            (lambda m: m.update(format_version=2), "format_version 2, and this version reads 1"),
            (lambda m: m.pop("stream"), "no valid entry 'stream'"),
            (lambda m: m.update(kind="fused"), "is not a merged model"),
        ],
    )
    def test_edited_manifest(self, change, message, merged):
        edit_manifest(merged, change)
        with pytest.raises(BundleError, match=message):
            load_trained(merged, kind=MERGED)

    def test_edited_config(self, merged):
        edit(merged / "config.json", lambda config: config.update(rms_norm_eps=1e-3))
        with pytest.raises(BundleError, match="config.json has the SHA-256 .*, but behavior.json says"):
            load_trained(merged, kind=MERGED)

    @pytest.mark.parametrize("where", [-1, -40_000])
    def test_one_changed_weight(self, merged, where):
        path = merged / "model.safetensors"
        content = bytearray(path.read_bytes())
        content[where] ^= 1
        path.write_bytes(content)
        with pytest.raises(BundleError, match="have the fingerprint .*, but behavior.json says"):
            load_trained(merged, kind=MERGED)

    @pytest.mark.parametrize("keep", [0, 5, -1])
    def test_truncated_weights(self, merged, keep):
        path = merged / "model.safetensors"
        path.write_bytes(path.read_bytes()[:keep])
        with pytest.raises(BundleError, match="cut short|its header says"):
            load_trained(merged, kind=MERGED)

    def test_pickle_under_the_weights_name(self, merged):
        torch.save({"score.weight": torch.zeros(2, 32)}, merged / "model.safetensors")
        with pytest.raises(BundleError, match="not a safetensors file"):
            load_trained(merged, kind=MERGED)

    @pytest.mark.parametrize("name", ["pytorch_model.bin", "model-00001-of-00002.safetensors", "a.PKL"])
    def test_extra_weights(self, merged, name):
        (merged / name).write_bytes(pickle.dumps({}))
        with pytest.raises(BundleError, match=f"holds '{name}' beside"):
            load_trained(merged, kind=MERGED)

    def test_link_out(self, merged, tmp_path):
        outside = tmp_path / "outside"
        (merged / "model.safetensors").rename(outside)
        (merged / "model.safetensors").symlink_to(outside)
        with pytest.raises(BundleError, match="model.safetensors is a link out of the merged model"):
            load_trained(merged, kind=MERGED)

    def test_index_that_leaves_the_directory(self, merged):
        (merged / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": {"a": "../outside.safetensors"}})
        )
        with pytest.raises(BundleError, match="no map from tensors to files beside it"):
            load_trained(merged, kind=MERGED)

    def test_another_tokenizer(self, merged):
        edit(merged / "tokenizer.json", lambda content: content.update(normalizer={"type": "Lowercase"}))
        with pytest.raises(BundleError, match="tokenizer of fingerprint"):
            load_trained(merged, kind=MERGED)

    @pytest.mark.parametrize("name", ["behavior.json", "config.json", "model.safetensors"])
    def test_missing_file(self, merged, name):
        (merged / name).unlink()
        with pytest.raises(BundleError, match=name):
            load_trained(merged, kind=MERGED)

    def test_missing_tokenizer(self, merged):
        (merged / "tokenizer.json").unlink()
        (merged / "tokenizer_config.json").unlink()
        with pytest.raises(BundleError, match="tokenizer"):
            load_trained(merged, kind=MERGED)

    @pytest.mark.parametrize("content", [b"{", b"[]"])
    def test_manifest_that_is_no_mapping(self, merged, content):
        (merged / MANIFEST).write_bytes(content)
        with pytest.raises(BundleError, match="not readable JSON|where a mapping belongs"):
            load_trained(merged, kind=MERGED)


# -- a merged model as a base ------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_goes_on_from_a_merged_model_with_its_head(dtype, bundle, tmp_path):
    merge_bundle(bundle, tmp_path / "merged", MergeOptions(dtype=dtype))
    merged = load_trained(tmp_path / "merged").classifier
    further = load_classifier(str(tmp_path / "merged"), DOMAIN, "lora", r=2, dtype=dtype)
    assert further.method == "lora" and any(value.requires_grad for value in further.parameters())
    trained = head_of(further.stock).modules_to_save["default"].weight
    assert trained.requires_grad and torch.equal(trained, merged.head.weight)
    second = write_bundle(tmp_path / "second", tmp_path / "merged", seed=8, r=2, dtype=dtype)
    assert read_manifest(second)["base"]["fingerprint"] == base_fingerprint(tmp_path / "merged")
    found = merge_bundle(second, tmp_path / "both")
    assert found["max_difference"] <= found["tolerance"]
    assert not torch.allclose(answers(tmp_path / "both"), answers(tmp_path / "merged"), atol=0.05)
    with pytest.raises(BundleError, match="is what is merged"):
        merge_bundle(second, tmp_path / "merged")


def test_a_merged_model_of_other_labels_gives_a_new_head(merged):
    other = DOMAIN | {"outcomes": {"dislike": " no\n", "like": " yes\n", "love": " buy\n"}}
    further = load_classifier(str(merged), other, "head")
    assert further.head.weight.shape == (3, 32)


# -- when writing ends early -------------------------------------------------------------------


@contextmanager
def file_size_limit(size: int):
    """Writes beyond `size` bytes of one file fail with a real error of the system."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [30_000, 120_000])
def test_a_write_that_fails_leaves_nothing(size, bundle, tmp_path):
    with file_size_limit(size), pytest.raises(BundleError, match="cannot be written.*File too large.*make room"):
        merge_bundle(bundle, tmp_path / "merged")
    assert names_in(tmp_path) == ["bundle"]


def test_a_failed_write_leaves_the_old_model(bundle, merged, tmp_path):
    before = files_of(merged)
    with file_size_limit(30_000), pytest.raises(BundleError, match="cannot be written"):
        merge_bundle(bundle, merged)
    assert files_of(merged) == before and names_in(tmp_path) == ["bundle", "merged"]


def test_a_place_that_may_not_be_written(bundle, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BundleError, match="cannot be written"):
        merge_bundle(bundle, tmp_path / "file" / "merged")


KILLED = """
import os, signal, sys
sys.path.insert(0, {root!r})
import safetensors.torch, transformers.modeling_utils
from llmrec_peft.merging import merge_bundle as merge
from llmrec_peft.checkpoints import merged

point = {point!r}
shards = 0

def save(*args, **kwargs):
    global shards
    shards += 1
    if shards == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return safetensors.torch.save_file(*args, **kwargs)

def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)

if point == "saving":
    transformers.modeling_utils.safe_save_file = save
elif point == "publishing":
    merged.move_into_place = die
else:
    replace, calls = os.replace, []
    def second(*args):
        calls.append(args)
        if len(calls) == 2:
            die()
        replace(*args)
    os.replace = second
merge.merge_bundle({bundle!r}, {out!r}, merge.MergeOptions(max_shard_size="20KB"))
"""


@pytest.mark.slow
@pytest.mark.parametrize("point", ["saving", "publishing", "replacing"])
def test_killed_and_run_again(point, bundle, tmp_path):
    out = tmp_path / "merged"
    old = None
    if point == "replacing":
        merge_bundle(bundle, out)
        old = files_of(out)
    code = KILLED.format(root=str(ROOT), point=point, bundle=str(bundle), out=str(out))
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, timeout=300
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()[-2000:]
    assert not out.exists()
    left = [path for path in tmp_path.iterdir() if path.name.startswith(".merged.")]
    assert left, "the process was killed before it had written anything"
    merge_bundle(bundle, out)
    assert torch.allclose(answers(out), answers(bundle), atol=2e-5)
    assert old is None or files_of(out) == old
    assert names_in(tmp_path) == ["bundle", "merged"]


def test_a_merge_under_way_is_left_alone(bundle, tmp_path, monkeypatch):
    """Another merge to the same place removes what a dead process left, and not what a living one writes."""
    original, inner = merge_module.unload, []

    def meanwhile(classifier, dtype):
        if not inner:
            inner.append(True)
            merge_bundle(bundle, tmp_path / "merged")
        return original(classifier, dtype)

    monkeypatch.setattr(merge_module, "unload", meanwhile)
    merge_bundle(bundle, tmp_path / "merged")
    assert inner and torch.allclose(answers(tmp_path / "merged"), answers(bundle), atol=2e-5)
    assert names_in(tmp_path) == ["bundle", "merged"]


FULL_DISK = """
mount -t tmpfs -o size=2m tmpfs {place} && df --output=avail {place} | tail -1 &&
head -c {fill} /dev/zero > {place}/filler && cd {root} && {python} -c '
from llmrec_peft.merging.merge_bundle import merge_bundle
import os, sys
try:
    merge_bundle("{bundle}", "{place}/merged")
except ValueError as error:
    print(type(error).__name__, error)
print(sorted(os.listdir("{place}")))
'
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fill", "message"), [(2_000_000, "does not fit on the disk"), (1_955_000, "cannot be written")]
)
def test_a_full_disk(fill, message, bundle, tmp_path):
    """A small file system of memory, where this user may mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    candidate = subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", str(place)], capture_output=True)
    if candidate.returncode:
        pytest.skip("this user may not mount a file system of its own")
    script = FULL_DISK.format(place=place, fill=fill, root=ROOT, python=sys.executable, bundle=bundle)
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script], env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True,
        text=True, timeout=300,
    )  # fmt: skip
    assert "BundleError merged model" in done.stdout and message in done.stdout, done.stdout + done.stderr[-2000:]
    assert "['filler']" in done.stdout
