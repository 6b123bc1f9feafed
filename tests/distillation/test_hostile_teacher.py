"""Cached teacher outputs that were truncated, edited or forged: the shard is named, and nothing is distilled from it.

Other inputs fail the same way: a shard of another teacher copied in, a shard renamed over another, item embeddings.
"""

import numpy as np
import pyarrow as pa
import pytest

from llmrec_peft.checkpoints.merged import load_answering
from llmrec_peft.data.log import BehaviorLog
from llmrec_peft.data.streams import build_streams
from llmrec_peft.distillation import prediction_shards
from llmrec_peft.distillation import teacher_predictions as module
from llmrec_peft.distillation.teacher_cache import matrix, read_cached, write_cached
from llmrec_peft.distillation.teacher_predictions import teacher_predictions
from llmrec_peft.errors import DataError, ModelError
from llmrec_peft.models.bottleneck import transformer_layers
from tests.conftest import make_small_tables

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def cached(bundle_of, domains, tmp_path, monkeypatch):
    """(teacher, streams, directory) of a log with cached predictions in several shards."""
    monkeypatch.setattr(module, "SHARD_TOKENS", 400)
    teacher = load_answering(bundle_of())
    log = BehaviorLog(*make_small_tables(users=3, events=9), name="small")
    streams = build_streams(log.split().train, domains["movies"], teacher.tokenizer)
    teacher_predictions(teacher, streams, tmp_path / "cache", batch_tokens=600)
    return teacher, streams, tmp_path / "cache"


def flip(path, owner):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def rewrite(change):
    """A shard with other values, without its checksum or with one of its own making."""

    def apply(path, owner):
        with pa.memory_map(str(path)) as source:
            table = pa.ipc.open_file(source).read_all()
        window, target, logits = table["window"].to_numpy(), table["target"].to_numpy(), matrix(table, "logits")
        window, target, logits = change(window.copy(), target.copy(), logits.copy())
        column = pa.FixedSizeListArray.from_arrays(pa.array(logits.reshape(-1)), logits.shape[1])
        write_cached(pa.table({"window": window, "target": target, "logits": column}), path, owner)

    return apply


SECRET = "known"
FAULTS = {
    "flipped": (flip, ""),
    "cut": (lambda path, owner: path.write_bytes(path.read_bytes()[:-200]), ""),
    "empty": (lambda path, owner: path.write_bytes(b""), ""),
    "zeroed": (rewrite(lambda w, t, x: (w, t, x * 0)), ""),
    "of another owner": (rewrite(lambda w, t, x: (w, t, x)), ""),
    "not finite": (rewrite(lambda w, t, x: (w, t, x * np.float32("nan"))), SECRET),
    "negative numbers": (rewrite(lambda w, t, x: (w, -1 - t, x)), SECRET),
    "windows beyond": (rewrite(lambda w, t, x: (w + 10**6, t, x)), SECRET),
    "a target twice": (rewrite(lambda w, t, x: (w, np.where(t == t[0], t[-1], t), x)), SECRET),
    "a label more": (rewrite(lambda w, t, x: (w, t, np.hstack([x, x[:, :1]]))), SECRET),
    "huge": (rewrite(lambda w, t, x: (w, t, x + np.float32(1e30))), SECRET),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_bad_shard_is_named(name, cached, monkeypatch):
    teacher, streams, directory = cached
    damage, secret = FAULTS[name]
    owners = []
    monkeypatch.setattr(
        prediction_shards, "read_cached", lambda path, owner: owners.append(owner) or read_cached(path, owner)
    )
    teacher_predictions(teacher, streams, directory, batch_tokens=600)
    shard = sorted(directory.glob("part-*.arrow"))[1]
    damage(shard, owners[0] if secret else "unknown")
    with pytest.raises(DataError, match=rf"{shard.name}.*delete the file and run again to recompute it") as caught:
        teacher_predictions(teacher, streams, directory, batch_tokens=600)
    assert "\n" not in str(caught.value)
    shard.unlink()
    assert np.isfinite(teacher_predictions(teacher, streams, directory, batch_tokens=600).logits).all()


def test_hidden_states_that_are_not_finite_are_not_cached(bundle_of, domains, tmp_path):
    """float16 ends at 65,504. Others: a NaN that the head's norm hides, a shard of an earlier version."""
    teacher = load_answering(bundle_of())
    log = BehaviorLog(*make_small_tables(users=3, events=9), name="small")
    streams = build_streams(log.split().train, domains["movies"], teacher.tokenizer)
    teacher_predictions(teacher, streams, tmp_path / "cache", layers=[0, -1], batch_tokens=600)
    shard = next((tmp_path / "cache").glob("part-*.arrow"))
    with pa.memory_map(str(shard)) as source:
        table = pa.ipc.open_file(source).read_all()
    hidden = matrix(table, "hidden").copy()
    hidden[-1, -1] = np.inf
    column = pa.FixedSizeListArray.from_arrays(pa.array(hidden.reshape(-1)), hidden.shape[1])
    place = table.schema.get_field_index("hidden")
    with pytest.raises(DataError, match="hidden states that are not finite.*run again to recompute it"):
        prediction_shards.read_hidden_states(shard, table.set_column(place, "hidden", column), 2)
    layer = transformer_layers(teacher.classifier.stock)[0]
    layer.register_forward_hook(lambda _m, _i, out: out * 1e6)
    with pytest.raises(ModelError, match=r"hidden states in layers \[0, -1\] that are not finite in float16"):
        teacher_predictions(teacher, streams, tmp_path / "other", layers=[0, -1], batch_tokens=600)
    assert not list((tmp_path / "other").glob("part-*"))


def test_a_shard_twice_is_refused(cached):
    teacher, streams, directory = cached
    shard = sorted(directory.glob("part-*.arrow"))[0]
    (directory / "part-copy.arrow").write_bytes(shard.read_bytes())
    with pytest.raises(DataError, match="in more than one shard"):
        teacher_predictions(teacher, streams, directory, batch_tokens=600)


@pytest.mark.parametrize("size", [1, 7])
def test_item_embeddings_are_cached_with_a_checksum(size, tmp_path):
    values = np.arange(12 * size, dtype=np.float32)
    column = pa.FixedSizeListArray.from_arrays(pa.array(values), size)
    write_cached(pa.table({"content": column}), tmp_path / "a.arrow", "owner")
    np.testing.assert_array_equal(matrix(read_cached(tmp_path / "a.arrow", "owner"), "content").ravel(), values)
    with pytest.raises(DataError, match="was truncated or edited, or belongs to another teacher"):
        read_cached(tmp_path / "a.arrow", "another")
    content = bytearray((tmp_path / "a.arrow").read_bytes())
    place = content.index(values[1 : 1 + 4].tobytes())
    content[place] ^= 255
    (tmp_path / "a.arrow").write_bytes(content)
    with pytest.raises(DataError, match="was truncated or edited"):
        read_cached(tmp_path / "a.arrow", "owner")
