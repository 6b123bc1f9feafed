"""Bundles of strangers: refused in one line before anything is built of them, or they answer as before.

Other inputs fail the same way: a manifest whose numbers are texts, a merged model's or an export's manifest of such, a
retrieval index with a header of other offsets, a list of a million module names, weights of U8 or F8.
"""

from __future__ import annotations

import json
import logging
import random
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmrec_peft.checkpoints import manifest as manifest_module
from llmrec_peft.checkpoints.adapter_checks import check_bundle, weights_metadata
from llmrec_peft.checkpoints.bundle import TrainingRecord, save_bundle
from llmrec_peft.checkpoints.checksum import sha256, with_checksum
from llmrec_peft.checkpoints.loading import load_trained
from llmrec_peft.checkpoints.manifest import read_manifest
from llmrec_peft.checkpoints.manifest_schema import CONFIG, FILES, MANIFEST, WEIGHTS
from llmrec_peft.errors import BundleError, LLMRecError
from llmrec_peft.models import building as building_module
from llmrec_peft.models.safetensors_header import read_header


@pytest.fixture(scope="module")
def saved(tmp_path_factory, tiny_base):
    """Sound bundles by method."""
    from llmrec_peft.checkpoints.loading import load_classifier
    from tests.models.conftest import DOMAIN

    place = tmp_path_factory.mktemp("hostile")
    for method, options in (("lora", {"r": 4}), ("adapter", {"size": 4})):
        torch.manual_seed(0)
        classifier = load_classifier(str(tiny_base("llama")), DOMAIN, method, **options)
        save_bundle(
            place / method, classifier, classifier.tokenizer, DOMAIN, TrainingRecord(metrics={"test": {"auc": 0.7}})
        )
    return place


@pytest.fixture
def bundle(saved, tmp_path):
    return Path(shutil.copytree(saved / "lora", tmp_path / "bundle"))


def forge(directory: Path, change=lambda manifest: None, tensors=None, config=None) -> None:
    """Change a bundle with all digests right, as one who knows the format could."""
    manifest = json.loads((directory / MANIFEST).read_text("utf-8"))
    change(manifest)
    if config:
        content = json.loads((directory / CONFIG).read_text("utf-8"))
        (directory / CONFIG).write_text(json.dumps(content | config), "utf-8")
    try:
        metadata = weights_metadata(manifest)
    except (TypeError, KeyError, AttributeError):
        metadata = {}
    values = load_file(directory / WEIGHTS)
    save_file(values if tensors is None else tensors(values), directory / WEIGHTS, metadata=metadata)
    if isinstance(manifest.get("files"), dict):
        manifest["files"].update({name: sha256(directory / name) for name in (CONFIG, WEIGHTS)})
    (directory / MANIFEST).write_text(json.dumps(with_checksum(manifest)), "utf-8")


def refused(directory: Path, match: str | None = None, kind: type[LLMRecError] = BundleError) -> str:
    with pytest.raises(kind, match=match) as caught:
        load_trained(directory)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 2000
    return str(caught.value)


# -- the checksum ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m["metrics"]["test"].update(auc=0.99),
        lambda m: m["counts"].update(rows=1),
        lambda m: m["versions"].update(torch="9"),
        lambda m: m["model_options"].update(dtype="bfloat16"),
        lambda m: m["base"].update(name="other"),
        lambda m: m["method_options"].update(dropout=0.5),
        lambda m: m.update(extra=1),
    ],
)
def test_an_edited_manifest_is_refused(change, bundle):
    manifest = json.loads((bundle / MANIFEST).read_text("utf-8"))
    change(manifest)
    (bundle / MANIFEST).write_text(json.dumps(manifest), "utf-8")
    refused(bundle, "so it was edited; restore the file")


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m["model_options"].update(dtype="bfloat16"),
        lambda m: m["method_options"].update(layers=[0, 1]),
        lambda m: m.update(method="qlora"),
        lambda m: m.update(format_version=1) or m.pop("seal"),
    ],
)
def test_a_manifest_with_a_new_checksum_is_held_to_its_weights(change, bundle):
    """Method, options, number format and format version stand in the weights too."""
    manifest = json.loads((bundle / MANIFEST).read_text("utf-8"))
    change(manifest)
    (bundle / MANIFEST).write_text(json.dumps(with_checksum(manifest) if "seal" in manifest else manifest), "utf-8")
    refused(bundle)


def test_format_1_loads_with_one_warning(bundle, caplog, monkeypatch):
    monkeypatch.setattr(manifest_module, "_warned", set())
    manifest = json.loads((bundle / MANIFEST).read_text("utf-8"))
    metadata = weights_metadata(manifest)
    kept = ("format", "labels", "words", "domain_sha256", "calibration_sha256")
    save_file(load_file(bundle / WEIGHTS), bundle / WEIGHTS, metadata={key: metadata[key] for key in kept})
    manifest["files"][WEIGHTS] = sha256(bundle / WEIGHTS)
    del manifest["seal"]
    manifest["format_version"] = 1
    (bundle / MANIFEST).write_text(json.dumps(manifest), "utf-8")
    with caplog.at_level(logging.WARNING):
        load_trained(bundle)
        check_bundle(bundle)
    assert sum("is of format 1, which has no checksum" in record.getMessage() for record in caplog.records) == 1


# -- numbers and texts of a manifest -----------------------------------------------------------------


@pytest.mark.parametrize("value", [True, 1.5, "1", None, [], {"a": 1}, -1, 10**7, 10**30])
@pytest.mark.parametrize("key", ["r", "layers", "alpha", "target_modules", "dropout"])
def test_method_options_of_another_type_or_out_of_bounds(key, value, bundle):
    if (key, value) in (("layers", None), ("alpha", 1.5), ("alpha", 10**7)):
        pytest.skip("a sound value")
    forge(bundle, lambda m: m["method_options"].update({key: value}))
    refused(bundle)


@pytest.mark.parametrize("place", ["format_version", "labels", "words", "files", "base", "tokenizer", "domain",
                                   "model_options", "method", "stream", "counts", "versions"])  # fmt: skip
@pytest.mark.parametrize("value", [None, 1.0, True, "x", [[1]], {"a": {"b": None}}])
def test_entries_of_another_type(place, value, bundle):
    if (place, type(value)) == ("counts", dict):
        pytest.skip("any mapping is sound")
    manifest = json.loads((bundle / MANIFEST).read_text("utf-8"))
    manifest[place] = value
    (bundle / MANIFEST).write_text(json.dumps(with_checksum(manifest)), "utf-8")
    refused(bundle)


def test_a_pattern_is_never_read_from_a_file(bundle):
    """Others: a lookbehind, a nested quantifier in a list, patterns under rank_pattern or exclude_modules."""
    forge(bundle, lambda m: m["method_options"].update(target_modules=r"(.*a)*.*(x+x+)+y"))
    refused(bundle, "patterns are not read from a file")
    forge(bundle, lambda m: m["method_options"].update(target_modules=["q_proj", "(x+x+)+y"]))
    refused(bundle, "names of modules")


@pytest.mark.parametrize(
    "config",
    [
        {"rank_pattern": {"(x+x+)+y": 9}}, {"alpha_pattern": {".*": 9}}, {"exclude_modules": "(x+x+)+y"},
        {"layers_pattern": "(x+)+"}, {"modules_to_save": 3}, {"target_modules": "(x+x+)+y"}, {"auto_mapping": {"a": 1}},
        {"layer_replication": [[0, 10**9]]}, {"trainable_token_indices": [1]}, {"loftq_config": {"a": 1}},
        {"megatron_config": {"a": 1}}, {"something_new": {"a": 1}}, {"r": 10**7}, {"r": True}, {"use_dora": 0},
    ],
)  # fmt: skip
def test_peft_settings_that_no_bundle_has(config, bundle):
    forge(bundle, config=config)
    refused(bundle, "restore the files that training wrote")


def test_a_pattern_given_to_training_is_saved_as_names(make, shake, domain, answer, prompt, tmp_path):
    trained = shake(make("llama", r=2, target_modules=r".*\.1\.mlp\.(up|down)_proj"))
    directory = save_bundle(tmp_path / "bundle", trained, trained.tokenizer, domain)
    names = read_manifest(directory)["method_options"]["target_modules"]
    assert names == ["model.layers.1.mlp.down_proj", "model.layers.1.mlp.up_proj"]
    assert torch.equal(answer(load_trained(directory).classifier, prompt), answer(trained, prompt))


def test_a_template_of_a_huge_width_is_refused(bundle):
    """Others: a precision, a width in the header, a width that a field gives."""
    forge(bundle, lambda m: m["domain"].update(event="{title:>1000000000}"))
    refused(bundle, "a format has no number above 1000 and")


@pytest.mark.parametrize(
    ("part", "values"),
    [
        ("model_options", {"base": "a\0b"}), ("model_options", {"base": "x" * 5000}),
        ("model_options", {"head_scale": 0}), ("method_options", {"r": 5000}), ("method_options", {"nonsense": 1}),
    ],
)  # fmt: skip
def test_the_advice_is_that_of_a_manifest(part, values, bundle):
    """No one who loads a bundle has a configuration to change."""
    forge(bundle, lambda m: m[part].update(values))
    assert "configuration" not in refused(bundle, r"; restore the file that training wrote$")


def test_names_of_no_module_are_left_out(saved, bundle, caplog):
    """19,000 names hang PEFT. Others: the same name again and again, a name of another base's layers."""
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    names += [f"n{number:05d}_{'y' * 400}" for number in range(19_000)] + ["q_proj"] * 900
    forge(bundle, lambda m: m["method_options"].update(target_modules=names), config={"target_modules": sorted(names)})
    with caplog.at_level(logging.WARNING):
        classifier = load_trained(bundle).classifier
    assert classifier.model.peft_config["default"].target_modules == set(names[:7])  # quadratic in these
    loaded = classifier.trainable_state_dict()
    assert "19000 of 19007 names in target_modules" in caplog.text
    whole = load_trained(saved / "lora").classifier.trainable_state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in whole.items())
    forge(bundle, lambda m: m["method_options"].update(target_modules=["nothing"]),
          config={"target_modules": ["nothing"]})  # fmt: skip
    refused(bundle, "none of them is in the base; restore the files")


# -- weights -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.uint8, torch.float64])
def test_weights_that_are_no_floats(dtype, bundle):
    forge(bundle, tensors=lambda values: {name: value.to(dtype) for name, value in values.items()})
    refused(bundle, "of number format")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite(value, bundle):
    def poison(values):
        name = max(values)
        values[name].view(-1)[-1] = value
        return values

    forge(bundle, tensors=poison)
    refused(bundle, "tensor '.*' that is not finite")


@pytest.mark.parametrize("method", ["lora", "adapter"])
def test_a_size_that_the_weights_do_not_have_is_not_built(method, saved, tmp_path, monkeypatch):
    """Others: a parallel adapter of the same size, a magnitude vector, a head of a million labels."""
    bundle = Path(shutil.copytree(saved / method, tmp_path / method))
    key, config = ("r", {"r": 4096}) if method == "lora" else ("size", {"size": 4096})
    forge(bundle, lambda m: m["method_options"].update({key: 4096}), config=config)
    monkeypatch.setattr(building_module, "with_method", lambda *_: pytest.fail("adapters were built"))
    refused(bundle, "of shape .* but the model has")


@pytest.mark.parametrize("name", ["x" * 1_000_000, "x" * 1001, "a\nb", "a\0b", "\u202e"])
@pytest.mark.parametrize("dtype", [torch.int8, torch.float32])
def test_names_of_tensors_have_bounds(name, dtype, bundle):
    forge(bundle, tensors=lambda values: {**values, name: torch.ones(1, dtype=dtype)})
    assert len(refused(bundle, "at most 1,000 printable characters")) < 500


def test_long_values_are_shortened(bundle):
    """Labels, words, settings of PEFT and metadata, of a million characters in all."""
    long = {f"l{number}": f" {'w' * 900}{number}\n" for number in range(1000)}
    forge(bundle, lambda m: m["domain"].update(outcomes=long))
    refused(bundle)
    forge(bundle, config={"layers_pattern": ["x" * 10_000] * 100})
    refused(bundle)


def write_header(path: Path, header, body: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)
    return path


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
HEADERS = {
    "an overlap": ({"a": ENTRY, "b": ENTRY}, 8),
    "a gap": ({"a": ENTRY, "b": ENTRY | {"data_offsets": [16, 24]}}, 24),
    "a gap in front": ({"a": ENTRY | {"data_offsets": [8, 16]}}, 16),
    "a name twice": (b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "a": {}}', 8),
    "a bool": ({"a": ENTRY | {"shape": [True, 2]}}, 8),
    "a float": ({"a": ENTRY | {"shape": [2.0]}}, 8),
    "a text": ({"a": ENTRY | {"shape": ["2"]}}, 8),
    "below 0": ({"a": ENTRY | {"shape": [-1, -2]}}, 8),
    "a product beyond 64 bits": ({"a": ENTRY | {"shape": [2**63, 2**63, 0], "data_offsets": [0, 0]}}, 0),
    "another dtype": ({"a": ENTRY | {"dtype": "X9"}}, 8),
    "three offsets": ({"a": ENTRY | {"data_offsets": [0, 4, 8]}}, 8),
    "a list": ([1], 0),
    "depth": (b'{"a": ' + b"[" * 5000 + b"]" * 5000 + b"}", 0),
    "digits": (b'{"a": ' + b"9" * 5000 + b"}", 0),
    "bytes more": ({"a": ENTRY}, 9),
}


@pytest.mark.parametrize("name", HEADERS)
def test_headers_that_describe_no_sound_file(name, tmp_path):
    header, size = HEADERS[name]
    with pytest.raises(ValueError, match=r"header|bytes"):
        read_header(write_header(tmp_path / "x.safetensors", header, b"\0" * size))


def test_a_header_of_90_mb_is_not_parsed(tmp_path):
    path = write_header(tmp_path / "x.safetensors", b"{" + b" " * (90 << 20) + b"}")
    with pytest.raises(ValueError, match="at most 16,777,216 are read"):
        read_header(path)


@pytest.mark.parametrize("name", [CONFIG, MANIFEST])
def test_a_sparse_file_of_4_gb_is_not_read(name, bundle):
    with (bundle / name).open("wb") as file:
        file.truncate(4 << 30)
    refused(bundle, "bytes, the most that is read")


# -- anything ----------------------------------------------------------------------------------------

SWAPS = (None, True, 0, -1, 1.5, 10**12, "", "x", [], {}, [[[]]], {"a": []})


def mutate(rng: random.Random, path: Path) -> None:
    """Flip, cut or lengthen a file, or swap or remove a value of its JSON."""
    content = bytearray(path.read_bytes())
    kind = rng.choice(["flip", "cut", "grow", "swap", "drop"] if path.suffix == ".json" else ["flip", "cut", "grow"])
    if kind == "flip":
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        del content[rng.randrange(len(content)) :]
    elif kind == "grow":
        content += bytes(rng.randrange(256) for _ in range(rng.randrange(1, 9)))
    else:
        value = json.loads(content)
        node = value
        while True:
            key = rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
            if isinstance(node[key], dict | list) and node[key] and rng.random() < 0.7:
                node = node[key]
                continue
            if kind == "swap":
                node[key] = rng.choice(SWAPS)
            else:
                del node[key]
            break
        content = json.dumps(value).encode()
    path.write_bytes(content)


@pytest.mark.parametrize("name", FILES)
def test_a_changed_file_is_refused_or_changes_nothing(name, saved, tmp_path):
    rng = random.Random(7)
    wanted = load_file(saved / "lora" / WEIGHTS)
    for number in range(40):
        bundle = Path(shutil.copytree(saved / "lora", tmp_path / str(number)))
        mutate(rng, bundle / name)
        try:
            manifest, _ = check_bundle(bundle)
        except LLMRecError as error:
            assert "\n" not in str(error)
            continue
        assert manifest == read_manifest(saved / "lora")
        assert all(torch.equal(value, wanted[key]) for key, value in load_file(bundle / WEIGHTS).items())


FORGED = ("method_options", "model_options", "domain", "labels", "words", "stream", "calibration", "counts", "base",
          "files")  # fmt: skip


def test_forged_manifests_are_refused_in_one_line_or_load(saved, tmp_path):
    """All digests are made to fit, so that the checks behind them are reached."""
    rng, scratch = random.Random(11), tmp_path / "scratch.json"
    for number in range(40):
        bundle = Path(shutil.copytree(saved / "lora", tmp_path / str(number)))
        before = json.loads((bundle / MANIFEST).read_text("utf-8"))
        scratch.write_text(json.dumps({key: before[key] for key in FORGED}), "utf-8")
        mutate_json(rng, scratch)
        forge(bundle, lambda m: m.update(json.loads(scratch.read_text("utf-8"))))
        try:
            check_bundle(bundle)
        except LLMRecError as error:
            assert "\n" not in str(error)


def mutate_json(rng: random.Random, path: Path) -> None:
    value = json.loads(path.read_text("utf-8"))
    node = value
    while True:
        key = rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
        if isinstance(node[key], dict | list) and node[key] and rng.random() < 0.7:
            node = node[key]
            continue
        node[key] = rng.choice(SWAPS)
        break
    path.write_text(json.dumps(value), "utf-8")
