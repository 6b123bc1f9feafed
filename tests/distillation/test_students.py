"""Students before training: item ids as tokens, and some of a teacher's layers."""

import numpy as np
import pyarrow as pa
import pytest
import torch

from llmrec_peft import load_classifier
from llmrec_peft.checkpoints.bundle import save_bundle
from llmrec_peft.data.collator import StreamCollator
from llmrec_peft.data.domain import Domain
from llmrec_peft.data.streams import IndependentPrompts, build_streams
from llmrec_peft.data.vocabulary import Vocabulary
from llmrec_peft.distillation.content_embedding import add_content, merge_content
from llmrec_peft.distillation.distill_options import StudentOptions
from llmrec_peft.distillation.item_id_student import first_item, item_id_tokenizer, write_item_id_student
from llmrec_peft.distillation.shallow_student import choose_layers, write_shallow_student
from llmrec_peft.distillation.teacher_item_embeddings import principal_components
from llmrec_peft.errors import BundleError, ConfigError, DataError, DomainError, ModelError, StreamError
from llmrec_peft.merging.merging import merge_bundle
from llmrec_peft.models.base import load_tokenizer
from llmrec_peft.models.predict import predict

pytestmark = pytest.mark.usefixtures("one_thread")
TEACHER = Domain.from_dict(
    {
        "name": "movies",
        "header": "Movies one viewer rated:\n",
        "event": "{title} ({genres})",
        "outcomes": {"dislike": " no\n", "like": " yes\n"},
        "label": {"column": "rating", "above": 3},
        "simultaneous": "isolate",
        "negatives": {"per_positive": 1},
        "stream": {"context": 2, "targets": 3, "max_length": 300},
    }
)
IDS = TEACHER.of_ids(4, 5)


def make_ids(log, directory, **options):
    write_item_id_student(log.items.column("item_id"), IDS, StudentOptions(width=16, heads=2, **options), 0, directory)
    return load_classifier(str(directory), IDS, "full")


def test_an_event_is_one_token_and_an_outcome_another(small_log, tmp_path):
    log = small_log()
    classifier = make_ids(log, tmp_path)
    vocabulary = Vocabulary(IDS, classifier.tokenizer)
    assert len(vocabulary.marker) == 0 and [len(word) for word in vocabulary.outcomes] == [1, 1]
    streams = build_streams(log.split().train, IDS, classifier.tokenizer)
    first = first_item(IDS)
    for number in range(len(streams)):
        stream = streams[number]
        items = stream.input_ids[stream.markers] - first
        assert items.tolist() == streams.target_items[stream.targets].tolist()
    assert classifier.tokenizer.bos_token_id == stream.input_ids[0]
    assert streams.dropped_context == 0


def test_the_longest_window_fits(small_log, tmp_path):
    """`of_ids` reckons how long a window can be: with isolated moments and negatives it is never passed."""
    log = small_log(users=3, events=40)
    streams = build_streams(log.split().train, IDS, make_ids(log, tmp_path).tokenizer)
    assert streams.lengths.max() <= IDS.stream.max_length
    full = np.flatnonzero(np.diff(streams.target_offsets) == 10)
    assert len(full)


def test_streams_of_ids_equal_independent_prompts(small_log, tmp_path):
    log = small_log()
    classifier = make_ids(log, tmp_path)
    with torch.no_grad():
        for value in classifier.parameters():
            value.normal_(std=0.3)
    streams = build_streams(log.split().test, IDS, classifier.tokenizer)
    collator = StreamCollator(classifier.tokenizer.pad_token_id, 200)
    whole = predict(classifier, streams, collator, batch_tokens=200)
    alone = predict(classifier, IndependentPrompts(streams), collator, batch_tokens=150)
    np.testing.assert_allclose(whole.logits, alone.logits, atol=1e-4)
    assert whole.logits.std() > 0.01


def test_an_unknown_item_is_named(small_log, tmp_path):
    classifier = make_ids(small_log(), tmp_path)
    grown = small_log(items=30)
    with pytest.raises(DataError, match=r"'item i2\d' is unknown to this model of item ids .*distil it again"):
        build_streams(grown.split().train, IDS, classifier.tokenizer)


def test_a_bundle_on_ids_is_merged_with_a_log_alone(small_log, tmp_path):
    """Made-up items are none that such a model has."""
    make_ids(small_log(), tmp_path / "base")
    adapted = load_classifier(str(tmp_path / "base"), IDS, "lora")
    save_bundle(tmp_path / "bundle", adapted, adapted.tokenizer, IDS.to_dict())
    with pytest.raises(BundleError, match="cannot answer made-up items.*; give streams, or data.path"):
        merge_bundle(tmp_path / "bundle", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    streams = build_streams(small_log().split().test, IDS, adapted.tokenizer)
    assert merge_bundle(tmp_path / "bundle", tmp_path / "merged", streams=streams)["answers"] == streams.num_targets


def test_an_id_cannot_be_an_outcome_or_a_special_token():
    ids = pa.array(["no", "<s>", "<unknown item>", "item", "a\tb"])
    tokenizer = item_id_tokenizer(ids, IDS)
    vocabulary = Vocabulary(IDS, tokenizer)
    flat, _ = vocabulary.tokens(vocabulary.events({"item_id": pa.array(["no", "<s>", "<unknown item>"])}).to_pylist())
    assert len(set(flat.tolist())) == 3 and flat.min() >= first_item(IDS)


def test_ids_that_differ_by_a_tab_are_refused():
    with pytest.raises(DataError, match="stands for two items"):
        item_id_tokenizer(pa.array(["a b", "a\tb"]), IDS)


def test_only_item_ids_may_do_without_a_marker(tiny_tokenizer):
    with pytest.raises(DomainError, match="marker must be a text that is not blank"):
        Domain.from_dict({**TEACHER.to_dict(), "marker": ""})
    with pytest.raises(StreamError, match="marker '' has no tokens"):
        Vocabulary(IDS, tiny_tokenizer)


def test_the_tokenizer_survives_its_directory(small_log, tmp_path):
    log = small_log()
    made = item_id_tokenizer(log.items.column("item_id"), IDS)
    made.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    again = load_tokenizer(str(tmp_path))
    assert again.get_vocab() == made.get_vocab() and again.pad_token == made.pad_token
    assert again("item i3")["input_ids"] == made("item i3")["input_ids"]


def test_content_merges_into_stock_embeddings(small_log, tmp_path):
    """Predictions are the same before and after the merge, and items without training rows have their content alone."""
    log = small_log()
    classifier = make_ids(log, tmp_path)
    torch.manual_seed(0)
    content = torch.randn(log.num_items, 6)
    seen = torch.arange(log.num_items) < 20
    add_content(classifier, content, seen, first_item(IDS), dropout=0.5)
    with torch.no_grad():
        classifier.stock.get_input_embeddings().projection.weight.normal_()
    streams = build_streams(log.split().test, IDS, classifier.tokenizer)
    collator = StreamCollator(classifier.tokenizer.pad_token_id, 200)
    apart = predict(classifier, streams, collator, batch_tokens=200)
    embedding = classifier.stock.get_input_embeddings()
    projected = embedding.projection(content).detach()
    merge_content(classifier)
    merged = classifier.stock.get_input_embeddings()
    assert type(merged) is torch.nn.Embedding
    rows = merged.weight[first_item(IDS) :].detach()
    torch.testing.assert_close(rows[20:], projected[20:])
    assert (rows[:20] - projected[:20]).abs().max() > 1e-4
    np.testing.assert_allclose(predict(classifier, streams, collator, batch_tokens=200).logits, apart.logits, atol=1e-6)


def test_dropout_leaves_out_items_own_weights_in_training_alone(small_log, tmp_path):
    log = small_log()
    classifier = make_ids(log, tmp_path)
    add_content(classifier, torch.ones(log.num_items, 2), torch.ones(log.num_items, dtype=bool), first_item(IDS), 0.5)
    embedding = classifier.stock.get_input_embeddings()
    ids = torch.arange(first_item(IDS), first_item(IDS) + 20)[None].repeat(50, 1)
    embedding.train()
    torch.manual_seed(0)
    dropped = (embedding(ids) == embedding.projection(embedding.content[ids])).all(-1).float().mean()
    assert 0.4 < dropped < 0.6
    special = torch.zeros(1000, 1, dtype=torch.long) + 1
    assert (embedding(special) == embedding.embedding(special)).all()
    embedding.eval()
    assert not (embedding(ids) == embedding.projection(embedding.content[ids])).all(-1).any()


def test_reduced_content_is_white():
    rng = np.random.default_rng(0)
    content = rng.normal(size=(300, 10)) @ rng.normal(size=(10, 12)) + 5
    found = principal_components(content, 4)
    np.testing.assert_allclose(np.cov(found.T, bias=True), np.eye(4), atol=1e-3)
    assert principal_components(content, 100).shape == (300, 12)


@pytest.mark.parametrize(
    ("depth", "layers", "pick", "kept"),
    [(30, 10, "first", list(range(10))), (30, 3, "spread", [0, 14, 29]), (4, 1, "spread", [0])],
)
def test_layers_are_chosen(depth, layers, pick, kept):
    assert choose_layers(depth, layers, pick) == kept


def test_more_layers_than_the_teacher_has_are_refused():
    with pytest.raises(ConfigError, match="student.layers must be from 1 to 3, the teacher has 4; got 4"):
        choose_layers(4, 4, "first")
    assert choose_layers(4, 4, "first", pruned=True) == [0, 1, 2, 3]


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_shallow_student_computes_what_its_layers_do(method, tiny_base, small_log, tmp_path):
    """One of two layers, norm and head on top: equal to the teacher with its second layer taken out."""
    domain = Domain.from_dict({**TEACHER.to_dict()})
    torch.manual_seed(0)
    teacher = load_classifier(str(tiny_base("llama")), domain, method)
    with torch.no_grad():
        for name, value in teacher.named_parameters():
            if "lora_B" in name or method == "full":
                value.add_(0.1 * torch.randn_like(value))
    streams = build_streams(small_log().split().test, domain, teacher.tokenizer)
    collator = StreamCollator(teacher.tokenizer.pad_token_id, 400)
    layer = teacher.stock.model.layers[1]
    forward, layer.forward = layer.forward, lambda hidden, *_, **__: hidden
    wanted = predict(teacher, streams, collator, batch_tokens=400).logits
    layer.forward = forward
    assert np.abs(predict(teacher, streams, collator, batch_tokens=400).logits - wanted).max() > 1e-3
    write_shallow_student(teacher, [0], tmp_path)
    student = load_classifier(str(tmp_path), domain, "full")
    assert student.config.num_hidden_layers == len(student.stock.model.layers) == 1
    np.testing.assert_allclose(predict(student, streams, collator, batch_tokens=400).logits, wanted, atol=1e-5)


def test_a_bottleneck_teacher_has_no_shallow_student(tiny_base, tmp_path):
    teacher = load_classifier(str(tiny_base("llama")), TEACHER, "adapter")
    with pytest.raises(ModelError, match="a stock student cannot hold a bottleneck adapter"):
        write_shallow_student(teacher, [0], tmp_path)
