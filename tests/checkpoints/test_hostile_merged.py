"""Merged models of strangers, sealed again by who edited them: one line names the part, and nothing is built."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmrec_peft.checkpoints.manifest import MANIFEST
from llmrec_peft.checkpoints.merged import load_merged, read_merged, write_manifest
from llmrec_peft.checkpoints.merged_checks import check_tokenizer
from llmrec_peft.checkpoints.model_card import merged_card
from llmrec_peft.checkpoints.sealing import sha256
from llmrec_peft.data.vocabulary import tokenise
from llmrec_peft.errors import BundleError, StreamError, input_errors
from llmrec_peft.merging.merging import merge_bundle
from llmrec_peft.models.base import load_tokenizer
from llmrec_peft.models.fingerprints import tokenizer_fingerprint
from llmrec_peft.models.tensor_files import fingerprint, read_headers
from tests.support.bundles import write_bundle

pytestmark = pytest.mark.usefixtures("one_thread")
VALUES = (None, True, "x", -1, 0.5, 10**400, [], {}, [[1]], {"a": 1}, "\x00\n")


@pytest.fixture(scope="module")
def merged(tiny_base, tmp_path_factory):
    place = tmp_path_factory.mktemp("hostile")
    bundle = write_bundle(
        place / "bundle", tiny_base("llama"), r=4, calibration={"temperature": 1.5, "bias": [0.1, -0.1]}
    )
    merge_bundle(bundle, place / "merged")
    return place / "merged"


def parts(value, path=()):
    """Paths of all values inside a value."""
    if path:
        yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in inner:
        yield from parts(part, (*path, key))


def test_no_value_of_another_type_passes_unnamed(merged):
    """Every part of the manifest, each with eleven values: read, and its card made, or refused in one line."""
    manifest = json.loads((merged / MANIFEST).read_text("utf-8"))
    refused = 0
    for path in [*parts(manifest), ("metrics", "test"), ("counts", "split", "boundaries")]:
        for value in VALUES:
            edited = copy.deepcopy(manifest)
            place = edited
            for key in path[:-1]:
                place = place[key]
            place[path[-1]] = value
            try:
                write_manifest(merged, edited)
                merged_card(read_merged(merged))
            except BundleError as error:
                refused += 1
                assert "\n" not in str(error)
    write_manifest(merged, manifest)
    load_merged(merged)
    assert refused > 300


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("dtype", "int8"),
        ("dtype", ""),
        ("attn", "flash_attention_2"),
        ("attn", ["eager"]),
        ("files", {"../../secret": "0" * 64}),
        ("files", {}),
        ("weights", {"fingerprint": 3}),
        ("tokenizer", {"fingerprint": None}),
        ("merged_from", [{"name": "x", "method": "lora", "weights_sha256": 5, "weight": 1.0}]),
        ("merged_from", [{"name": "x", "method": "lora", "weights_sha256": "5", "weight": float("inf")}]),
        ("measured", {"max_difference": [1]}),
        ("metrics", {"test": 5}),
        ("counts", {"split": {"boundaries": [1, "2"]}}),
    ],
)
def test_the_part_is_named(part, value, merged, tmp_path):
    manifest = json.loads((merged / MANIFEST).read_text("utf-8")) | {part: value}
    (tmp_path / MANIFEST).write_text(json.dumps(manifest), "utf-8")
    with pytest.raises(BundleError, match=rf"no valid entry '{part}[.'\[]|inf, which is not finite"):
        read_merged(tmp_path)


# -- weights, configuration and tokenizer ------------------------------------------------------------


def forge(merged, place, *, config=None, tensors=None, tokenizer=None):
    """A copy with other files and all digests right, as one who knows the format could."""
    copied = Path(shutil.copytree(merged, place / "forged"))
    edit_json(copied / "config.json", config or {})
    edit_json(copied / "tokenizer.json", tokenizer or {})
    if tensors:
        values = tensors(load_file(copied / "model.safetensors"))
        save_file(values, copied / "model.safetensors", metadata={"format": "pt"})
    manifest = json.loads((copied / MANIFEST).read_text("utf-8"))
    manifest["files"] = {"config.json": sha256(copied / "config.json")}
    manifest["weights"] = {"fingerprint": fingerprint(read_headers([copied / "model.safetensors"]))}
    if tokenizer:
        manifest["tokenizer"]["fingerprint"] = tokenizer_fingerprint(load_tokenizer(str(copied)))
    write_manifest(copied, manifest)
    return copied


def edit_json(path, values):
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | values), "utf-8")


def refused(directory, match):
    with pytest.raises(BundleError, match=match) as caught:
        load_merged(directory)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000


def test_a_forgery_that_changes_nothing_loads(merged, tmp_path):
    assert load_merged(forge(merged, tmp_path)).classifier.labels == load_merged(merged).classifier.labels


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.float64, torch.int64])
def test_weights_of_other_formats(dtype, merged, tmp_path):
    """One tensor is enough; others: F8, U8."""
    directory = forge(merged, tmp_path, tensors=lambda v: v | {"score.weight": v["score.weight"].to(dtype)})
    refused(directory, r"tensor 'score\.weight' is of number format")


@pytest.mark.parametrize("name", ["extra.weight", "model.layers.9.self_attn.q_proj.weight", "lm_head2.weight"])
def test_tensors_that_the_model_has_not(name, merged, tmp_path):
    directory = forge(merged, tmp_path, tensors=lambda v: v | {name: torch.ones(3)})
    refused(directory, rf"holds the tensor '{name}', which its model has not \(1 in all\)")


@pytest.mark.parametrize(
    "config",
    [
        {"transformers_weights": "sub/w.safetensors"},
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
        {"quantization_config": [1]},
        {"text_config": {"transformers_weights": "w.safetensors"}},
    ],
)
def test_a_configuration_that_names_other_weights(config, merged, tmp_path):
    refused(forge(merged, tmp_path, config=config), "config.json sets .*weights are whole in its own files")


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"num_hidden_layers": 10**5}, "makes more than its weights hold"),
        ({"vocab_size": 10**9}, "makes more than its weights hold"),
        ({"intermediate_size": 10**8}, "makes more than its weights hold"),
        ({"hidden_size": 10**6, "head_dim": 10**6}, "makes more than its weights hold"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers 1000000000, and 100,000 are the most"),
        ({"num_labels": 10**9}, "num_labels 1000000000, and 100,000 are the most"),
        ({"num_hidden_layers": 3}, "lacks the weight"),
        ({"num_hidden_layers": 1}, "which its model has not"),
        ({"vocab_size": 401}, "weights of other shapes"),
    ],
)
def test_sizes_that_the_weights_do_not_have_are_not_built(config, match, merged, tmp_path):
    directory = forge(merged, tmp_path, config=config)
    refused(directory, match)


RULES = {
    "content": ({"type": "Replace", "pattern": {"String": "x"}, "content": "x" * 3000}, "3,000 characters in a rule"),
    "pattern": ({"type": "Replace", "pattern": {"Regex": "x" * 2000}, "content": ""}, "2,000 characters in a rule"),
    "growth": (
        {"type": "Sequence",
         "normalizers": [{"type": "Replace", "pattern": {"String": "x"}, "content": "x" * 200}] * 3},
        "rules that blow texts up",
    ),
    "count": ({"type": "Sequence", "normalizers": [{"type": "NFC"}] * 60}, "more than 50 rules"),
}  # fmt: skip


@pytest.mark.parametrize("name", RULES)
def test_rules_of_a_tokenizer_have_bounds(name, merged, tmp_path):
    rule, match = RULES[name]
    refused(forge(merged, tmp_path, tokenizer={"normalizer": rule}), match)


REAL = {
    "llama 3": {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [
        {"type": "Split", "behavior": "Isolated", "invert": False, "pattern": {"Regex":
         r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+"}},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}]}},
    "gemma": {
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"},
            {"type": "Fuse"}]},
    },
    "t5": {"normalizer": {"type": "Sequence", "normalizers": [
        {"type": "Precompiled", "precompiled_charsmap": "A" * 316_720},
        {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": "▁"}]}},
    "xlnet": {"normalizer": {"type": "Sequence", "normalizers": [
        {"type": "Replace", "pattern": {"String": "``"}, "content": '"'},
        {"type": "Replace", "pattern": {"String": "''"}, "content": '"'},
        {"type": "NFKD"}, {"type": "StripAccents"}, {"type": "Lowercase"}]}},
}  # fmt: skip


@pytest.mark.parametrize("name", REAL)
def test_rules_of_published_tokenizers_pass(name, tmp_path):
    (tmp_path / "tokenizer.json").write_text(json.dumps(REAL[name]), "utf-8")
    assert check_tokenizer(tmp_path) is None


@pytest.mark.slow
def test_a_vocabulary_as_large_as_gemmas_is_read(tmp_path):
    pairs = [[f"a{n}", "b"] for n in range(515_000)]
    vocabulary = {f"t{n}": n for n in range(262_000)}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary, "merges": pairs}}), "utf-8")
    assert check_tokenizer(tmp_path) is None


def test_a_pattern_that_takes_too_long_is_one_line(merged, tmp_path):
    """The library panics, which is no Exception. Others: a lookbehind, nested quantifiers in a normalizer."""
    slow = {"type": "Split", "pattern": {"Regex": "(x+x+)+y"}, "behavior": "Isolated", "invert": False}
    before = json.loads((merged / "tokenizer.json").read_text("utf-8"))["pre_tokenizer"]
    rules = {"type": "Sequence", "pretokenizers": [slow, before]}
    loaded = load_merged(forge(merged, tmp_path, tokenizer={"pre_tokenizer": rules}))
    with pytest.raises(StreamError, match="use tokenizer files that you trust") as caught:
        tokenise(loaded.tokenizer, ["x" * 60])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, GeneratorExit])
def test_what_stops_a_process_passes_the_door(error):
    with pytest.raises(error), input_errors(BundleError, "a", "b"):
        raise error
