"""One description of all trained directories, and one loader of their manifests."""

from __future__ import annotations

import subprocess
import sys

import pytest

from llmrec_peft.checkpoints.checksum import with_checksum
from llmrec_peft.checkpoints.manifest import read_manifest, write_manifest
from llmrec_peft.checkpoints.manifest_schema import ADAPTER, EXPORT, FORMER_INDEX, MERGED
from llmrec_peft.errors import BundleError
from tests.conftest import ROOT

ARTIFACTS = ROOT / "tests" / "artifacts"


def test_manifests_are_read_without_torch_and_arrow():
    code = (
        "import sys, llmrec_peft.checkpoints.manifest, llmrec_peft.checkpoints.export_files\n"
        "print([name for name in ('torch', 'transformers', 'pyarrow') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n"


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("bundle_lora", ADAPTER), ("bundle_adapter", ADAPTER), ("merged", MERGED), ("student", MERGED),
        ("export", EXPORT), ("bundle_lora/retrieval", FORMER_INDEX),
    ],
)  # fmt: skip
def test_each_kind_is_read_and_written_as_it_was(name, kind, tmp_path):
    """What version 0.1.0 wrote is read, and writing it again changes nothing."""
    manifest = read_manifest(ARTIFACTS / name, kind)
    again = write_manifest(tmp_path, manifest, kind)
    if kind.checksum_from is None:
        again.pop("seal")
    assert again == manifest
    for other in (ADAPTER, MERGED, EXPORT, FORMER_INDEX):
        if other is not kind:
            with pytest.raises(BundleError, match="name the directory|is a merged model|is not a merged model"):
                read_manifest(ARTIFACTS / name, other)


def test_a_version_to_come_is_refused(tmp_path):
    manifest = read_manifest(ARTIFACTS / "merged", MERGED)
    write_manifest(tmp_path, with_checksum({**manifest, "format_version": 2}), MERGED)
    with pytest.raises(BundleError, match="format_version 2, and this version reads 1; .* or merge again"):
        read_manifest(tmp_path)
