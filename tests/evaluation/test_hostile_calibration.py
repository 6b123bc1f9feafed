"""A calibration out of bounds is refused wherever one is read, and what comes out is checked to be probabilities."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from llmrec_peft import DomainBank, Scorer
from llmrec_peft.checkpoints.checksum import with_checksum
from llmrec_peft.checkpoints.loading import load_trained
from llmrec_peft.checkpoints.manifest import check_calibration, write_manifest
from llmrec_peft.checkpoints.manifest_schema import MERGED
from llmrec_peft.errors import BundleError, ModelError
from llmrec_peft.evaluation.calibration import Calibration, fit_calibration
from llmrec_peft.probabilities import MOST_BIAS, MOST_TEMPERATURE, calibrated, checked
from llmrec_peft.serving import OnnxScorer
from tests.support.bundles import edit_manifest

pytestmark = pytest.mark.usefixtures("one_thread")

# Denormal, tiny, huge, of another type, infinite, not there; biases that alone decide, or are none.
HOSTILE = [
    *({"temperature": value, "bias": None}
      for value in (1e-320, 1e-9, 1e300, -1.0, 0, True, "1", None, [1.0], 10**400)),
    *({"temperature": 1.0, "bias": bias}
      for bias in ([1e300, 0.0], [0.0, -101.0], [True, 0.0], ["0", "0"], 3, "ab", {})),
    {"bias": [0.0, 0.0]},
    {},
    [1.0, None],
    "warm",
    1.0,
]  # fmt: skip


@pytest.mark.parametrize("calibration", HOSTILE, ids=repr)
def test_out_of_bounds_is_refused_in_one_line(calibration):
    """Also NaN, infinity and biases of other numbers than labels (tests of bundles and calibration)."""
    for read in (lambda: Calibration.from_dict(calibration), lambda: check_calibration(calibration, 2, "bundle x")):
        with pytest.raises(BundleError, match="finite temperature above 0") as found:
            read()
        assert "\n" not in str(found.value)


@pytest.mark.parametrize("temperature", [1e-320, 1e300, True])
def test_every_directory_and_every_way_in(temperature, exported, tmp_path):
    """Bundle, merged model and export, sealed again after the edit; scorer, bank, evaluation's loaders, torch-free."""
    merged, onnx, _ = exported
    calibration = {"temperature": temperature, "bias": None}
    bundle = shutil.copytree(merged.parent / "bundle", tmp_path / "bundle")
    edit_manifest(bundle, lambda manifest: manifest.update(calibration=calibration))
    other = shutil.copytree(merged, tmp_path / "merged")
    manifest = json.loads((other / "behavior.json").read_text("utf-8"))
    write_manifest(other, {**manifest, "calibration": calibration}, MERGED)
    served = shutil.copytree(onnx, tmp_path / "onnx")
    content = json.loads((served / "serving.json").read_text("utf-8"))
    content = {key: value for key, value in content.items() if key != "seal"}
    (served / "serving.json").write_text(json.dumps(with_checksum({**content, "calibration": calibration})), "utf-8")
    base = str(load_trained(merged.parent / "bundle").classifier.base)
    for load in (
        lambda: load_trained(bundle),
        lambda: Scorer.load(bundle),
        lambda: DomainBank.load(base, {"movies": bundle}),
        lambda: load_trained(other),
        lambda: Scorer.load(other),
        lambda: OnnxScorer.load(served),
    ):
        with pytest.raises(BundleError, match="finite temperature above 0"):
            load()


@pytest.mark.parametrize("bad", [-np.inf, np.inf, np.nan])
def test_logits_that_are_not_finite_are_named(bad):
    logits = np.array([[0.0, 1.0], [2.0, bad], [bad, bad]])
    for apply in (
        Calibration().apply,
        Calibration(2.0, (0.5, -0.5)).apply,
        lambda values: calibrated(values, 1.0, None),
    ):
        with pytest.raises(ModelError, match=r"but 2 of 3 rows are not, such as \[2.0, -?(inf|nan)\]"):
            apply(logits)


@pytest.mark.parametrize("rows", [[[np.nan, np.nan]], [[0.6, 0.6]], [[-0.5, 1.5]], [[0.0, 0.0]], [[np.inf, 0.0]]])
def test_what_is_no_probability_is_named(rows):
    with pytest.raises(ModelError, match="finite and sum to 1, but 1 of 1 rows do not"):
        checked(np.array(rows))


@pytest.mark.parametrize("temperature", [1e-3, 1.0, MOST_TEMPERATURE])
@pytest.mark.parametrize("bias", [None, (MOST_BIAS, -MOST_BIAS)])
def test_within_bounds_all_float32_logits_give_probabilities(temperature, bias):
    most = float(np.finfo(np.float32).max)
    logits = np.array([[most, -most], [-most, most], [most, most], [1e-38, 0.0], [0.0, 0.0]], np.float32)
    found = Calibration.from_dict({"temperature": temperature, "bias": bias}).apply(logits)
    assert np.isfinite(found).all() and found.sum(axis=1) == pytest.approx(1)


def test_a_fit_lies_inside_the_stored_bounds():
    """Offsets, scales and priors far from any training's."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 200)
    for scale, offset in ((1e-6, 0.0), (1e6, 0.0), (1.0, 1e4), (1e-3, -1e3)):
        logits = np.stack([scale * rng.normal(size=200) + offset, scale * labels], axis=1)
        for prior in (None, (1 - 1e-12, 1e-12)):
            found = fit_calibration(logits, labels, prior)
            assert Calibration.from_dict(found.to_dict()) == found
