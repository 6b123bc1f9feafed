"""Equal runs write equal bytes, however hash maps of Python and of the safetensors library order their keys."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from llmrec_peft.checkpoints.checksum import sha256
from llmrec_peft.checkpoints.loading import load_trained
from llmrec_peft.checkpoints.manifest_schema import CONFIG, MANIFEST, WEIGHTS
from llmrec_peft.models.safetensors_header import order_metadata, read_header
from llmrec_peft.models.tensor_files import save_tensors
from tests.conftest import ROOT

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
METADATA = {"z": "1", "a": 'é \U0001f3ac "quoted" \\ \n\t\x01\x7f', "labels": '["no", "yes"]', "": "", "ü": "x"}
SAVE = """
import sys, torch
from tests.support.bundles import write_bundle
from llmrec_peft.merging.merge_bundle import merge_bundle
torch.set_num_threads(1)
write_bundle(f"{sys.argv[2]}/bundle", sys.argv[1], r=4, target_modules=["q_proj", "v_proj", "up_proj", "down_proj"])
merge_bundle(f"{sys.argv[2]}/bundle", f"{sys.argv[2]}/merged")
"""


@pytest.mark.slow
def test_two_processes_write_the_same_bundle_and_merged_model(tiny_base, tmp_path):
    """All files, under two seeds of Python's hashes: weights, configuration, manifest, tokenizer, card."""
    started = []
    for seed in ("0", "12345"):
        (tmp_path / seed).mkdir()
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", SAVE, str(tiny_base("llama")), str(tmp_path / seed)]
        started.append(subprocess.Popen(command, env=environment, cwd=ROOT, stderr=subprocess.PIPE, text=True))
    for process in started:
        _, said = process.communicate(timeout=300)
        assert process.returncode == 0, said[-3000:]
    one, two = tmp_path / "0", tmp_path / "12345"
    names = sorted(str(path.relative_to(one)) for path in one.rglob("*") if path.is_file())
    assert {f"bundle/{CONFIG}", f"bundle/{WEIGHTS}", "merged/model.safetensors"} <= set(names)
    for name in names:
        if name == f"merged/{MANIFEST}" or name == "merged/README.md":
            continue  # they say how far merging was off, which may differ in the last digit
        assert sha256(one / name) == sha256(two / name), name
    load_trained(one / "bundle")
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    stock = AutoModelForSequenceClassification.from_pretrained(tiny_base("llama"), num_labels=2)
    PeftModel.from_pretrained(stock, one / "bundle")


def test_metadata_stand_in_order_and_come_back(tmp_path):
    """Signs that JSON escapes, and others; several dtypes; no tensor's bytes move."""
    tensors = {"b": torch.arange(6.0).reshape(2, 3), "a": torch.arange(3), "é": torch.ones(2, dtype=torch.bfloat16)}
    written = set()
    for number in range(8):
        path = tmp_path / f"{number}.safetensors"
        save_tensors(dict(reversed(tensors.items())) if number % 2 else tensors, path, METADATA)
        written.add(sha256(path))
    assert len(written) == 1
    with safe_open(str(path), framework="pt") as file:
        assert file.metadata() == METADATA
    found = load_file(path)
    assert found.keys() == tensors.keys() and all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert read_header(path).keys() == tensors.keys()
    with path.open("rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    assert list(header["__metadata__"]) == sorted(METADATA)


def test_the_library_alone_does_not(tmp_path):
    """Why the header is written again: eight files, several orders."""
    orders = set()
    for number in range(8):
        path = tmp_path / f"{number}.safetensors"
        save_file({"a": torch.ones(1)}, path, metadata=METADATA)
        orders.add(sha256(path))
        order_metadata(path)
    assert len(orders) > 1 and len({sha256(path) for path in tmp_path.iterdir()}) == 1
