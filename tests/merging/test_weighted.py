"""Weighted merges: what PEFT combines and what is done by hand, against plain sums."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from llmrec_peft.checkpoints.loading import load_trained
from llmrec_peft.checkpoints.manifest import read_manifest
from llmrec_peft.checkpoints.manifest_schema import WEIGHTS
from llmrec_peft.errors import BundleError, ModelError
from llmrec_peft.merging.merge_bundle import MergeOptions, merge_bundle
from llmrec_peft.merging.weighted_merge import COMBINATIONS, WITH_DENSITY, combine_bundles
from tests.support.bundles import DOMAIN, answers, stock_answers, write_bundle

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]
OTHER = DOMAIN | {"name": "news", "event": "News: {title}"}


@pytest.fixture
def pair(tiny_base, tmp_path):
    """Bundles of two domains on one base."""
    base = tiny_base("llama")
    first = write_bundle(tmp_path / "a", base, r=4, calibration={"temperature": 2.0, "bias": None})
    return first, write_bundle(tmp_path / "b", base, r=4, domain=OTHER, seed=6)


def weights_of(directory) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")


def base_weights(base) -> dict[str, torch.Tensor]:
    return AutoModelForSequenceClassification.from_pretrained(base, num_labels=2, dtype=torch.float32).state_dict()


def updates(bundle) -> dict[str, torch.Tensor]:
    """s B A of each adapted weight, by the weight's name in a stock classifier."""
    tensors, config = load_file(bundle / WEIGHTS), json.loads((bundle / "adapter_config.json").read_text())
    scale = config["lora_alpha"] / (config["r"] ** 0.5 if config["use_rslora"] else config["r"])
    return {
        name.removeprefix("base_model.model.").replace(".lora_A.", "."): scale
        * tensors[name.replace("lora_A", "lora_B")]
        @ value
        for name, value in tensors.items()
        if "lora_A" in name
    }


def head(bundle) -> torch.Tensor:
    return load_file(bundle / WEIGHTS)["base_model.model.score.weight"]


@pytest.mark.parametrize("ranks", [(4, 4), (4, 2)])
@pytest.mark.parametrize("options", [{}, {"rslora": True}, {"init": "pissa"}])
def test_cat_is_the_weighted_sum_of_the_updates(options, ranks, tiny_base, tmp_path):
    base = tiny_base("llama")
    bundles = [
        write_bundle(tmp_path / f"b{number}", base, r=rank, seed=number, **(options if number == 0 else {}))
        for number, rank in enumerate(ranks)
    ]
    found = combine_bundles(bundles, [0.7, 0.6], tmp_path / "out", combination="cat")
    assert found["max_difference"] <= 5e-5
    ours, before, (first, second) = weights_of(tmp_path / "out"), base_weights(base), map(updates, bundles)
    assert first and first.keys() == second.keys()
    for name, value in ours.items():
        if name == "score.weight":
            expected = (0.7 * head(bundles[0]) + 0.6 * head(bundles[1])) / 1.3
        elif name in first:
            expected = before[name] + 0.7 * first[name] + 0.6 * second[name]
            assert not torch.allclose(before[name], value, atol=1e-2)
        else:
            expected = before[name]
        assert torch.allclose(value, expected, atol=1e-5), name


@pytest.mark.parametrize("combination", ["linear", "cat", "svd"])
def test_one_bundle_of_weight_one_is_merged_as_it_is(combination, pair, tmp_path):
    merge_bundle(pair[0], tmp_path / "alone")
    combine_bundles(pair[:1], [1.0], tmp_path / "combined", combination=combination)
    alone, combined = weights_of(tmp_path / "alone"), weights_of(tmp_path / "combined")
    assert alone.keys() == combined.keys()
    assert all(torch.allclose(alone[name], combined[name], atol=1e-5) for name in alone)


@pytest.mark.parametrize("combination", COMBINATIONS)
def test_combinations_are_those_of_peft(combination, pair, tiny_base, tmp_path):
    """Against PEFT on adapters whose heads were taken out of their files by hand."""
    density = 0.5 if combination in WITH_DENSITY else None
    found = combine_bundles(pair, [0.7, 0.3], tmp_path / "out", combination=combination, density=density)
    assert found["max_difference"] <= found["tolerance"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # PEFT on the missing heads
        stock = AutoModelForSequenceClassification.from_pretrained(
            tiny_base("llama"), num_labels=2, dtype=torch.float32
        )
        from peft import LoraConfig, set_peft_model_state_dict

        model = None
        for number, bundle in enumerate(pair):
            config = LoraConfig.from_pretrained(bundle)
            config.modules_to_save = config.task_type = None
            if model is None:
                model = PeftModel(stock, config, adapter_name="0")
            else:
                model.add_adapter(str(number), config)
            tensors = {name: value for name, value in load_file(bundle / WEIGHTS).items() if "lora_" in name}
            set_peft_model_state_dict(model, tensors, adapter_name=str(number))
        torch.manual_seed(0)
        model.add_weighted_adapter(["0", "1"], [0.7, 0.3], "c", combination_type=combination, density=density)
        model.set_adapter("c")
        theirs = model.merge_and_unload().state_dict()
    ours = weights_of(tmp_path / "out")
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-5) for name in ours if name != "score.weight")


def test_no_two_combinations_are_one(pair, tmp_path):
    name, seen = "model.layers.0.self_attn.q_proj.weight", []
    for combination in COMBINATIONS:
        density = 0.5 if combination in WITH_DENSITY else None
        combine_bundles(pair, [0.7, 0.3], tmp_path / "out", combination=combination, density=density)
        value = weights_of(tmp_path / "out")[name]
        assert not any(torch.allclose(value, other, atol=1e-3) for other in seen), combination
        seen.append(value)


def test_dare_drops_the_same_numbers_again(pair, tmp_path):
    for name, seed in (("x", 1), ("y", 2)):
        torch.manual_seed(seed)
        combine_bundles(pair, [1, 1], tmp_path / name, combination="dare_ties", density=0.5)
    assert (tmp_path / "x" / "model.safetensors").read_bytes() == (tmp_path / "y" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_other_bases(kind, tiny_base, tmp_path):
    """BERT's trained pooler is averaged with the head."""
    bundles = [write_bundle(tmp_path / f"b{n}", tiny_base(kind), r=4, seed=n, scale=0.05) for n in (1, 2)]
    found = combine_bundles(bundles, [0.5, 1.5], tmp_path / "out", combination="cat")
    assert found["max_difference"] <= 2e-5
    assert torch.allclose(stock_answers(tmp_path / "out"), answers(tmp_path / "out"), atol=1e-5)
    ours, (first, second) = weights_of(tmp_path / "out"), (load_file(bundle / WEIGHTS) for bundle in bundles)
    trained = [name for name in first if "lora_" not in name]
    assert len(trained) == (1 if kind == "gpt2" else 4)
    for name in trained:
        expected = 0.25 * first[name] + 0.75 * second[name]
        assert torch.allclose(ours[name.removeprefix("base_model.model.")], expected, atol=1e-6), name


def test_manifest_of_a_combination(pair, tmp_path):
    combine_bundles(pair, [3, 1], tmp_path / "out", combination="ties", density=0.4)
    manifest, sources = read_manifest(tmp_path / "out"), [read_manifest(bundle) for bundle in pair]
    assert manifest["combination"] == {"type": "ties", "density": 0.4, "head_weights": [0.75, 0.25]}
    assert [(part["name"], part["weight"]) for part in manifest["merged_from"]] == [("movies", 3.0), ("news", 1.0)]
    assert [part["weights_sha256"] for part in manifest["merged_from"]] == [m["files"][WEIGHTS] for m in sources]
    assert manifest["domain"] == sources[0]["domain"] and manifest["counts"] == sources[0]["counts"]
    assert sources[0]["calibration"] is not None and manifest["calibration"] is None and manifest["metrics"] == {}
    assert load_trained(tmp_path / "out").calibration is None


def test_saved_in_bfloat16(pair, tmp_path):
    found = combine_bundles(pair, [0.5, 0.5], tmp_path / "out", MergeOptions(dtype="bfloat16"))
    tensors = weights_of(tmp_path / "out")
    assert tensors.pop("score.weight").dtype == torch.float32
    assert {value.dtype for value in tensors.values()} == {torch.bfloat16}
    assert 1e-5 < found["max_difference"] <= found["tolerance"]


# -- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weights", "settings", "message"),
    [
        ([1.0], {}, "weights must be 2 numbers, one a bundle"),
        ([1.0, 0.0], {}, "finite numbers above 0"),
        ([1.0, float("nan")], {}, "finite numbers above 0"),
        ([1, 1], {"combination": "mean"}, "combination must be one of linear, cat"),
        ([1, 1], {"combination": "ties"}, "density must be above 0 and at most 1 with ties, not None"),
        ([1, 1], {"combination": "ties", "density": 1.5}, "density must be above 0 and at most 1"),
        ([1, 1], {"density": 0.5}, "density 0.5 has no meaning with linear"),
    ],
)
def test_settings_that_cannot_be(weights, settings, message, pair, tmp_path):
    with pytest.raises(ModelError, match=message):
        combine_bundles(pair, weights, tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


def test_a_list_is_required(pair, tmp_path):
    with pytest.raises(ModelError, match="must be a list of directories"):
        combine_bundles(pair[0], [1.0], tmp_path / "out")
    with pytest.raises(ModelError, match="name at least one"):
        combine_bundles([], [], tmp_path / "out")


REVERSED = OTHER | {"outcomes": {"like": " yes\n", "dislike": " no\n"}}


@pytest.mark.parametrize(
    ("method", "kind", "options", "message"),
    [
        ("lora", "llama", {"dora": True}, "a DoRA"),
        ("lora", "gpt2", {"bias": "all"}, "trained with bias 'all'"),
        ("qlora", "llama", {}, "of method qlora"),
        ("head", "llama", {}, "of method head"),
        ("full", "llama", {}, "of method full"),
        ("adapter", "llama", {"size": 4}, "serve it in a DomainBank"),
        ("lora", "llama", {"domain": REVERSED}, r"has the labels \['like', 'dislike'\], but .*\['dislike', 'like'\]"),
        ("lora", "mistral", {}, "has the base"),
        ("lora", "llama", {"layers": [0]}, r"has the layers \[0\], but .* has None"),
        ("lora", "llama", {"target_modules": ["q_proj"]}, "has the target_modules"),
        ("lora", "llama", {"r": 2}, "has rank 2, but .* has 4, and linear needs one rank; use cat or svd"),
        ("lora", "llama", {"init": "pissa"}, "has rank 8, but .* has 4"),
    ],
)
def test_bundles_that_cannot_be_combined(method, kind, options, message, pair, tiny_base, tmp_path):
    options = {"r": 4} | options if method == "lora" else options
    third = write_bundle(tmp_path / "c", tiny_base(kind), method, **options)
    with pytest.raises(BundleError, match=message):
        combine_bundles([pair[0], third], [1, 1], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_merged_model_is_none_of_them(pair, tmp_path):
    merge_bundle(pair[0], tmp_path / "merged")
    with pytest.raises(BundleError, match="is a merged model, not a bundle"):
        combine_bundles([pair[0], tmp_path / "merged"], [1, 1], tmp_path / "out")
