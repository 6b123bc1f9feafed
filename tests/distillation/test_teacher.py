"""A teacher's predictions: cached, read again, completed, and refused when they are stale."""

import json

import numpy as np
import pyarrow as pa
import pytest
import torch

from llmrec_peft.checkpoints.merged import load_answering
from llmrec_peft.data.collator import StreamCollator
from llmrec_peft.data.log import BehaviorLog
from llmrec_peft.data.streams import build_streams
from llmrec_peft.data.vocabulary import Vocabulary
from llmrec_peft.distillation import prediction_shards
from llmrec_peft.distillation import teacher_predictions as module
from llmrec_peft.distillation.hidden_states import LayerOutputs
from llmrec_peft.distillation.prediction_shards import check_cache
from llmrec_peft.distillation.teacher_item_embeddings import item_embeddings
from llmrec_peft.distillation.teacher_predictions import teacher_predictions
from llmrec_peft.errors import DataError
from llmrec_peft.evaluation.calibration import Calibration
from llmrec_peft.models.predict import predict
from tests.conftest import make_small_tables

pytestmark = pytest.mark.usefixtures("one_thread")
FIT = {"temperature": 1.7, "bias": [0.2, -0.1]}


@pytest.fixture
def taught(bundle_of, domains):
    """A bundle as a teacher, and the training streams of its domain."""
    teacher = load_answering(bundle_of(calibration=FIT))
    log = BehaviorLog(*make_small_tables(users=6, events=12), name="small")
    return teacher, build_streams(log.split().train, domains["movies"], teacher.tokenizer)


def predicted(teacher, streams):
    collator = StreamCollator(teacher.tokenizer.pad_token_id, 500)
    return predict(teacher.classifier, streams, collator, batch_tokens=500)


def test_predictions_are_calibrated_and_by_target_number(taught, tmp_path):
    teacher, streams = taught
    found = teacher_predictions(teacher, streams, tmp_path / "cache", batch_tokens=600)
    wanted = Calibration.from_dict(FIT).apply(predicted(teacher, streams).logits)
    np.testing.assert_allclose(torch.from_numpy(found.logits).softmax(-1).numpy(), wanted, atol=1e-5)
    assert found.predicted.tolist() == list(range(streams.num_targets)) and found.hidden is None


def test_cached_predictions_are_not_computed_again(taught, tmp_path, monkeypatch):
    """An interrupted run continues: shards on disk stay, and a missing one is computed again and equals the first."""
    teacher, streams = taught
    monkeypatch.setattr(module, "SHARD_TOKENS", 400)
    whole = teacher_predictions(teacher, streams, tmp_path / "cache", batch_tokens=600)
    parts = sorted((tmp_path / "cache").glob("part-*.arrow"))
    assert len(parts) >= 3
    times = {path: path.stat().st_mtime_ns for path in parts}
    parts[1].unlink()
    (tmp_path / "cache" / ".part-7.arrow.partial").write_bytes(b"half")
    again = teacher_predictions(teacher, streams, tmp_path / "cache", batch_tokens=600)
    np.testing.assert_allclose(again.logits, whole.logits, atol=1e-6)
    assert [path for path in parts if path.stat().st_mtime_ns != times[path]] == [parts[1]]


def test_a_subset_of_windows_leaves_the_rest_without_predictions(taught, tmp_path):
    teacher, streams = taught
    part = streams.limited(10)
    found = teacher_predictions(teacher, part, tmp_path / "cache", batch_tokens=600)
    assert 10 <= len(found.predicted) < streams.num_targets
    more = teacher_predictions(teacher, streams, tmp_path / "cache", batch_tokens=600)
    assert len(more.predicted) == streams.num_targets
    np.testing.assert_array_equal(more.logits[found.predicted], found.logits[found.predicted])


def test_hidden_states_are_those_at_the_markers(taught, tmp_path):
    teacher, streams = taught
    found = teacher_predictions(teacher, streams, tmp_path / "cache", layers=(0, -1), batch_tokens=600)
    collator = StreamCollator(teacher.tokenizer.pad_token_id, 600)
    batch = collator.one([streams[0]])
    with torch.no_grad():
        inputs = {key: value for key, value in batch.items() if value is not None}
        top = teacher.classifier.hidden_states(
            inputs["input_ids"], inputs["position_ids"], inputs["markers"], None, inputs.get("segment")
        )
    cached = found.hidden[found.rows[batch["targets"].numpy()]]
    np.testing.assert_allclose(cached[:, 1], top.numpy(), atol=5e-3, rtol=5e-3)  # float16
    assert found.hidden.shape == (streams.num_targets, 2, teacher.classifier.config.hidden_size)
    assert np.abs(cached[:, 0].astype(np.float32) - cached[:, 1]).max() > 0.01


def test_hooks_are_gone_after_their_block(taught):
    teacher, _ = taught
    with LayerOutputs(teacher.classifier, (0, -1)):
        pass
    modules = [*teacher.classifier.stock.model.layers, teacher.classifier.head]
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in modules)


@pytest.mark.parametrize("change", ["teacher", "targets", "texts", "layers"])
def test_stale_predictions_are_refused(change, taught, tmp_path, bundle_of, domains):
    teacher, streams = taught
    teacher_predictions(teacher, streams.limited(5), tmp_path / "cache", batch_tokens=600)
    layers = ()
    if change == "teacher":
        teacher = load_answering(bundle_of(seed=5))
    elif change == "targets":
        log = BehaviorLog(*make_small_tables(users=7, events=12), name="small")
        streams = build_streams(log.split().train, domains["movies"], teacher.tokenizer)
    elif change == "texts":  # of as many tokens, so that the windows are as they were
        interactions, items = make_small_tables(users=6, events=12)
        titles = pa.array([title.replace("Item", "Metl") for title in items["title"].to_pylist()])
        log = BehaviorLog(interactions, items.set_column(1, "title", titles), name="small")
        changed = build_streams(log.split().train, domains["movies"], teacher.tokenizer)
        assert changed.lengths.tolist() == streams.lengths.tolist()
        streams = changed
    else:
        layers = (-1,)
    with pytest.raises(DataError, match=f"stale teacher outputs: .*{change}.* delete the directory, or name another"):
        teacher_predictions(teacher, streams, tmp_path / "cache", layers=layers)
    if change == "teacher":
        with pytest.raises(DataError, match="stale teacher outputs: they are another teacher's"):
            check_cache(tmp_path / "cache", teacher.manifest)


def test_a_note_without_the_texts_of_before_is_read(taught, tmp_path):
    teacher, streams = taught
    found = teacher_predictions(teacher, streams.limited(5), tmp_path / "cache", batch_tokens=600)
    path = tmp_path / "cache" / prediction_shards.METADATA
    note = json.loads(path.read_text())
    del note["texts"]
    path.write_text(json.dumps(note))
    again = teacher_predictions(teacher, streams.limited(5), tmp_path / "cache", batch_tokens=600)
    np.testing.assert_array_equal(again.logits, found.logits)


def test_somebody_elses_directory_is_left_alone(taught, tmp_path):
    teacher, streams = taught
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match="holds files, but no teacher.json"):
        teacher_predictions(teacher, streams, tmp_path)


def test_items_side_by_side_read_as_each_alone(taught, domains):
    """One item after another as its own prompt, against all of them as candidates on one header."""
    teacher, streams = taught
    vocabulary = Vocabulary(domains["movies"], teacher.tokenizer)
    columns = {name: streams.log.items.column(name).combine_chunks() for name in domains["movies"].event_columns}
    flat, offsets = vocabulary.tokens(vocabulary.events(columns).to_pylist())
    events = [np.concatenate([flat[a:b], vocabulary.marker]) for a, b in zip(offsets, offsets[1:], strict=False)]
    lead = np.concatenate([vocabulary.prefix, vocabulary.tokens(["Header:\n"])[0]])
    found = item_embeddings(teacher, lead, events, (0, -1), batch_tokens=700)
    for number in (0, 1, 9, len(events) - 1):
        ids = torch.from_numpy(np.concatenate([lead, events[number]]).astype(np.int64))[None]
        with torch.no_grad(), LayerOutputs(teacher.classifier, (0, -1)) as outputs:
            markers = torch.tensor([ids.shape[1] - 1])
            teacher.classifier(ids, markers=markers)
            alone = outputs.at(markers).flatten().numpy()
        np.testing.assert_allclose(found[number], alone, atol=1e-4)
