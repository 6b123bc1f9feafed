"""Stock classes on whole texts answer as the bundle does, or merging says how far a merged checkpoint is off.

Public reports: Qwen3-Embedding's tokenizer puts <|endoftext|> behind a text and pads with another token, so that stock
classes pool the end token.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoTokenizer

from llmrec_peft.checkpoints.checksum import with_checksum
from llmrec_peft.checkpoints.loading import load_trained
from llmrec_peft.checkpoints.manifest_schema import MANIFEST, MERGED
from llmrec_peft.checkpoints.model_card import CARD
from llmrec_peft.data.domain import Domain
from llmrec_peft.errors import BundleError
from llmrec_peft.evaluation.calibration import Calibration
from llmrec_peft.merging import merge_bundle as merge_module
from llmrec_peft.merging.merge_bundle import MergeOptions, merge_bundle
from llmrec_peft.merging.stock_comparison import StockModel
from llmrec_peft.models import base as bases
from llmrec_peft.models.base import load_tokenizer
from llmrec_peft.models.fingerprints import fits, tokenizer_fingerprint
from tests.conftest import make_tokenizer
from tests.support.bundles import DOMAIN, edit_manifest, write_bundle
from tests.support.stock import (
    END,
    as_roberta,
    framed,
    in_sequence,
    of_pieces,
    prompts_of,
    stock_text_logits,
    template,
    write_base,
)

pytestmark = pytest.mark.usefixtures("one_thread")
MOVIES = Domain.from_dict(DOMAIN)

ENDS = {
    "qwen3-embedding": ("llama", lambda: framed(template(f"$A {END}"))),
    "llama, add_eos_token": ("llama", lambda: framed(template(f"<s> $A {END}"), bos_token="<s>")),
    "in a sequence, padded with the end": ("qwen2", lambda: framed(in_sequence(f"<s> $A {END}"), pad_token=END)),
    "roberta's on a decoder": ("gpt2", lambda: framed(as_roberta)),
    "two tokens": ("gpt2", lambda: framed(template(f"$A [SEP] {END}"))),
}


@pytest.mark.parametrize("name", ENDS)
def test_an_end_token_is_not_what_stock_classes_read(name, tmp_path):
    """Others of the kind: whatever puts a token behind a text, by any post-processor, whatever pads."""
    kind, make = ENDS[name]
    base = write_base(tmp_path / "base", make(), kind)
    assert AutoTokenizer.from_pretrained(base)("a").input_ids[-1] in AutoTokenizer.from_pretrained(base).all_special_ids
    bundle = write_bundle(tmp_path / "bundle", base, r=4)
    found = merge_bundle(bundle, tmp_path / "merged")
    texts, expected = prompts_of(bundle, MOVIES)
    assert expected.std() > 0.1
    assert torch.allclose(stock_text_logits(tmp_path / "merged", texts), expected, atol=2e-5)
    assert found["text_same_tokens"] == found["stock_prompts"] == 8
    assert found["text_difference"] <= 2e-5 and found["stock_difference"] <= 2e-5
    left = stock_text_logits(tmp_path / "merged", texts, "left")
    if kind != "gpt2":  # learned positions move
        assert torch.allclose(left, expected, atol=2e-5) and found["text_left_difference"] <= 2e-5
    else:
        assert found["text_left_difference"] > 0.05
        assert "Pad on the right" in (tmp_path / "merged" / CARD).read_text("utf-8")


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("begins", lambda: framed(template("<s> $A"), bos_token="<s>")),
        ("pads with its end", lambda: framed(template("$A"), pad_token=END)),
        ("has no pad", lambda: framed(template("$A"), pad_token=None)),
    ],
)
def test_other_frames_stay_as_they_are(name, make, tmp_path):
    """Prefix tokens, pad == eos, no pad: the saved tokenizer frames a text as the base's does."""
    base = write_base(tmp_path / "base", make())
    bundle = write_bundle(tmp_path / "bundle", base, r=4)
    found = merge_bundle(bundle, tmp_path / "merged")
    texts, expected = prompts_of(bundle, MOVIES)
    assert torch.allclose(stock_text_logits(tmp_path / "merged", texts), expected, atol=2e-5)
    assert found["text_same_tokens"] == 8 and found["text_left_difference"] <= 2e-5
    both = [AutoTokenizer.from_pretrained(path)("Heat ->").input_ids for path in (base, tmp_path / "merged")]
    assert both[0] == both[1]


def test_encoders_keep_both(tiny_base, tmp_path):
    base = tmp_path / "base"
    model = transformers.AutoModelForMaskedLM.from_pretrained(tiny_base("bert"))
    model.save_pretrained(base)
    framed(template("[CLS] $A [SEP]")).save_pretrained(base)
    bundle = write_bundle(tmp_path / "bundle", base, r=4)
    found = merge_bundle(bundle, tmp_path / "merged")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert tokenizer.convert_ids_to_tokens(tokenizer("a").input_ids)[-1] == "[SEP]"
    assert found["text_same_tokens"] == 8 and found["text_difference"] <= 2e-5
    (ids,) = re.findall(r"before, behind = (\[\d+\], \[\d+\])", (tmp_path / "merged" / CARD).read_text("utf-8"))
    assert ids == f"[{tokenizer.cls_token_id}], [{tokenizer.sep_token_id}]"


@pytest.mark.parametrize("options", [{"end": False}, {"end": True}, {"end": True, "lower": True}])
def test_texts_that_give_other_tokens_are_measured_and_said(options, tmp_path):
    """SentencePiece's space before each piece, T5's end token, lower-casing: whole texts differ, pooling does not."""
    bundle = write_bundle(tmp_path / "bundle", write_base(tmp_path / "base", of_pieces(**options)), r=4)
    found = merge_bundle(bundle, tmp_path / "merged")
    texts, expected = prompts_of(bundle, MOVIES, found["answers"])
    assert found["stock_difference"] <= 2e-5 and found["text_same_tokens"] == 0
    through_text = (stock_text_logits(tmp_path / "merged", texts) - expected).abs().max()
    assert 0.01 < found["text_difference"] <= through_text + 1e-4  # merging takes 8 of these prompts
    card = (tmp_path / "merged" / CARD).read_text("utf-8")
    assert "gives other tokens than its pieces in 8 of 8 cases" in card and "join them as above" in card


def test_a_tokenizer_that_keeps_its_end_token_is_refused_by_name(tmp_path, monkeypatch):
    """Before anything is written: tokenizers in Python, and post-processors of kinds that come later."""
    monkeypatch.setattr(bases, "leave_end_token_out", lambda tokenizer: None)
    bundle = write_bundle(tmp_path / "bundle", write_base(tmp_path / "base", ENDS["qwen3-embedding"][1]()), r=4)
    with pytest.raises(BundleError, match=rf"puts \['{re.escape(END)}'\] behind every text and cannot be told"):
        merge_bundle(bundle, tmp_path / "merged")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "bundle"]


def test_wrong_pooling_does_not_pass_the_measure(tmp_path, monkeypatch):
    """Without the rules above, the stock forward itself says so: an end token, and a marker that pads."""
    monkeypatch.setattr(merge_module, "prepare_tokenizer", lambda *args, **options: None)
    bundle = write_bundle(tmp_path / "bundle", write_base(tmp_path / "base", marked_pad()), domain=PADS, r=4)
    with pytest.raises(BundleError, match="differs in stock classes"):
        merge_bundle(bundle, tmp_path / "merged", MergeOptions(tolerance=1e9))
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("wrong", [0, 7])
def test_whole_texts_of_our_tokens_must_give_our_predictions(wrong, tiny_base, tmp_path, monkeypatch):
    """Token types, a mask of the tokenizer's own, an extra input: one of eight texts is enough."""
    plain = StockModel.of_texts

    def moved(self, texts, side):
        logits, tokens = plain(self, texts, side)
        logits[wrong] += 0.5
        return logits, tokens

    monkeypatch.setattr(StockModel, "of_texts", moved)
    bundle = write_bundle(tmp_path / "bundle", tiny_base("llama"), r=4)
    with pytest.raises(BundleError, match=r"where whole texts give our tokens, logits differ by 0\.5"):
        merge_bundle(bundle, tmp_path / "merged", MergeOptions(tolerance=1e9))
    assert not (tmp_path / "merged").exists()


PADS = {**DOMAIN, "marker": " [SEP]"}


def marked_pad():
    """A tokenizer that pads with a token that the domain's marker ends in."""
    return framed(template("$A"), pad_token="[SEP]")


@pytest.mark.parametrize("marker", ["[SEP]", " [SEP]", " ->[SEP]"])
def test_a_marker_that_ends_in_the_pad_token(marker, tmp_path):
    """Stock classes skip pads by their id: another token pads the merged model. Also of unk and eos that pad."""
    domain = {**DOMAIN, "marker": marker}
    bundle = write_bundle(tmp_path / "bundle", write_base(tmp_path / "base", marked_pad()), domain=domain, r=4)
    found = merge_bundle(bundle, tmp_path / "merged")
    texts, expected = prompts_of(bundle, Domain.from_dict(domain))
    assert found["stock_difference"] <= 2e-5
    assert torch.allclose(stock_text_logits(tmp_path / "merged", texts), expected, atol=2e-5)
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["pad_token_id"] != AutoTokenizer.from_pretrained(tmp_path / "base").sep_token_id
    load_trained(tmp_path / "merged")


def test_earlier_bundles_load_and_earlier_merged_models_are_refused(tmp_path):
    """Both hold the fingerprint of the base's tokenizer as it was. The merged ones answer wrongly in other programs."""
    base = write_base(tmp_path / "base", ENDS["llama, add_eos_token"][1]())
    raw = tokenizer_fingerprint(AutoTokenizer.from_pretrained(base))
    changed = load_tokenizer(str(base))
    assert tokenizer_fingerprint(changed) != raw and fits(changed, raw) and not fits(make_tokenizer(), raw)
    bundle = write_bundle(tmp_path / "bundle", base, r=4)
    merge_bundle(bundle, tmp_path / "merged")
    edit_manifest(
        bundle, lambda manifest: manifest.update(with_checksum({**manifest, "tokenizer": {"fingerprint": raw}}))
    )
    load_trained(bundle)
    merge_bundle(bundle, tmp_path / "again")
    merged = tmp_path / "merged"
    AutoTokenizer.from_pretrained(base).save_pretrained(merged)
    manifest = json.loads((merged / MANIFEST).read_text("utf-8"))
    from llmrec_peft.checkpoints.manifest import write_manifest

    write_manifest(merged, {**manifest, "tokenizer": {"fingerprint": raw}}, MERGED)
    with pytest.raises(BundleError, match="puts an end token behind every text.*merge again"):
        load_trained(merged)


def test_the_cards_run_with_transformers_alone(tmp_path):
    """The code of both cards, as it stands there, run without this package: BOS and end token, two before, pieces."""
    cases = {
        "both": framed(template(f"<s> $A {END}"), bos_token="<s>"),
        "two before": framed(template("<s> [CLS] $A"), bos_token="<s>"),
        "pieces": of_pieces(end=True),
    }
    jobs, expected = [], []
    for name, tokenizer in cases.items():
        base = write_base(tmp_path / name / "base", tokenizer)
        calibration = {"temperature": 1.5, "bias": [0.25, -0.25]}
        bundle = write_bundle(tmp_path / name / "bundle", base, r=4, calibration=calibration)
        merge_bundle(bundle, tmp_path / name / "merged")
        for directory, block in ((bundle, 1), (tmp_path / name / "merged", 0)):
            code = re.findall(r"^```python\n(.*?)^```$", (directory / CARD).read_text("utf-8"), flags=re.M | re.S)
            jobs.append({"base": str(base), "bundle": str(directory), "code": code[block]})
            expected.append(of_card(bundle))
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    script = Path(__file__).with_name("run_peft_alone.py")
    command = [sys.executable, str(script), str(tmp_path / "jobs.json"), str(tmp_path / "out.json")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for job, found, wanted in zip(jobs, json.loads((tmp_path / "out.json").read_text()), expected, strict=True):
        assert torch.allclose(torch.tensor(found[0]), wanted[0], atol=2e-5), job["bundle"]
        assert torch.allclose(torch.tensor(found[1]), wanted[1], atol=2e-5), job["bundle"]


def of_card(bundle: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and probabilities of the prompt of a card, with the templates' fields left as they are."""
    from llmrec_peft.data.vocabulary import Vocabulary

    loaded = load_trained(bundle)
    vocabulary = Vocabulary(MOVIES, loaded.tokenizer)
    assert not len(vocabulary.suffix)
    header, event = (vocabulary.tokens([text])[0] for text in (MOVIES.header, MOVIES.event))
    pieces = [vocabulary.prefix, header, event, vocabulary.marker, vocabulary.outcomes[-1], event, vocabulary.marker]
    ids = torch.tensor([[int(token) for piece in pieces for token in piece]])
    with torch.no_grad():
        logits = loaded.classifier(ids, markers=torch.tensor([ids.shape[1] - 1]))
    probabilities = Calibration.from_dict(loaded.calibration).apply(logits.numpy())
    return logits[0], torch.tensor(probabilities[0]).float()


# -- bases without sdpa --------------------------------------------------------------------------


def _sizes(tokenizer, **own):
    return {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None,
            "eos_token_id": 0, "initializer_range": 0.2, "max_position_embeddings": 512, "hidden_size": 32,
            "intermediate_size": 64, **own}  # fmt: skip


MODERN = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
NO_SDPA = {
    "gpt_neo": lambda t: transformers.GPTNeoConfig(
        **_sizes(t), num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]], window_size=256
    ),
    "gemma2": lambda t: transformers.Gemma2Config(
        **_sizes(t), **MODERN, sliding_window=256, query_pre_attn_scalar=8, attn_logit_softcapping=5.0
    ),
    "gpt_oss": lambda t: transformers.GptOssConfig(
        **_sizes(t), **MODERN, sliding_window=256, num_local_experts=2, num_experts_per_tok=1,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", NO_SDPA)
def test_a_base_without_sdpa_merges_and_loads_again(kind, tmp_path):
    """It is loaded as the bundle was, then and later: soft caps, attention sinks, scores without a scale."""
    tokenizer = make_tokenizer()
    base = write_base(tmp_path / "base", tokenizer, config=NO_SDPA[kind](tokenizer))
    bundle = write_bundle(tmp_path / "bundle", base, r=4, attn="eager", target_modules=["q_proj", "v_proj"])
    found = merge_bundle(bundle, tmp_path / "merged")
    assert found["max_difference"] <= 2e-5 and found["stock_difference"] <= 2e-5 and found["spread"] > 0.1
    texts, expected = prompts_of(bundle, MOVIES, 3)
    assert torch.allclose(prompts_of(tmp_path / "merged", MOVIES, 3)[1], expected, atol=2e-5)
    assert load_trained(tmp_path / "merged").classifier.config._attn_implementation == "eager"
    assert torch.allclose(stock_text_logits(tmp_path / "merged", texts), expected, atol=2e-5)


@pytest.mark.parametrize("name", ["T5Tokenizer", "LlamaTokenizer", "Qwen2Tokenizer", "GPT2Tokenizer"])
def test_classes_that_make_their_own_post_processor(name, tmp_path):
    """T5's puts `</s>` back whenever it is loaded; Llama's, Qwen's and GPT-2's go by what was saved."""
    feedback = sorted({*"abcdefghijklmnopqrstuvwxyz", *map(chr, range(33, 127)), "▁", "Ġ", "Ċ", "\n"})
    words = ["<pad>", "</s>", "<unk>", "<s>", "<|endoftext|>", *feedback]
    vocabulary = {word: number for number, word in enumerate(dict.fromkeys(words))}
    options = {"vocab": vocabulary, "merges": [], "add_eos_token": True, "pad_token": "<pad>"}
    if name == "T5Tokenizer":
        options = {"vocab": [(word, -float(number)) for word, number in vocabulary.items()]}
    tokenizer = getattr(transformers, name)(**options)
    base = write_base(tmp_path / "base", tokenizer)
    bundle = write_bundle(tmp_path / "bundle", base, r=4, head_init="zero")
    raw, ours = AutoTokenizer.from_pretrained(base), load_tokenizer(str(base))
    assert raw("a").input_ids[:-1] == ours("a").input_ids and raw("a").input_ids[-1] == raw.eos_token_id
    found = merge_bundle(bundle, tmp_path / "merged")
    assert found["stock_difference"] <= 2e-5
    assert AutoTokenizer.from_pretrained(tmp_path / "merged")("a").input_ids == ours("a").input_ids
    load_trained(tmp_path / "merged")
