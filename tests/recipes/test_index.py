"""The fuse recipe: what it learns from which rows, what it measures, and a bundle with its directory inside."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import huggingface_hub
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from huggingface_hub import constants
from sklearn.metrics import roc_auc_score

from llmrec_peft import Domain, Scorer
from llmrec_peft.checkpoints.checksum import with_checksum
from llmrec_peft.checkpoints.hub import push_to_hub
from llmrec_peft.checkpoints.loading import load_trained
from llmrec_peft.checkpoints.manifest_schema import FILES, MANIFEST, WEIGHTS
from llmrec_peft.checkpoints.model_card import CARD
from llmrec_peft.config.schema import CONFIGS, read_config
from llmrec_peft.data.log import BehaviorLog
from llmrec_peft.errors import BundleError, ConfigError
from llmrec_peft.evaluation.bootstrap import differences
from llmrec_peft.merging.merge_bundle import merge_bundle
from llmrec_peft.retrieval.histories import Histories, feedback
from llmrec_peft.retrieval.index_files import ARRAYS, DIRECTORY
from llmrec_peft.retrieval.index_files import MANIFEST as INDEX
from llmrec_peft.retrieval.retrieval_index import RetrievalIndex
from tests.recipes.test_merge import refused
from tests.support.logs import DOMAIN, noisy_bundle, tables, write_log
from tests.support.stub_hub import MAY_WRITE, running_hub

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # The Hub client's own call of its transport.
    pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw bytes:DeprecationWarning"),
]


@pytest.fixture(scope="module")
def log(tmp_path_factory) -> Path:
    return write_log(tmp_path_factory.mktemp("fuse") / "log", *tables(40, 40))


@pytest.fixture(scope="module")
def sound(tiny_base, tmp_path_factory) -> Path:
    return noisy_bundle(tmp_path_factory.mktemp("fuse") / "bundle", tiny_base("llama"))


@pytest.fixture
def bundle(sound, tmp_path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "bundle"))


@pytest.fixture
def fuse(recipe, log, tmp_path):
    """`fuse(bundle, *flags)`: run the recipe; returns what it left in output_dir."""

    def run(bundle: Path, *flags: str, data: Path = log, out: str = "out") -> Path:
        place = ["--bundle", str(bundle), "--data.path", str(data), "--output_dir", str(tmp_path / out)]
        recipe("index")([*place, "--bootstrap", "20", *flags])
        return tmp_path / out

    return run


def predictions(directory: Path):
    return pq.read_table(directory / "predictions.parquet").to_pandas()


def metrics_of(directory: Path) -> dict:
    return json.loads((directory / "metrics.json").read_text())


def weights_digest(bundle: Path) -> str:
    return json.loads((bundle / MANIFEST).read_text())["files"][WEIGHTS]


def test_the_saved_index_and_its_report(fuse, bundle, log, recipe, tmp_path, capfd):
    out = fuse(bundle, "--valid_targets", "null", "--test_targets", "null")
    printed = capfd.readouterr().out
    retrieval_index, fusion = RetrievalIndex.load(bundle / DIRECTORY, adapter=weights_digest(bundle))
    assert fusion.strength is not None and fusion.positive == (False, True)
    with pytest.raises(BundleError, match="fitted with adapter weights"):
        RetrievalIndex.load(bundle / DIRECTORY, adapter="0" * 64)
    # The kept fusion gives the fused answers from the bundle's own, with histories strictly before each target.
    table, metrics = predictions(out), metrics_of(out)
    domain, behaviour = Domain.from_dict(DOMAIN), BehaviorLog.read(log)
    labels, rows = feedback(behaviour, domain), behaviour.interactions.to_pandas()
    splits = behaviour.split(by="time", valid=0.15, test=0.2)
    assert retrieval_index.note["rows"] == len(splits.train.rows) and len(table) == len(splits.test.rows)
    assert set(table["split"]) == {"test"}
    for _, target in table.iloc[::29].iterrows():
        earlier = rows[(rows["user_id"] == target["user_id"]) & (rows["timestamp"] < target["timestamp"])].index
        past = Histories.of(behaviour.item_codes[earlier], labels[earlier] == 1)
        code = np.array([behaviour.item_index(target["item_id"])])
        logits = np.log(target[["p_llm_dislike", "p_llm_like"]].to_numpy(float))[None]
        fused = fusion.apply(logits, retrieval_index.features(past, np.array([0]), code))[0]
        assert fused == pytest.approx(target[["p_fused_dislike", "p_fused_like"]].to_numpy(float), abs=1e-6)
    # The bundle's own are those that `evaluate` gives, calibrated.
    recipe("evaluate")(["--bundle", str(bundle), "--data.path", str(log), "--output_dir", str(tmp_path / "alone")])
    np.testing.assert_allclose(table["p_llm_like"], predictions(tmp_path / "alone")["p_like"], atol=1e-6)
    # What is said is measured on these answers.
    truth = (table["label"] == "like").astype(int)
    answers = {}
    for system in ("llm", "collaborative", "fused"):
        answers[system] = table[[f"p_{system}_dislike", f"p_{system}_like"]].to_numpy(float)
        auc = roc_auc_score(truth, table[f"p_{system}_like"])
        assert metrics["test"][system]["auc"]["value"] == pytest.approx(auc, abs=1e-12)
        assert re.search(rf"^{system} +{auc:.4f} \[", printed, flags=re.M)
    scores = set(retrieval_index.feature_names) - {"log_user_events", "log_item_rows"}
    assert set(metrics["test"]) == {*answers, *scores} and set(metrics["fused_minus"]) == set(metrics["test"]) - {
        "fused"
    }
    for system in ("llm", "collaborative"):
        gap = differences(["auc", "ece"], truth, answers[system], answers["fused"], table["user_id"], samples=20)
        assert metrics["fused_minus"][system]["auc"] == pytest.approx(gap["auc"].to_dict())
        assert metrics["fused_minus"][system]["ece"] == pytest.approx(gap["ece"].to_dict())
    assert metrics["targets"] == {"valid": fusion.targets, "test": len(table)}
    # The noise of the bundle knows nothing, and the log's tastes are real.
    assert metrics["test"]["fused"]["auc"]["value"] > metrics["test"]["llm"]["auc"]["value"] + 0.1
    assert "on test the fusion helped: auc" in printed and f"saved in {bundle / DIRECTORY}" in printed
    # It serves.
    scorer = Scorer.load(bundle, behaviour)
    assert scorer.fusion == fusion
    first = scorer.recommend([({"item_id": "i5", "hour": 3}, "like")], 3, user={"age": 30}, context={"hour": 4})
    assert len(first) == 3


def flipped(directory: Path, since: float) -> Path:
    """The log with every rating from a moment on turned round."""
    interactions, items = tables(40, 40)
    late = pc.greater_equal(interactions.column("timestamp"), since)
    ratings = pc.if_else(late, pc.subtract(5.5, interactions.column("rating")), interactions.column("rating"))
    place = interactions.column_names.index("rating")
    return write_log(directory, interactions.set_column(place, "rating", ratings), items)


def test_the_index_is_of_training_and_the_fusion_of_validation_alone(fuse, sound, log, tmp_path):
    first_valid, first_test = BehaviorLog.read(log).split(by="time", valid=0.15, test=0.2).boundaries
    kept = {}
    for name, data in {
        "as it is": log,
        "other test": flipped(tmp_path / "a", first_test),
        "other valid": flipped(tmp_path / "b", first_valid),
    }.items():
        place = tmp_path / name
        fuse(sound, "--retrieval", str(place), "--test_targets", "5", data=data)
        kept[name] = ((place / ARRAYS).read_bytes(), (place / INDEX).read_text())
    assert kept["other test"] == kept["as it is"]
    from safetensors.numpy import load

    tensors = {name: load(content[0]) for name, content in kept.items()}
    for name, value in tensors["as it is"].items():
        assert np.array_equal(value, tensors["other valid"][name]), name
    fusions = [json.loads(content[1])["fusion"] for content in kept.values()]
    assert fusions[0] == fusions[1] != fusions[2]
    assert not (sound / DIRECTORY).exists()


def test_refitted_for_serving_the_fusion_stays(fuse, sound, log, tmp_path, recipe, capfd):
    """What is measured is of the training rows; what is kept knows all rows, by the same settings."""
    behaviour = BehaviorLog.read(log)
    found, kept = {}, {}
    for name, flags in (("once", []), ("again", ["--refit", "true"])):
        place = tmp_path / name
        found[name] = metrics_of(
            fuse(sound, "--retrieval", str(place), "--test_targets", "20", *flags, out=f"{name}-o")
        )
        kept[name] = RetrievalIndex.load(place)
    (once, fusion), (again, same) = kept["once"], kept["again"]
    assert same == fusion and fusion.strength is not None
    assert found["again"]["test"] == found["once"]["test"] and found["again"]["retrieval_index"] == once.note
    assert again.note["rows"] == len(behaviour) > once.note["rows"] and found["again"]["written"] == again.note
    assert {n: m.settings() for n, m in again.models.items()} == {n: m.settings() for n, m in once.models.items()}
    assert again.item_rows.tolist() == np.bincount(behaviour.item_codes, minlength=behaviour.num_items).tolist()
    flags = ["--bundle", str(sound), "--data.path", str(log), "--limit", "4", "--ranking.candidates", "5"]
    line = refused(recipe("evaluate"), [*flags, "--ranking.retrieval", str(tmp_path / "again")], capfd)
    assert "without --refit" in line


def test_too_few_targets_leave_the_predictions_unchanged(fuse, bundle, capfd):
    out = fuse(bundle, "--valid_targets", "40", "--test_targets", "50", "--bootstrap", "0")
    printed, table = capfd.readouterr().out, predictions(out)
    assert "fusion: not fitted: 4" in printed and "leaves the LLM's predictions as they are" in printed
    np.testing.assert_allclose(table["p_fused_like"], table["p_llm_like"], rtol=0, atol=1e-15)
    assert 50 <= len(table) < 50 + 4
    assert metrics_of(out)["test"]["llm"]["auc"]["low"] is None and "[" not in printed.split("fusion:")[0]
    retrieval_index, fusion = RetrievalIndex.load(bundle / DIRECTORY)
    assert fusion.strength is None and retrieval_index.models.keys() >= {"popularity", "rates"}


FEW = ("--valid_targets", "120", "--test_targets", "40")


def test_a_bundle_with_it_inside_is_still_one(fuse, bundle, log, recipe, tiny_base, tmp_path, monkeypatch):
    evaluate = ["--bundle", str(bundle), "--data.path", str(log), "--limit", "30", "--output_dir"]
    recipe("evaluate")([*evaluate, str(tmp_path / "before")])
    fuse(bundle, *FEW)
    load_trained(bundle)
    recipe("evaluate")([*evaluate, str(tmp_path / "after")])
    assert predictions(tmp_path / "before").equals(predictions(tmp_path / "after"))
    # Again: what was there is replaced.
    (bundle / DIRECTORY / INDEX).write_text("{}")
    fuse(bundle, *FEW)
    RetrievalIndex.load(bundle / DIRECTORY)
    _push(bundle, tmp_path, monkeypatch)
    # Another run in its place takes its retrieval index with it, which was fitted with other weights.
    noisy_bundle(bundle, tiny_base("llama"), seed=6)
    assert not (bundle / DIRECTORY).exists()


def test_a_merged_model_has_a_fusion_of_its_own(fuse, bundle, log, recipe, tmp_path):
    fuse(bundle, *FEW)
    merge_bundle(bundle, tmp_path / "merged")
    out = fuse(tmp_path / "merged", *FEW, out="merged-out")
    _, fusion = RetrievalIndex.load(tmp_path / "merged" / DIRECTORY, adapter=weights_digest(bundle))
    _, own = RetrievalIndex.load(bundle / DIRECTORY)
    assert fusion.weights == pytest.approx(own.weights, abs=1e-3)
    assert Scorer.load(tmp_path / "merged", BehaviorLog.read(log)).fusion == fusion
    fused = predictions(tmp_path / "out")["p_fused_like"].to_numpy()
    assert predictions(out)["p_fused_like"].to_numpy() == pytest.approx(fused, abs=1e-4)
    recipe("evaluate")(["--bundle", str(tmp_path / "merged"), "--data.path", str(log), "--limit", "5"])


def _push(bundle: Path, tmp_path: Path, monkeypatch) -> None:
    for name, value in {"HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True}.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    huggingface_hub.close_session()
    with running_hub() as hub:
        push_to_hub(bundle, "owner/movies", token=MAY_WRITE, endpoint=hub.url, base="someone/tiny")
        assert hub.files("owner/movies").keys() >= {*FILES, CARD}
    huggingface_hub.close_session()
    monkeypatch.undo()


def test_what_is_refused_before_anything_is_scored(recipe, bundle, log, trained, tmp_path, capfd):
    full = tmp_path / "full"
    full.mkdir()
    (full / "thesis.txt").write_text("mine")
    edge = BehaviorLog.read(log).split(by="time", valid=0.15, test=0.2).boundaries
    manifest = json.loads((bundle / MANIFEST).read_text())
    manifest["counts"]["split"]["boundaries"] = list(edge)
    (bundle / MANIFEST).write_text(json.dumps(with_checksum(manifest)))
    interactions, items = tables(40, 40)
    interactions = interactions.filter(pc.less(interactions.column("timestamp"), edge[1]))
    short = write_log(tmp_path / "short", interactions, items)
    sour = write_log(tmp_path / "sour", *_disliked())
    good = {"--bundle": str(bundle), "--data.path": str(log), "--output_dir": str(tmp_path / "out")}
    cases = {
        "holds nothing that this recipe fitted": {"--retrieval": str(full)},
        "thesis.txt/x cannot be written": {"--retrieval": str(full / "thesis.txt" / "x")},
        "is a training run's": {"--output_dir": str(trained("lora"))},
        "valid of log 'short' begins at": {"--data.path": str(short)},
        "no positive among": {"--data.path": str(sour)},
        "has no behavior.json": {"--bundle": str(full)},
    }
    for said, changed in cases.items():
        flags = [word for pair in (good | changed).items() for word in pair]
        assert said in refused(recipe("index"), flags, capfd), said
        assert not (bundle / DIRECTORY).exists() and not (tmp_path / "out").exists()
    assert [path.name for path in full.iterdir()] == ["thesis.txt"]


def _disliked() -> tuple[pa.Table, pa.Table]:
    interactions, items = tables(40, 40)
    place = interactions.column_names.index("rating")
    return interactions.set_column(place, "rating", pa.array(np.ones(len(interactions)))), items


@pytest.mark.parametrize("flag", ["valid_targets", "test_targets", "bootstrap", "seed", "batch_tokens"])
def test_settings_out_of_range(flag):
    with pytest.raises(ConfigError, match=f"{flag} must be at least"):
        read_config(CONFIGS["index"], ["--bundle", "B", "--data.path", "D", f"--{flag}", "-1"])


@pytest.mark.slow
@pytest.mark.launch
def test_two_processes_leave_what_one_leaves(fuse, bundle, log, launch, tmp_path):
    fuse(bundle, out="one")
    kept = (bundle / DIRECTORY / ARRAYS).read_bytes()
    flags = [
        "--bundle",
        str(bundle),
        "--data.path",
        str(log),
        "--bootstrap",
        "20",
        "--output_dir",
        str(tmp_path / "two"),
    ]
    done = launch("ddp", "recipes/index.py", *flags)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (bundle / DIRECTORY / ARRAYS).stat().st_size == len(kept)
    one, two = predictions(tmp_path / "one"), predictions(tmp_path / "two")
    assert one["p_fused_like"].to_numpy() == pytest.approx(two["p_fused_like"].to_numpy(), abs=1e-4)
    assert done.stdout.count("saved in") == 1
