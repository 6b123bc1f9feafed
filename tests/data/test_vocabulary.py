"""Token tables and a domain's fixed tokens."""

from __future__ import annotations

import copy

import numpy as np
import pyarrow as pa
import pytest

from llmrec_peft.data.domain import Domain
from llmrec_peft.data.token_table import TokenTable, ranges
from llmrec_peft.data.vocabulary import Vocabulary, special_tokens_around, tokenise
from llmrec_peft.errors import StreamError

SMALL = {"name": "movies", "event": "{title}", "outcomes": {"dislike": " no\n", "like": " yes\n"}}
TEXTS = ["Toy Story", "", "Heat (Action)", "Toy Story", "日本語 🎬", "Heat (Action)", "x" * 300]


def ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("cut", [1, 2, 3, 7])
def test_a_table_holds_the_tokens_of_each_text(cut, tiny_tokenizer):
    chunks = [pa.array(TEXTS[n : n + cut], pa.large_string()) for n in range(0, len(TEXTS), cut)]
    table = TokenTable.build(Vocabulary(Domain.from_dict(SMALL), tiny_tokenizer), chunks, len(TEXTS), "texts")
    expected = [ids(tiny_tokenizer, text) for text in TEXTS]
    assert len(table) == len(TEXTS) and table.lengths.tolist() == [len(row) for row in expected]
    assert [table[n].tolist() for n in range(len(table))] == expected
    assert table.tokens.dtype == np.int32 and table.offsets.dtype == np.int64


@pytest.mark.parametrize("chunks", [[], [pa.array([], pa.large_string())], [pa.array(["", ""])]])
def test_a_table_without_tokens(chunks, tiny_tokenizer):
    table = TokenTable.build(Vocabulary(Domain.from_dict(SMALL), tiny_tokenizer), chunks, 0, "nothing")
    assert len(table) == sum(map(len, chunks)) and not table.lengths.any()
    assert [table[n].tolist() for n in range(len(table))] == [[]] * len(table)


def test_tokenise_adds_no_special_token(tiny_tokenizer):
    flat, offsets = tokenise(tiny_tokenizer, ["Heat", "no"])
    assert flat.tolist() == ids(tiny_tokenizer, "Heat") + ids(tiny_tokenizer, "no") and offsets[0] == 0
    assert not set(flat.tolist()) & set(tiny_tokenizer.all_special_ids)
    assert [part.tolist() for part in tokenise(tiny_tokenizer, [])] == [[], [0]]


def test_ranges():
    found = ranges(np.array([5, 0, 9, 2]), np.array([3, 0, 1, 2]))
    assert found.tolist() == [5, 6, 7, 9, 2, 3]
    assert ranges(np.empty(0, np.int64), np.empty(0, np.int64)).tolist() == []


def test_fixed_tokens(tiny_tokenizer):
    vocabulary = Vocabulary(Domain.from_dict(SMALL), tiny_tokenizer)
    assert vocabulary.marker.tolist() == ids(tiny_tokenizer, " ->")
    assert [word.tolist() for word in vocabulary.outcomes] == [
        ids(tiny_tokenizer, word) for word in (" no\n", " yes\n")
    ]
    assert {"->", *tiny_tokenizer.all_special_tokens} <= set(vocabulary.forbidden)
    assert vocabulary.headers({}, 3).to_pylist() == ["", "", ""]
    assert vocabulary.events({"title": pa.array(["a <|endoftext|>-> b\n"])}).to_pylist() == ["a < |endoftext|>- > b"]


def backend_with(tiny_tokenizer, change):
    from transformers import PreTrainedTokenizerFast

    backend = type(tiny_tokenizer.backend_tokenizer).from_str(tiny_tokenizer.backend_tokenizer.to_str())
    change(backend)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>", pad_token="<|pad|>")


def test_outcomes_that_this_tokenizer_cannot_tell_apart(tiny_tokenizer):
    from tokenizers import normalizers

    lower = backend_with(tiny_tokenizer, lambda b: setattr(b, "normalizer", normalizers.Lowercase()))
    domain = Domain.from_dict({**SMALL, "outcomes": {"a": " Yes\n", "b": " yes\n"}})
    with pytest.raises(
        StreamError, match="outcome ' yes.n' of 'b' has the same tokens as that of 'a'; choose another word"
    ):
        Vocabulary(domain, lower)
    Vocabulary(domain, tiny_tokenizer)


@pytest.mark.parametrize(
    ("drop", "message"), [("->", "marker ' ->' has no tokens"), ("y", "outcome 'y' of 'b' has no tokens")]
)
def test_words_that_this_tokenizer_drops(drop, message, tiny_tokenizer):
    from tokenizers import normalizers

    def change(backend):
        backend.normalizer = normalizers.Sequence([normalizers.Replace(drop, ""), normalizers.Strip()])

    domain = Domain.from_dict({**SMALL, "outcomes": {"a": "n", "b": "y"}})
    with pytest.raises(StreamError, match=message):
        Vocabulary(domain, backend_with(tiny_tokenizer, change))


def test_special_tokens_around_a_text(tiny_tokenizer):
    from tokenizers.processors import TemplateProcessing

    assert [part.tolist() for part in special_tokens_around(tiny_tokenizer)] == [[], []]
    start, end = (tiny_tokenizer.convert_tokens_to_ids(token) for token in ("<s>", "<|endoftext|>"))
    for single, expected in (("<s> $A", ([start], [])), ("<s> $A <|endoftext|>", ([start], [end]))):
        processor = TemplateProcessing(single=single, special_tokens=[("<s>", start), ("<|endoftext|>", end)])
        changed = backend_with(tiny_tokenizer, lambda b, p=processor: setattr(b, "post_processor", p))
        assert tuple(part.tolist() for part in special_tokens_around(changed)) == expected


def normalising(tiny_tokenizer, *steps):
    """A copy of the tokenizer that normalises text first."""
    from tokenizers import normalizers

    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(list(steps))
    return tokenizer


@pytest.mark.parametrize("title", ["Heat －＞ yes Jaws", "－＞", "a －－＞＞ b －＞ －＞", "＜|endoftext|＞ －＞"])
def test_a_normalising_tokenizer_brings_no_marker_out_of_another_spelling(title, tiny_tokenizer):
    from tokenizers import normalizers

    tokenizer = normalising(tiny_tokenizer, normalizers.NFKC())
    vocabulary = Vocabulary(Domain.from_dict({**SMALL, "marker": "->"}), tokenizer)
    assert "->" in tokenizer.decode(ids(tokenizer, title))
    texts = vocabulary.events({"title": pa.array([title, "plain", "ends -", "＞ begins"])})
    flat, offsets = vocabulary.tokens(texts.to_pylist())
    marker = vocabulary.marker.tolist()
    rows = [flat[offsets[n] : offsets[n + 1]].tolist() for n in range(4)]
    for row in rows:
        assert not [n for n in range(len(row)) if row[n : n + len(marker)] == marker]
        assert not set(row) & set(tokenizer.all_special_ids)
    assert rows[1] == ids(tokenizer, "plain") and rows[2] == ids(tokenizer, "ends -")
    assert rows[3] == ids(tokenizer, "＞ begins")


def test_special_tokens_of_the_template_stay(tiny_tokenizer):
    domain = Domain.from_dict({**SMALL, "event": "<s>{title}"})
    vocabulary = Vocabulary(domain, tiny_tokenizer)
    texts = vocabulary.events({"title": pa.array(["Heat <s> <|pad|>"])}).to_pylist()
    assert vocabulary.tokens(texts)[0].tolist() == ids(tiny_tokenizer, "<s>Heat < s> < |pad|>")
