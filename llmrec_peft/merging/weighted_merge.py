"""Weighted merges: the LoRA bundles of several domains in one stock checkpoint.

PEFT's `add_weighted_adapter` combines the updates. It refuses adapters with trained heads, so the heads are averaged
apart, with the weights divided by their sum.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

import torch

from llmrec_peft.checkpoints.adapter_tensors import adapter_tensors
from llmrec_peft.checkpoints.bundle import Bundle
from llmrec_peft.checkpoints.loading import LoadOptions, load_trained
from llmrec_peft.checkpoints.manifest_schema import ADAPTER
from llmrec_peft.checkpoints.output_directory import check_output
from llmrec_peft.errors import BundleError, ModelError
from llmrec_peft.merging.merge_bundle import MergeOptions, inherited, mergeable, provenance, write_merge
from llmrec_peft.models.building import build_classifier
from llmrec_peft.models.classifier import BehaviorClassifier
from llmrec_peft.models.head import outcomes_of
from llmrec_peft.models.tuning_options import HeadOptions, LoraOptions, changes_base, method_options

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel

Combination = Literal["linear", "cat", "svd", "ties", "dare_linear", "dare_ties", "magnitude_prune"]
COMBINATIONS: tuple[str, ...] = get_args(Combination)
WITH_DENSITY = ("ties", "dare_linear", "dare_ties", "magnitude_prune")
"""Combinations that drop entries of the updates, and need the share that they keep."""
OF_ANY_RANKS = ("cat", "svd")
"""Combinations of updates of different ranks."""
_SEED = 0  # of the entries that DARE drops


def combine_bundles(
    bundles: Sequence[str | Path],
    weights: Sequence[float],
    out: str | Path,
    options: MergeOptions | None = None,
    *,
    combination: Combination = "linear",
    density: float | None = None,
) -> dict[str, Any]:
    """Merge the LoRA bundles of several domains, weighted, into one checkpoint; see `merge_bundle` for the rest.

    The result has the first bundle's domain: its words, windows and labels. The head is the mean of the heads, weighted
    by the weights over their sum. The bundles' calibrations do not fit the combined model, which has none: fit one.

        W' = W + combination of weight_i * (alpha_i / r_i) B_i A_i

    Args:
        bundles: LoRA bundles on one base with the same labels in the same order.
        weights: one number above 0 for each bundle's update.
        combination: `cat` is the weighted sum of the updates, `svd` its best approximation of the bundles' rank.
            `linear` sums the factors A and B separately, so products of one bundle's A with another's B appear.
            `ties`, `dare_linear`, `dare_ties` and `magnitude_prune` do so after dropping entries of the factors.
        density: fraction of the entries that the last four keep, above 0 and at most 1.

    Raises:
        BundleError: bundles that differ in base, tokenizer, labels or adapted layers, or that are not plain LoRA; and
            what `merge_bundle` raises.
        ModelError: weights, combination or density that cannot be.
    """
    options = options or MergeOptions()
    weights = _checked(bundles, weights, combination, density)
    manifests = [mergeable(bundle) for bundle in bundles]
    _check_alike(bundles, manifests, combination)
    out = check_output(out, *bundles, options.base or manifests[0]["base"]["name"])
    sources = [provenance(manifest, weight) for manifest, weight in zip(manifests, weights, strict=True)]
    # Metrics and calibration of the bundles are not those of the combined model.
    content = {**inherited(manifests[0]), "calibration": None, "metrics": {}, "merged_from": sources}
    content["combination"] = {"type": combination, "density": density, "head_weights": _shares(weights)}
    return write_merge(lambda: _combined(bundles, weights, combination, density, options), out, content, options)


def _checked(
    bundles: Sequence[str | Path], weights: Sequence[float], combination: str, density: float | None
) -> list[float]:
    """The weights as floats. Raises ModelError for arguments that do not fit together."""
    if isinstance(bundles, str | Path) or not bundles:
        raise ModelError(f"bundles must be a list of directories, not {bundles!r}; name at least one")
    if len(weights) != len(bundles):
        raise ModelError(f"weights must be {len(bundles)} numbers, one a bundle, not {list(weights)}; correct them")
    if not all(0 < weight < math.inf for weight in weights):
        raise ModelError(f"weights must be finite numbers above 0, not {list(weights)}; correct them")
    if combination not in COMBINATIONS:
        raise ModelError(f"combination must be one of {', '.join(COMBINATIONS)}, not {combination!r}; choose one")
    if combination in WITH_DENSITY and (density is None or not 0 < density <= 1):
        raise ModelError(f"density must be above 0 and at most 1 with {combination}, not {density!r}; set it, as 0.5")
    if combination not in WITH_DENSITY and density is not None:
        raise ModelError(f"density {density!r} has no meaning with {combination}; leave it out, or use ties")
    return [float(weight) for weight in weights]


def _check_alike(bundles: Sequence[str | Path], manifests: Sequence[Mapping[str, Any]], combination: str) -> None:
    """Refuse what cannot be combined, by the manifests alone."""
    for bundle, manifest in zip(bundles, manifests, strict=True):
        options = manifest["method_options"]
        for wrong, what in (
            (manifest["method"] != "lora", f"of method {manifest['method']}"),
            (options.get("dora"), "a DoRA, whose magnitudes do not add up"),
            (options.get("bias", "none") != "none", f"trained with bias {options.get('bias')!r}"),
        ):
            if wrong:
                raise BundleError(f"bundle {bundle} is {what}; combine bundles of plain LoRA, or merge it alone")
    first = manifests[0]
    for bundle, manifest in zip(bundles, manifests, strict=True):
        for what, own, other in (
            ("labels", manifest["labels"], first["labels"]),
            ("base", manifest["base"].get("fingerprint"), first["base"].get("fingerprint")),
            ("tokenizer", manifest["tokenizer"].get("fingerprint"), first["tokenizer"].get("fingerprint")),
            ("layers", manifest["method_options"].get("layers"), first["method_options"].get("layers")),
            ("target_modules", *(m["method_options"].get("target_modules") for m in (manifest, first))),
        ):
            if own != other:
                raise BundleError(
                    f"bundle {bundle} has the {what} {own}, but {bundles[0]} has {other}; combine bundles that agree"
                )
        ranks = [_rank(m) for m in (manifest, first)]
        if combination not in OF_ANY_RANKS and ranks[0] != ranks[1]:
            raise BundleError(
                f"bundle {bundle} has rank {ranks[0]}, but {bundles[0]} has {ranks[1]}, and {combination} needs one "
                f"rank; use {' or '.join(OF_ANY_RANKS)}"
            )


def _rank(manifest: Mapping[str, Any]) -> int:
    """Rank of the update in the bundle: twice that of training where `init` moves base weights into the adapter."""
    options = method_options(manifest["method"], manifest["method_options"])
    assert isinstance(options, LoraOptions)  # `_check_alike` has refused other methods
    return options.r * (2 if changes_base(options) else 1)


def _shares(weights: Sequence[float]) -> list[float]:
    return [weight / sum(weights) for weight in weights]


@dataclass(frozen=True)
class _Update:
    """One bundle's update: PEFT's configuration, the factors, and all other trained tensors, by PEFT's names."""

    config: LoraConfig
    factors: dict[str, torch.Tensor]
    trained: dict[str, torch.Tensor]


def _combined(
    bundles: Sequence[str | Path],
    weights: Sequence[float],
    combination: Combination,
    density: float | None,
    options: MergeOptions,
) -> Bundle:
    """A classifier whose one adapter is the combination, and whose head is the mean; all else is the first bundle's."""
    loading = LoadOptions(base=options.base, trust_remote_code=options.trust_remote_code)
    updates: list[_Update] = []
    first: dict[str, Any] = {}
    for path in bundles:
        loaded = load_trained(path, loading, kind=ADAPTER)
        updates.append(_update(loaded.classifier))
        first = first or {name: value for name, value in vars(loaded).items() if name != "classifier"}
        model_options = loaded.classifier.model_options
        del loaded  # one base in memory at a time
    outcomes, tokenizer = outcomes_of(first["domain"]), first["tokenizer"]
    plain = build_classifier(model_options, HeadOptions(), outcomes, trained=True, tokenizer=tokenizer)
    # The head and other trained tensors: their weighted mean.
    shares = _shares(weights)
    with torch.no_grad():
        for name in updates[0].trained:
            scaled = [share * update.trained[name] for share, update in zip(shares, updates, strict=True)]
            plain.model.get_parameter(name.removeprefix("base_model.model.")).copy_(reduce(torch.add, scaled))
    model = _with_combination(plain.model, updates, weights, combination, density)
    classifier = BehaviorClassifier(model, "lora", plain.labels)
    classifier.model_options = model_options
    return Bundle(**(first | {"classifier": classifier.eval(), "calibration": None}))


def _update(classifier: BehaviorClassifier) -> _Update:
    tensors = {name: value.clone() for name, value in adapter_tensors(classifier).items()}
    factors = {name: value for name, value in tensors.items() if ".lora_" in name}
    configs = cast("dict[str, LoraConfig]", classifier.model.peft_config)
    config = copy.deepcopy(configs["default"])
    # PEFT gives the combination the scale alpha / r = 1, but keeps the first bundle's root of r.
    config.lora_alpha = config.lora_alpha * (config.r**0.5 if config.use_rslora else 1)
    config.use_rslora = False
    config.modules_to_save = config.task_type = None  # else PEFT would put the head into the adapter again
    return _Update(config, factors, {name: value for name, value in tensors.items() if name not in factors})


def _with_combination(
    model: PreTrainedModel | PeftModel,
    updates: Sequence[_Update],
    weights: Sequence[float],
    combination: Combination,
    density: float | None,
) -> PreTrainedModel | PeftModel:
    """PeftModel around a stock classifier, with the combined adapter alone."""
    from peft import get_peft_model, set_peft_model_state_dict

    fresh = list(cast("list[str]", model.fresh_modules))
    names = [f"part{number}" for number in range(len(updates))]
    with warnings.catch_warnings():  # PEFT reads an attribute that Transformers has renamed
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        wrapped = get_peft_model(model, updates[0].config, adapter_name=names[0])
        for name, update in zip(names[1:], updates[1:], strict=True):
            wrapped.add_adapter(name, update.config)
    for name, update in zip(names, updates, strict=True):
        set_peft_model_state_dict(wrapped, update.factors, adapter_name=name)
    # DARE drops entries at random: the same ones in each run, without a change of the global generator.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        wrapped.add_weighted_adapter(names, list(weights), "combined", combination_type=combination, density=density)
    wrapped.set_adapter("combined")
    for name in names:
        wrapped.delete_adapter(name)
    stock: Any = wrapped.get_base_model()
    stock.fresh_modules = fresh  # which `get_peft_model` does not keep
    return wrapped
