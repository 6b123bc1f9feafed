"""The forward pass: answers at markers, equal to stock models and to independent rows."""

from __future__ import annotations

import pytest
import torch

from llmrec_peft.checkpoints.loading import load_classifier
from llmrec_peft.errors import ConfigError, ModelError
from llmrec_peft.models.tuning_options import LoraOptions, ModelOptions

DECODERS = ("llama", "qwen2", "mistral", "gpt2")


def stream_with_candidates(generator: torch.Generator, vocabulary: int) -> dict[str, torch.Tensor]:
    """Two rows: prefix of 6, candidates of 3 and 4, 5 more of prefix, candidate of 2; the second row shorter."""
    segment = [0] * 6 + [1] * 3 + [2] * 4 + [0] * 5 + [3] * 2
    positions = [*range(6), *range(6, 9), *range(6, 10), *range(6, 11), *range(11, 13)]
    short = 13
    ids = torch.randint(5, vocabulary, (2, len(segment)), generator=generator)
    rows = torch.tensor([segment, segment[:short] + [-1] * (len(segment) - short)])
    ids[1, short:] = 1
    position_ids = torch.tensor([positions, positions[:short] + [0] * (len(segment) - short)])
    ends = [5, 8, 12, 17, 19]
    markers = torch.tensor(ends + [len(segment) + end for end in ends[:3]])
    return {"input_ids": ids, "position_ids": position_ids, "segment": rows, "markers": markers}


def independent_rows(batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """The tokens that each marker sees, each as a row of its own."""
    length = batch["input_ids"].shape[1]
    rows = []
    for marker in batch["markers"].tolist():
        row, end = divmod(marker, length)
        segment = batch["segment"][row]
        seen = [k for k in range(end + 1) if segment[k] == 0 or segment[k] == segment[end]]
        rows.append(batch["input_ids"][row, seen])
    return rows


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", DECODERS)
def test_candidates_equal_independent_rows(kind, attn, make, shake, answer):
    classifier = shake(make(kind, attn=attn))
    batch = stream_with_candidates(torch.Generator().manual_seed(3), classifier.config.vocab_size)
    together = answer(classifier, batch)
    apart = [
        answer(
            classifier,
            {
                "input_ids": row[None],
                "position_ids": torch.arange(len(row))[None],
                "markers": torch.tensor([len(row) - 1]),
            },
        )
        for row in independent_rows(batch)
    ]
    apart = torch.cat(apart)
    assert together.shape == (8, 2) and together.dtype == torch.float32
    assert torch.allclose(together, apart, atol=1e-5)
    assert apart.std() > 0.1, "answers that hardly differ would agree whatever the mask"


@pytest.mark.parametrize("kind", DECODERS)
def test_candidate_content_reaches_no_other_prediction(kind, make, shake, answer):
    classifier = shake(make(kind))
    batch = stream_with_candidates(torch.Generator().manual_seed(3), classifier.config.vocab_size)
    before = answer(classifier, batch)
    changed = batch["input_ids"].clone()
    changed[0, 6:9] = 7  # the first candidate of the first row
    after = answer(classifier, {**batch, "input_ids": changed})
    assert not torch.allclose(before[1], after[1], atol=1e-3)
    kept = [0, 2, 3, 4, 5, 6, 7]
    assert torch.equal(before[kept], after[kept])


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", DECODERS)
def test_left_and_right_padding_agree(kind, attn, make, shake, answer):
    classifier = shake(make(kind, attn=attn))
    ids = torch.randint(5, classifier.config.vocab_size, (1, 9), generator=torch.Generator().manual_seed(1))
    plain = answer(
        classifier,
        {"input_ids": ids, "position_ids": torch.arange(9)[None], "markers": torch.tensor([4, 8])},
    )
    pad = torch.full((1, 4), classifier.config.pad_token_id)
    right = answer(
        classifier,
        {
            "input_ids": torch.cat([ids, pad], 1),
            "position_ids": torch.cat([torch.arange(9), torch.zeros(4, dtype=torch.long)])[None],
            "markers": torch.tensor([4, 8]),
        },
    )
    left = answer(
        classifier,
        {
            "input_ids": torch.cat([pad, ids], 1),
            "position_ids": torch.cat([torch.zeros(4, dtype=torch.long), torch.arange(9)])[None],
            "attention_mask": torch.cat([torch.zeros(1, 4), torch.ones(1, 9)], 1).long(),
            "markers": torch.tensor([8, 12]),
        },
    )
    assert torch.allclose(plain, right, atol=1e-5)
    assert torch.allclose(plain, left, atol=1e-5)


def test_left_padded_candidates(make, shake, answer):
    classifier = shake(make("llama"))
    batch = stream_with_candidates(torch.Generator().manual_seed(3), classifier.config.vocab_size)
    one = {key: batch[key][:1] for key in ("input_ids", "position_ids", "segment")} | {"markers": batch["markers"][:5]}
    length = one["input_ids"].shape[1]
    padded = {
        "input_ids": torch.cat([torch.full((1, 3), 1), one["input_ids"]], 1),
        "position_ids": torch.cat([torch.zeros(1, 3, dtype=torch.long), one["position_ids"]], 1),
        "segment": torch.cat([torch.zeros(1, 3, dtype=torch.long), one["segment"]], 1),
        "attention_mask": torch.cat([torch.zeros(1, 3), torch.ones(1, length)], 1).long(),
        "markers": one["markers"] + 3,
    }
    assert torch.allclose(answer(classifier, one), answer(classifier, padded), atol=1e-5)


@pytest.mark.parametrize("kind", DECODERS)
def test_one_marker_equals_the_stock_forward(kind, make, shake, answer, prompt):
    classifier = shake(make(kind))
    with torch.no_grad():
        stock = classifier.model(input_ids=prompt["input_ids"]).logits
    assert torch.allclose(answer(classifier, prompt), stock, atol=1e-5)


def test_encoder_equals_the_stock_model(make, shake, answer):
    classifier = shake(make("bert", "full"), scale=0.05)
    ids = torch.randint(5, 200, (3, 8), generator=torch.Generator().manual_seed(2))
    mask = torch.tensor([[1] * 8, [1] * 6 + [0] * 2, [1] * 3 + [0] * 5])
    batch = {"input_ids": ids, "attention_mask": mask, "markers": torch.tensor([7, 13, 18])}
    with torch.no_grad():
        stock = classifier.stock(input_ids=ids, attention_mask=mask).logits
    assert torch.equal(answer(classifier, batch), stock)
    reversed_rows = answer(classifier, {**batch, "markers": torch.tensor([18, 7])})
    assert torch.equal(reversed_rows, stock[[2, 0]])


def test_encoder_refuses_two_markers_in_a_row_and_candidates(make):
    classifier = make("bert", "head")
    ids = torch.full((2, 4), 6)
    mask = torch.ones_like(ids)
    with pytest.raises(ModelError, match="several markers"):
        classifier(ids, markers=torch.tensor([1, 3]), attention_mask=mask)
    with pytest.raises(ModelError, match="cannot hide candidates"):
        classifier(ids, markers=torch.tensor([3]), attention_mask=mask, segment=torch.zeros_like(ids))


def test_plain_rows_build_no_mask(make, monkeypatch, prompt):
    classifier = make("llama")
    seen = []
    attention = type(classifier.stock.model.layers[0].self_attn)
    original = attention.forward

    def record(self, *args, attention_mask=None, **kwargs):
        seen.append(attention_mask)
        return original(self, *args, attention_mask=attention_mask, **kwargs)

    monkeypatch.setattr(attention, "forward", record)
    positions = prompt["position_ids"].clone()
    positions[:, -3:] = 0  # pads on the right, whatever their positions
    classifier(prompt["input_ids"], positions, torch.tensor([positions.shape[1] - 4]))
    assert seen == [None, None]


def test_plain_rows_refuse_positions_that_do_not_count(make, prompt):
    classifier = make("llama")
    with pytest.raises(ModelError, match="positions 0, 1, 2"):
        classifier(prompt["input_ids"], prompt["position_ids"] + 3, prompt["markers"])


def test_candidates_need_a_kernel_that_takes_a_mask(make, prompt):
    classifier = make("llama")
    classifier.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ModelError, match="set model.attn to sdpa"):
        classifier(**prompt, segment=torch.zeros_like(prompt["input_ids"]))


def test_no_logits_of_vocabulary_size(make, prompt):
    classifier = make("llama", "full")
    shapes = []
    for module in classifier.modules():
        module.register_forward_hook(
            lambda _m, _i, output: shapes.append(output.shape) if isinstance(output, torch.Tensor) else None
        )
    classifier(**prompt)
    assert shapes and all(shape[-1] != classifier.config.vocab_size for shape in shapes)


@pytest.mark.parametrize("method", ["lora", "adapter", "head", "full"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_reach_what_trains_and_nothing_else(method, checkpointing, make, shake, prompt):
    classifier = shake(make("llama", method, activation_checkpointing=checkpointing)).train()
    classifier(**prompt).square().sum().backward()
    for name, value in classifier.named_parameters():
        assert (value.grad is not None) == value.requires_grad, name
    head = [value for name, value in classifier.named_parameters() if "score" in name and value.requires_grad]
    assert len(head) == 1 and head[0].dtype == torch.float32


def test_checkpointing_gives_the_same_gradients(make, shake, prompt):
    grads = []
    for checkpointing in (False, True):
        classifier = shake(make("llama", activation_checkpointing=checkpointing)).train()
        classifier(**prompt).square().sum().backward()
        grads.append({n: p.grad for n, p in classifier.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name, wanted in grads[1].items():
        torch.testing.assert_close(grads[0][name], wanted, rtol=0, atol=3e-5 * float(wanted.abs().max()))


def test_bfloat16_base_keeps_a_float32_head(make, prompt):
    classifier = make("llama", dtype="bfloat16")
    assert classifier.head.weight.dtype == torch.float32
    assert classifier.stock.model.embed_tokens.weight.dtype == torch.bfloat16
    assert classifier(**prompt).dtype == torch.float32


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_head_is_float32_under_autocast(kind, make, shake, answer, prompt):
    classifier = shake(make(kind), scale=0.05)
    batch = {**prompt, "attention_mask": torch.ones_like(prompt["input_ids"])} if kind == "bert" else prompt
    with torch.autocast("cpu", torch.bfloat16):
        logits = answer(classifier, batch)
    assert not torch.equal(logits, logits.bfloat16().float()), "numbers that bfloat16 holds come from a bfloat16 head"
    assert torch.allclose(logits, answer(classifier, batch), rtol=0.1, atol=0.3)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("method", ["lora", "adapter", "head"])
def test_low_precision_encoder(method, dtype, make, shake, prompt):
    classifier = shake(make("bert", method, dtype=dtype), scale=0.05).train()
    logits = classifier(**prompt, attention_mask=torch.ones_like(prompt["input_ids"]))
    logits.square().sum().backward()
    assert logits.dtype == torch.float32 and logits.isfinite().all()
    assert not torch.equal(logits, logits.to(getattr(torch, dtype)).float())
    grads = {name: value.grad for name, value in classifier.named_parameters() if value.requires_grad}
    assert all(grad is not None and grad.isfinite().all() for grad in grads.values())
    assert {value.dtype for value in classifier.parameters() if value.requires_grad} == {torch.float32}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_full_trains_float32_only(dtype, make):
    with pytest.raises(ConfigError, match=f"must be float32 with method full, not '{dtype}'.*mixed_precision bf16"):
        make("llama", "full", dtype=dtype)


def test_trainable_counts_and_summary(make):
    head = make("llama", "head")
    assert head.trainable_parameters()[0] == 2 * 32
    full = make("llama", "full")
    assert full.trainable_parameters()[0] == full.trainable_parameters()[1]
    lora = make("llama", r=4)
    per_layer = sum(4 * (i + o) for i, o in [(32, 32), (32, 16), (32, 16), (32, 32), (32, 64), (32, 64), (64, 32)])
    assert lora.trainable_parameters()[0] == 2 * per_layer + 2 * 32
    assert "lora on" in lora.summary() and f"{lora.trainable_parameters()[0]:,}" in lora.summary()


@pytest.mark.parametrize("method", ["lora", "adapter", "head", "full"])
def test_trainable_state_goes_round(method, make, shake, answer, prompt):
    trained = shake(make("llama", method))
    fresh = make("llama", method)
    assert not torch.allclose(answer(trained, prompt), answer(fresh, prompt), atol=1e-3)
    fresh.load_trainable_state_dict({name: value.clone() for name, value in trained.trainable_state_dict().items()})
    assert torch.equal(answer(trained, prompt), answer(fresh, prompt))


def test_trainable_state_refuses_what_does_not_fit(make):
    classifier = make("llama", "head")
    state = classifier.trainable_state_dict()
    (name,) = state
    with pytest.raises(ModelError, match=f"lacks tensor '{name}'"):
        classifier.load_trainable_state_dict({})
    with pytest.raises(ModelError, match="has an extra tensor 'other'"):
        classifier.load_trainable_state_dict({**state, "other": torch.zeros(1)})
    with pytest.raises(ModelError, match=r"shape \(3, 32\), the model's has \(2, 32\)"):
        classifier.load_trainable_state_dict({name: torch.zeros(3, 32)})


def test_load_classifier_takes_options_objects(tiny_base, domain):
    options = ModelOptions(base=str(tiny_base("llama")), head_init="zero")
    classifier = load_classifier(options, domain, LoraOptions(r=2, layers=[1]))
    assert classifier.method == "lora" and classifier.labels == ["dislike", "like"]
    assert classifier.method_options.r == 2 and not classifier.head.weight.any()


def test_load_classifier_refuses(tiny_base, domain):
    base = str(tiny_base("llama"))
    with pytest.raises(ModelError, match="needs a domain"):
        load_classifier(base)
    with pytest.raises(ConfigError, match="no option 'rank'"):
        load_classifier(base, domain, "lora", rank=3)
    with pytest.raises(ConfigError, match="method must be one of lora, qlora, adapter, head, full"):
        load_classifier(base, domain, "prefix")
    with pytest.raises(ConfigError, match="beside an options object"):
        load_classifier(base, domain, LoraOptions(), r=3)
    with pytest.raises(ModelError, match="two outcomes or more"):
        load_classifier(base, {**domain, "outcomes": {"like": " yes"}})
