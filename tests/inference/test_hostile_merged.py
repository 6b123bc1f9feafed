"""A merged model's manifest whose values are of other types, sealed again by who edited it: one line names the part."""

from __future__ import annotations

import copy
import json

import pytest

from llmrec_peft.errors import BundleError
from llmrec_peft.inference.merge import merge_bundle
from llmrec_peft.inference.merged import load_merged, read_merged, write_manifest
from llmrec_peft.models.card import merged_card
from llmrec_peft.models.manifest import MANIFEST
from tests.inference.setup_merge import write_bundle

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
    with pytest.raises(BundleError, match=f"no valid entry '{part}'"):
        read_merged(tmp_path)
