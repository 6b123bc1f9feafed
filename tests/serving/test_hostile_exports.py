"""Exports of strangers: each changed file is refused in one line, and forged numbers too.

Other inputs fail the same way: tokens that are floats, a window of 10**12 events, a tokenizer of another kind.
"""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest

from llmrec_peft.checkpoints.checksum import sha256, with_checksum
from llmrec_peft.errors import LLMRecError
from llmrec_peft.serving import OnnxScorer
from llmrec_peft.serving.exported_vocabulary import read_encoder
from tests.checkpoints.test_hostile_bundles import SWAPS, mutate
from tests.support.requests import HISTORY, MOVIES

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]
MANIFEST = "serving.json"


def test_a_changed_file_is_refused_or_changes_nothing(exported, items, tmp_path):
    rng = random.Random(3)
    rows = items.to_pylist()
    wanted = OnnxScorer.load(exported[1], rows, threads=1).score(HISTORY, MOVIES)
    for name in (MANIFEST, "tokenizer.json", "model.onnx"):
        for number in range(6):
            directory = Path(shutil.copytree(exported[1], tmp_path / f"{name}{number}"))
            mutate(rng, directory / name)
            try:
                found = OnnxScorer.load(directory, rows, threads=1).score(HISTORY, MOVIES)
            except LLMRecError as error:
                assert "\n" not in str(error)
                continue
            assert np.array_equal(found, wanted)


PLACES = [
    "tokens.pad",
    "tokens.outcomes",
    "tokens.reserved",
    "window.events",
    "window.stride",
    "domain.outcomes",
    "labels",
    "forbidden",
    "calibration",
    "opset",
    "files",
    "domain.stream",
]


@pytest.mark.parametrize("place", [tuple(name.split(".")) for name in PLACES])
def test_forged_numbers_are_refused_in_one_line(place, exported, tmp_path):
    """The checksum is computed again."""
    directory = Path(shutil.copytree(exported[1], tmp_path / "copy"))
    manifest = json.loads((directory / MANIFEST).read_text("utf-8"))
    for value in (True, -1, 1.5, 10**12, "x", [[[]]], {"temperature": True}, {"temperature": 1.0, "bias": [True, 1]}):
        node = changed = json.loads(json.dumps(manifest))
        for key in place[:-1]:
            node = node[key]
        node[place[-1]] = value
        (directory / MANIFEST).write_text(json.dumps(with_checksum(changed)), "utf-8")
        try:
            OnnxScorer.load(directory)
        except LLMRecError as error:
            assert "\n" not in str(error)
        else:
            assert place == ("domain", "stream") and isinstance(value, dict)


def test_forged_tokenizers_are_refused_in_one_line(exported, tmp_path):
    text = (exported[1] / "tokenizer.json").read_text("utf-8")
    path, content = tmp_path / "tokenizer.json", json.loads(text)
    cases = [json.dumps(content | {key: value}) for key in content for value in SWAPS]
    cases += [
        text[: len(text) // 2],
        "[" * 5000,
        "{}",
        "[]",
        json.dumps({"model": {"type": "WordLevel", "vocab": [1]}}),
    ]
    for case in cases:
        path.write_text(case, "utf-8")
        try:
            read_encoder(path).encode(["a title"])
        except LLMRecError as error:
            assert "\n" not in str(error)


def test_a_sparse_tokenizer_is_not_read(exported, tmp_path):
    directory = Path(shutil.copytree(exported[1], tmp_path / "copy"))
    with (directory / "tokenizer.json").open("r+b") as file:
        file.truncate(4 << 30)
    with pytest.raises(LLMRecError, match="at most 67,108,864 are read"):
        OnnxScorer.load(directory)
    assert sha256(exported[1] / "tokenizer.json")
