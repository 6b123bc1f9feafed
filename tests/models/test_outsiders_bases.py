"""Bases of many families: each answers a stream as it answers the prompts alone, or is refused by name.

`families.py` lists them. Other inputs that fail the same way: any base with layers that do not follow a mask (RWKV,
Mamba, LFM2, RecurrentGemma), any RoPE or window that depends on the pass, any mixture whose experts PEFT renames.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from llmrec_peft import (
    BehaviorTrainer,
    Domain,
    DomainBank,
    ModelError,
    Scorer,
    build_streams,
    load_classifier,
    merge_bundle,
)
from llmrec_peft.checkpoints.bundle import save_bundle
from llmrec_peft.checkpoints.loading import LoadOptions, load_trained
from llmrec_peft.data.collator import StreamCollator, collate
from llmrec_peft.data.streams import IndependentPrompts
from llmrec_peft.merging.merge_bundle import MergeOptions
from llmrec_peft.models import selftest
from llmrec_peft.models.lora import linear_names, rewritten
from llmrec_peft.models.predict import predict
from llmrec_peft.models.requirements import candidates_of, check_positions, odd_layers, unfit_for_candidates
from tests.models.families import FAMILIES, Family, name_of, table

pytestmark = pytest.mark.usefixtures("one_thread")

MAPPING = {
    "name": "movies",
    "header": "Movies one viewer rated:\n",
    "event": "{genres}, {item_id}",
    "outcomes": {"dislike": " no\n", "like": " yes\n"},
    "label": {"column": "rating", "above": 3},
    "stream": {"context": 2, "targets": 4, "max_length": 256},
}
PREFIXES = Domain.from_dict({**MAPPING, "simultaneous": "order"})
CANDIDATES = Domain.from_dict({**MAPPING, "simultaneous": "isolate", "negatives": {"per_positive": 1}})
TOLERANCE = 1e-4
HISTORY = [({"genres": "Drama", "item_id": "i4"}, "like"), ({"genres": "Action", "item_id": "i7"}, "dislike")]
EVENTS = [{"genres": name, "item_id": f"i{n}"} for n, name in enumerate(("Drama", "Comedy", "Action"))]


def marked(families: list[Family]) -> list:
    return [pytest.param(f, id=name_of(f), marks=() if f.quick else pytest.mark.slow) for f in families]


@pytest.fixture
def base_of(tmp_path, tiny_tokenizer):
    """`base_of(family)`: a directory with a tiny base of it."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    def factory(family: Family) -> Path:
        directory = tmp_path / name_of(family)
        config = family.config(len(tiny_tokenizer))
        auto = AutoModelForCausalLM
        if type(config) not in auto._model_mapping:
            auto = AutoModelForSequenceClassification
        torch.manual_seed(0)
        auto.from_config(config, dtype=torch.float32, attn_implementation=family.attn).save_pretrained(directory)
        tiny_tokenizer.save_pretrained(directory)
        return directory

    return factory


@pytest.fixture
def streams_for_split(small_log, tiny_tokenizer):
    """`streams_for_split(domain)`: a few streams."""
    return lambda domain: build_streams(small_log(users=3, events=6).split().train, domain, tiny_tokenizer)


def train(classifier, streams, steps: int = 3) -> None:
    batch = collate([streams[n] for n in range(min(4, len(streams)))], classifier.tokenizer.pad_token_id)
    labels = batch.pop("labels")
    values = [value for value in classifier.parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(values, lr=0.003)
    losses = []
    classifier.train()
    for _ in range(steps):
        loss = torch.nn.functional.cross_entropy(classifier(**batch), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    classifier.eval()
    assert np.isfinite(losses).all() and losses[-1] != losses[0]


def answers(classifier, streams) -> np.ndarray:
    return predict(classifier, streams, StreamCollator(classifier.tokenizer.pad_token_id, 0), batch_tokens=600).logits


def alone(classifier, event: dict) -> np.ndarray:
    """Probabilities of one candidate after `HISTORY`, by the stock forward on its own prompt."""
    text = "{genres}, {item_id}"
    parts = [MAPPING["header"]]
    for past, label in HISTORY:
        parts += [text.format(**past), " ->", MAPPING["outcomes"][label]]
    parts += [text.format(**event), " ->"]
    ids = [token for part in parts for token in classifier.tokenizer(part, add_special_tokens=False)["input_ids"]]
    with torch.no_grad():
        return classifier.stock(input_ids=torch.tensor([ids])).logits[0].softmax(-1).numpy()


@pytest.mark.parametrize("family", marked([f for f in FAMILIES if not f.refused]))
def test_family(family, base_of, streams_for_split, tmp_path):
    """Trains; stream and bank = prompts alone, also after a swap."""
    base, streams = base_of(family), streams_for_split(CANDIDATES)
    assert streams.has_candidates
    bundles, classifiers = [], []
    for seed in (0, 1):
        torch.manual_seed(seed)
        classifier = load_classifier(str(base), CANDIDATES, "lora", attn=family.attn, head_scale=3.0)
        train(classifier, streams, 3 + seed)
        bundles.append(save_bundle(tmp_path / f"bundle-{seed}", classifier, classifier.tokenizer, CANDIDATES.to_dict()))
        classifiers.append(classifier)
    found, expected = answers(classifiers[0], streams), answers(classifiers[0], IndependentPrompts(streams))
    assert expected.std(0).min() > 0.01
    assert np.abs(found - expected).max() < TOLERANCE
    with torch.no_grad():
        again = load_trained(bundles[0]).classifier
    assert np.abs(answers(again, streams) - found).max() < TOLERANCE

    bank = DomainBank.load(base, {"movies": bundles[0]}, attn=family.attn)
    wanted = [np.stack([alone(one, event) for event in EVENTS]) for one in classifiers]
    assert np.abs(wanted[0] - wanted[1]).max() > 10 * TOLERANCE
    assert np.abs(bank.score([("movies", HISTORY, EVENTS)])[0] - wanted[0]).max() < TOLERANCE
    bank.swap("movies", bundles[1])
    assert np.abs(bank.score([("movies", HISTORY, EVENTS)])[0] - wanted[1]).max() < TOLERANCE


@pytest.mark.parametrize("family", marked([f for f in FAMILIES if not f.refused]))
def test_merged(family, base_of, streams_for_split, tmp_path):
    """Merged = adapted, by stock classes."""
    classifier = load_classifier(str(base_of(family)), CANDIDATES, "lora", attn=family.attn, head_scale=3.0)
    train(classifier, streams_for_split(CANDIDATES))
    bundle = save_bundle(tmp_path / "bundle", classifier, classifier.tokenizer, CANDIDATES.to_dict())
    merge_bundle(bundle, tmp_path / "merged", MergeOptions(dtype="float32"))
    merged = load_trained(tmp_path / "merged", LoadOptions(attn=family.attn)).classifier
    for event in EVENTS:
        assert np.abs(alone(merged, event) - alone(classifier, event)).max() < TOLERANCE


@pytest.mark.parametrize("family", marked([f for f in FAMILIES if not f.refused]))
def test_another_method(family, base_of, streams_for_split, tmp_path):
    """Bottleneck, full, 4-bit and head-only training, one a family: trains, stream = prompts alone, loads again."""
    base, streams = base_of(family), streams_for_split(CANDIDATES)
    torch.manual_seed(0)
    classifier = load_classifier(str(base), CANDIDATES, family.second, attn=family.attn)
    train(classifier, streams)
    found = answers(classifier, streams)
    assert np.abs(found - answers(classifier, IndependentPrompts(streams))).max() < TOLERANCE
    bundle = save_bundle(tmp_path / "bundle", classifier, classifier.tokenizer, CANDIDATES.to_dict())
    assert np.abs(answers(load_trained(bundle).classifier, streams) - found).max() < TOLERANCE
    scorer = Scorer.load(bundle, attn=family.attn)
    wanted = np.stack([alone(classifier, event) for event in EVENTS])
    assert np.abs(scorer.score(HISTORY, EVENTS) - wanted).max() < TOLERANCE


@pytest.mark.parametrize("family", marked([f for f in FAMILIES if f.refused]))
def test_refused(family, base_of, streams_for_split, tmp_path):
    """Refused at load where the domain makes candidates, and by bank and scorer; prefixes alone are exact."""
    base = base_of(family)
    with pytest.raises(ModelError, match=family.says):
        load_classifier(str(base), CANDIDATES, "lora", attn=family.attn)
    if family.refused == "always":
        with pytest.raises(ModelError, match=family.says):
            load_classifier(str(base), PREFIXES, "lora", attn=family.attn)
        return
    streams = streams_for_split(PREFIXES)
    classifier = load_classifier(str(base), PREFIXES, "head", attn=family.attn)
    train(classifier, streams)
    found = answers(classifier, streams)
    assert np.abs(found - answers(classifier, IndependentPrompts(streams))).max() < TOLERANCE
    with pytest.raises(ModelError, match=family.says):
        answers(classifier, streams_for_split(CANDIDATES))
    bundle = save_bundle(tmp_path / "bundle", classifier, classifier.tokenizer, PREFIXES.to_dict())
    assert np.abs(answers(load_trained(bundle).classifier, streams) - found).max() < TOLERANCE
    asking = save_bundle(tmp_path / "asking", classifier, classifier.tokenizer, CANDIDATES.to_dict())
    with pytest.raises(ModelError, match=family.says):
        load_classifier(str(asking))
    for serve in (lambda: Scorer.load(bundle, attn=family.attn), lambda: DomainBank.load(base, {}, attn=family.attn)):
        with pytest.raises(ModelError, match=family.says):
            serve()


def test_a_layer_kind_that_no_list_names(tiny_base):
    """The measurement alone finds a layer that mixes neighbours: here each MLP also reads the token before."""
    classifier = load_classifier(str(tiny_base("llama")), PREFIXES, "head")
    assert odd_layers(classifier.config, classifier.stock) == []
    mix_neighbours(classifier.stock.model.layers[:1], 0.1)
    selftest.check_prefixes(classifier)
    with pytest.raises(ModelError, match="self-test off by"):
        selftest.check_candidates(classifier, "asked here")


def mix_neighbours(layers, share: float) -> None:
    def mix(_mlp, inputs):
        (x,) = inputs
        return (x + share * x.roll(1, 1) * (torch.arange(x.shape[1]) > 0)[None, :, None].to(x.dtype),)

    for layer in layers:
        layer.mlp.register_forward_pre_hook(mix)


LOW = [("bfloat16", "head"), ("float16", "head"), ("float32", "qlora"), ("bfloat16", "qlora")]


@pytest.mark.parametrize(("dtype", "method"), LOW)
def test_wrong_layers_in_less_precise_types(dtype, method, tiny_base):
    """Large gaps of single numbers pass there, their mean does not: any layer that sees past a mask fails the same."""
    classifier = load_classifier(str(tiny_base("llama")), CANDIDATES, method, dtype=dtype)
    mix_neighbours(classifier.stock.model.layers, 0.5)
    classifier.selftests.clear()
    with pytest.raises(ModelError, match="self-test off by .* where 0.1 is allowed"):
        selftest.check_candidates(classifier, "asked here")


@pytest.mark.parametrize("kind", ["minimax", "qwen3_5_text", pytest.param("jamba", marks=pytest.mark.slow)])
def test_linear_attention_in_bfloat16(kind, base_of, monkeypatch):
    """Measured where no list names the layers."""
    monkeypatch.setattr(selftest, "unfit_for_candidates", lambda *_: None)
    family = next(f for f in FAMILIES if f.kind == kind)
    with pytest.raises(ModelError, match="self-test off by"):
        load_classifier(str(base_of(family)), CANDIDATES, "head", dtype="bfloat16")


@pytest.mark.parametrize(
    "fault",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ],
    ids=lambda fault: type(fault).__name__,
)
def test_a_machine_without_memory_is_not_the_bases_fault(fault, tiny_base, monkeypatch):
    """It says so, and the next measurement is made; other failures of a library are the cause of the refusal."""
    classifier = load_classifier(str(tiny_base("llama")), PREFIXES, "head")

    def run_out(*_):
        raise fault

    with monkeypatch.context() as patch:
        patch.setitem(selftest._MEASUREMENTS, "candidates", (run_out, "takes no mask for each row"))
        with pytest.raises(type(fault)):
            selftest.check_candidates(classifier, "asked here")
        fault = TypeError("unexpected keyword")
        with pytest.raises(ModelError, match="LlamaModel takes no mask for each row .TypeError") as caught:
            selftest.check_candidates(classifier, "asked here")
        assert caught.value.__cause__ is fault
    selftest.check_candidates(classifier, "asked here")


def test_measurements_are_cached_by_attention_and_type(tiny_base):
    """Another attention or number type is measured again, and the same is not; each costs few passes and tokens."""
    classifier = load_classifier(str(tiny_base("llama")), CANDIDATES, "head")
    passes = []
    classifier.stock.model.embed_tokens.register_forward_pre_hook(lambda _m, inputs: passes.append(inputs[0].numel()))
    selftest.check_base_for(classifier, CANDIDATES)
    assert passes == []
    for change in (
        classifier.selftests.clear,
        lambda: classifier.stock.set_attn_implementation("eager"),
        classifier.bfloat16,
    ):
        change()
        passes.clear()
        selftest.check_base_for(classifier, CANDIDATES)
        assert len(passes) == 4 and sum(passes) <= 75


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({"layers_block_type": ["mamba", "attention"]}, "mamba"),
        ({"layer_types": ["conv", "full_attention"]}, "conv"),
        ({"block_types": ["recurrent", "attention"]}, "recurrent"),
        ({"hybrid_override_pattern": "M-*E"}, "mamba"),
        ({"attn_layer_indices": [1]}, "layers beside attn_layer_indices"),
        ({"layer_types": ["kind_of_2030"]}, "kind_of_2030"),
    ],
)
def test_layer_kinds_by_configuration(options, kind):
    config = SimpleNamespace(num_hidden_layers=2, **options)
    config.get_text_config = lambda: config
    assert odd_layers(config) == [kind]


@pytest.mark.parametrize("kind", ["mamba", "rwkv", "recurrent_gemma", "lfm2"])
def test_layer_kinds_by_class(kind):
    """Where the weights cannot be measured (on the meta device, split over ranks) classes tell too."""
    from transformers import CONFIG_MAPPING, AutoModel

    options = {"num_hidden_layers": 2, "hidden_size": 32, "vocab_size": 64}
    options |= {"intermediate_size": 64, "num_attention_heads": 4} if kind in ("recurrent_gemma", "lfm2") else {}
    options |= {"full_attn_idxs": [1]} if kind == "lfm2" else {}
    config = CONFIG_MAPPING[kind](**options)
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    wrapped = torch.nn.Module()
    wrapped.base_model_prefix, wrapped.model = "model", model
    bare = SimpleNamespace(num_hidden_layers=2)
    bare.get_text_config = lambda: bare
    assert odd_layers(bare, wrapped)


def test_what_makes_candidates():
    assert candidates_of(PREFIXES) is None and candidates_of(MAPPING) is None
    for change, said in (
        ({"negatives": {"per_positive": 2}}, "negatives.per_positive"),
        ({"simultaneous": "isolate"}, "simultaneous"),
        ({"stream": {"history_labels": ["like"]}}, "leaves out 'dislike'"),
    ):
        assert said in candidates_of({**MAPPING, **change})
        assert said in candidates_of(Domain.from_dict({**MAPPING, **change}))
    assert candidates_of({**MAPPING, "stream": {"history_labels": ["like", "dislike"]}}) is None


ROPES = {
    "longrope": {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4,
                 "original_max_position_embeddings": 64},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64},
}  # fmt: skip


@pytest.mark.parametrize("kind", ROPES)
def test_rope_that_depends_on_the_pass(kind):
    """Held to the trained length: also as `rope_scaling`, per layer type, and beside the configuration's own number."""
    from transformers import LlamaConfig

    config = LlamaConfig(**{**MODERN_512, "rope_parameters": dict(ROPES[kind])})
    check_positions(config, 64)
    with pytest.raises(ModelError, match=f"{kind} RoPE.* beyond 64 tokens, but max_length is 65"):
        check_positions(config, 65)
    for rope in (
        {"rope_scaling": {"type": kind, "factor": 4.0}, "original_max_position_embeddings": 64},
        {"rope_parameters": {"full_attention": ROPES[kind], "sliding_attention": {"rope_type": "default"}}},
    ):
        text = SimpleNamespace(model_type="llama", max_position_embeddings=512, **rope)
        text.get_text_config = lambda text=text: text
        with pytest.raises(ModelError, match="beyond 64 tokens"):
            check_positions(text, 65)
    check_positions(LlamaConfig(**MODERN_512), 512)


MODERN_512 = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "max_position_embeddings": 512}


@pytest.mark.parametrize(
    "options",
    [
        {"attention_layers": ["global", "local"], "window_size": 64},
        {"attention_window": [64, 128]},
        {"attention_window_size": 64},
        {"local_attention": 64},
        {"layer_types": ["chunked_attention", "full_attention"], "attention_chunk_size": 64},
        {"sliding_window": [None, 64]},
        {"keep_window_size": 64},
        {"layer_types": ["indexed_attention"], "index_topk": 64},
    ],
    ids=lambda options: list(options)[-1],
)
def test_windows_under_other_names(options):
    text = SimpleNamespace(model_type="other", max_position_embeddings=512, **options)
    text.get_text_config = lambda: text
    check_positions(text, 64)
    with pytest.raises(ModelError, match="of 64 tokens but max_length is 65; lower domain.stream.max_length to 64"):
        check_positions(text, 65)


def test_windows_that_no_layer_has():
    from transformers import GPTNeoConfig, LongformerConfig, ModernBertConfig, Qwen2Config

    free = [
        GPTNeoConfig(attention_types=[[["global"], 2]], num_layers=2, window_size=64),
        Qwen2Config(use_sliding_window=False, sliding_window=64),
        # Encoders read each prompt alone, whatever their windows.
        ModernBertConfig(local_attention=64),
        LongformerConfig(attention_window=64),
    ]
    assert [check_positions(config, 510) for config in free] == [None] * 4


def test_windows_that_a_class_cannot_switch_off():
    """`use_sliding_window: false` is an extra key to most classes, as `alibi` is; no code of theirs reads it."""
    from transformers import LlamaConfig, MistralConfig, Phi3Config, SmolLM3Config, Starcoder2Config

    options = {"use_sliding_window": False, "sliding_window": 64, "max_position_embeddings": 512}
    for kind in (MistralConfig, Phi3Config, Starcoder2Config):
        with pytest.raises(ModelError, match="sliding window of 64 tokens but max_length is 65"):
            check_positions(kind(**options), 65)
    check_positions(SmolLM3Config(**options, num_hidden_layers=1, layer_types=["sliding_attention"]), 512)
    assert unfit_for_candidates(LlamaConfig(alibi=True)) is None


@pytest.mark.parametrize(
    ("kind", "options", "method", "dtype", "said"),
    [
        ("gpt_neo", {"window_size": 64}, "head", "float32", "window size of 64"),
        ("mistral", {"sliding_window": 64}, "adapter", "float32", "sliding window of 64"),
        ("mistral", {"sliding_window": 64}, "lora", "float32", "sliding window of 64"),
        ("llama", {"max_position_embeddings": 64}, "head", "bfloat16", "64 positions"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0,
                                       "original_max_position_embeddings": 64}}, "lora", "bfloat16", "dynamic RoPE"),
    ],
)  # fmt: skip
def test_scorer_and_bank_check_what_the_base_can_read(kind, options, method, dtype, said, base_of, tmp_path):
    """Whether or not the scorer folds the bundle; any other key of a window fails the same."""
    family = next(f for f in FAMILIES if f.kind == kind)
    base = base_of(Family(kind, {**family.options, **options}, attn=family.attn))
    classifier = load_classifier(str(base), PREFIXES, method, attn=family.attn, dtype=dtype)
    bundle = save_bundle(tmp_path / "bundle", classifier, classifier.tokenizer, PREFIXES.to_dict())
    for serve in (Scorer.load, lambda bundle, **options: DomainBank.load(base, {"movies": bundle}, **options)):
        with pytest.raises(ModelError, match=f"{said}.* but max_length is 256"):
            serve(bundle, attn=family.attn)


def test_the_library_path_checks_windows(base_of, streams_for_split, tmp_path):
    """`load_classifier` + `build_streams` + `BehaviorTrainer`, and `predict`, refuse as the recipes do."""
    from transformers import TrainingArguments

    family = next(f for f in FAMILIES if f.kind == "gpt_neo")
    short = Family(family.kind, {**family.options, "window_size": 64}, attn="eager")
    classifier = load_classifier(str(base_of(short)), CANDIDATES, "head", attn="eager")
    streams = streams_for_split(CANDIDATES)
    arguments = TrainingArguments(output_dir=str(tmp_path / "run"), use_cpu=True)
    with pytest.raises(ModelError, match="window size of 64 tokens but max_length is 256"):
        BehaviorTrainer(classifier, arguments, streams, tokenizer=classifier.tokenizer)
    with pytest.raises(ModelError, match="window size of 64 tokens but max_length is 256"):
        answers(classifier, streams)


def test_rows_longer_than_a_window_of_places(base_of, tmp_path):
    """GPT-Neo's windows count places in the row: a scorer's rows of many candidates are longer than the prompts."""
    family = next(f for f in FAMILIES if f.kind == "gpt_neo")
    domain = Domain.from_dict({**MAPPING, "stream": {"context": 2, "targets": 4, "max_length": 96}})
    base = base_of(Family(family.kind, {**family.options, "window_size": 96}, attn="eager"))
    classifier = load_classifier(str(base), domain, "head", attn="eager", head_scale=3.0)
    bundle = save_bundle(tmp_path / "bundle", classifier, classifier.tokenizer, domain.to_dict())
    many = EVENTS * 20
    found = Scorer.load(bundle, attn="eager").score(HISTORY, many)
    wanted = np.stack([alone(classifier, event) for event in EVENTS])
    assert np.abs(found - np.tile(wanted, (20, 1))).max() < TOLERANCE


def test_targets_that_peft_would_move(base_of, caplog):
    """DeepSeek, Qwen3-Next and Hunyuan: named targets are refused before training, all-linear leaves them out."""
    family = next(f for f in FAMILIES if f.kind == "deepseek_v3")
    base = str(base_of(family))
    classifier = load_classifier(base, PREFIXES, "lora")
    assert "mlp.shared_experts.gate_proj" in caplog.text and "stay as they are" in caplog.text
    adapted = classifier.model.peft_config["default"]
    assert not adapted.target_parameters and "self_attn.o_proj" in adapted.target_modules
    assert rewritten(classifier.stock, ["self_attn.o_proj"]) == []
    for targets in (["mlp.shared_experts.down_proj"], ["gate_proj", "up_proj"], r".*\.down_proj"):
        with pytest.raises(ModelError, match="fused experts"):
            load_classifier(base, PREFIXES, "lora", target_modules=targets)


def test_llama_targets_stay(tiny_base):
    classifier = load_classifier(str(tiny_base("llama")), PREFIXES, "head")
    assert rewritten(classifier.stock, linear_names(classifier.stock)) == []


def test_bottleneck_in_layers_of_several_kinds(base_of):
    family = next(f for f in FAMILIES if f.kind == "qwen3_5_text")
    with pytest.raises(ModelError, match="method adapter knows no place"):
        load_classifier(str(base_of(family)), PREFIXES, "adapter")


def test_page_lists_the_families():
    """`docs/bases.md` holds the table of `python -m tests.models.families`."""
    page = Path(__file__).parents[2] / "docs" / "bases.md"
    assert table() in page.read_text(encoding="utf-8")
