"""Weighted merges: the LoRA bundles of several domains in one stock checkpoint.

The updates are combined by PEFT's `add_weighted_adapter`, which refuses adapters with trained heads. So the heads are
kept apart and averaged, with the weights divided by their sum.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from llmrec_peft.checkpoints.bundle import Bundle, adapter_tensors, load_bundle
from llmrec_peft.checkpoints.merged import check_output
from llmrec_peft.data.streams import Streams
from llmrec_peft.errors import BundleError, ModelError
from llmrec_peft.merging.merging import Dtype, MergeSettings, inherited, mergeable, provenance, write_merge
from llmrec_peft.models.classifier import BehaviorClassifier, build_classifier
from llmrec_peft.models.head import outcomes_of
from llmrec_peft.models.tuning_options import HeadOptions, changes_base, method_options

Combination = Literal["linear", "cat", "svd", "ties", "dare_linear", "dare_ties", "magnitude_prune"]
COMBINATIONS: tuple[str, ...] = get_args(Combination)
WITH_DENSITY = ("ties", "dare_linear", "dare_ties", "magnitude_prune")
"""Combinations that drop a part of the updates' numbers, and need to be told how many stay."""
OF_ANY_RANKS = ("cat", "svd")
"""Combinations of updates of different ranks."""
_SEED = 0  # of the numbers that DARE drops


def combine_bundles(
    bundles: Sequence[str | Path],
    weights: Sequence[float],
    out: str | Path,
    *,
    combination: Combination = "linear",
    density: float | None = None,
    dtype: Dtype | None = None,
    base: str | None = None,
    streams: Streams | None = None,
    tolerance: float | None = None,
    max_shard_size: str | int = "2GB",
    batch_tokens: int = 1000,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Merge the LoRA bundles of several domains, weighted, into one checkpoint; see `merge_bundle` for the rest.

    The first bundle's domain goes on: its words, windows and labels. The head is the mean of the heads, weighted by the
    weights over their sum. A calibration holds for none of the combined answers, so there is none: fit it again.

    Args:
        bundles: LoRA bundles on one base with the same labels in the same order.
        weights: one number above 0 for each bundle's update.
        combination: `cat` is the weighted sum of the updates, `svd` its best approximation of the bundles' rank.
            `linear` sums the factors A and B apart, which brings products of one bundle's A with another's B. `ties`,
            `dare_linear`, `dare_ties` and `magnitude_prune` do so after dropping numbers of the factors.
        density: share of the numbers that the last four keep, above 0 and at most 1.

    Raises:
        BundleError: bundles that differ in base, tokenizer, labels or adapted layers, or that are not plain LoRA; and
            what `merge_bundle` raises.
        ModelError: weights, combination or density that cannot be.
    """
    settings = MergeSettings(dtype, base, streams, tolerance, max_shard_size, batch_tokens, trust_remote_code)
    weights = _checked(bundles, weights, combination, density)
    manifests = [mergeable(bundle) for bundle in bundles]
    _check_alike(bundles, manifests, combination)
    out = check_output(out, *bundles, base or manifests[0]["base"]["name"])
    sources = [provenance(manifest, weight) for manifest, weight in zip(manifests, weights, strict=True)]
    # Nobody has measured or calibrated the combined answers.
    content = {**inherited(manifests[0]), "calibration": None, "metrics": {}, "merged_from": sources}
    content["combination"] = {"type": combination, "density": density, "head_weights": _shares(weights)}
    return write_merge(lambda: _combined(bundles, weights, combination, density, settings), out, content, settings)


def _checked(
    bundles: Sequence[str | Path], weights: Sequence[float], combination: str, density: float | None
) -> list[float]:
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
    """Rank of the update as the bundle holds it: twice that of training after a start that took from the base."""
    options = method_options(manifest["method"], manifest["method_options"])
    return options.r * (2 if changes_base(options) else 1)


def _shares(weights: Sequence[float]) -> list[float]:
    return [weight / sum(weights) for weight in weights]


@dataclass(frozen=True)
class _Part:
    """One bundle's update: PEFT's configuration, the factors, and all else that it trained, by PEFT's names."""

    config: Any
    factors: dict[str, torch.Tensor]
    trained: dict[str, torch.Tensor]


def _combined(
    bundles: Sequence[str | Path],
    weights: Sequence[float],
    combination: str,
    density: float | None,
    settings: MergeSettings,
) -> Bundle:
    """A classifier whose one adapter is the combination, and whose head is the mean."""
    parts, first = [], None
    for path in bundles:
        loaded = load_bundle(path, base=settings.base, trust_remote_code=settings.trust_remote_code)
        parts.append(_part(loaded.classifier))
        first = first or dataclasses.replace(loaded, classifier=None)
        options = loaded.classifier.model_options
        del loaded  # one base in memory at a time
    plain = build_classifier(options, HeadOptions(), outcomes_of(first.domain), trained=True, tokenizer=first.tokenizer)
    with torch.no_grad():
        for name in parts[0].trained:
            mean = sum(share * part.trained[name] for share, part in zip(_shares(weights), parts, strict=True))
            plain.model.get_parameter(name.removeprefix("base_model.model.")).copy_(mean)
    model = _with_combination(plain.model, parts, weights, combination, density)
    classifier = BehaviorClassifier(model, "lora", plain.labels)
    classifier.model_options = options
    return dataclasses.replace(first, classifier=classifier.eval(), calibration=None)


def _part(classifier: BehaviorClassifier) -> _Part:
    tensors = {name: value.clone() for name, value in adapter_tensors(classifier).items()}
    factors = {name: value for name, value in tensors.items() if ".lora_" in name}
    config = copy.deepcopy(classifier.model.peft_config["default"])
    # PEFT gives the combination the scale alpha / r = 1, but keeps the first bundle's root of r.
    config.lora_alpha = config.lora_alpha * (config.r**0.5 if config.use_rslora else 1)
    config.use_rslora = False
    config.modules_to_save = config.task_type = None  # else PEFT would put the head into the adapter again
    return _Part(config, factors, {name: value for name, value in tensors.items() if name not in factors})


def _with_combination(
    model: torch.nn.Module,
    parts: Sequence[_Part],
    weights: Sequence[float],
    combination: str,
    density: float | None,
) -> torch.nn.Module:
    """PeftModel around a stock classifier, with the combined adapter alone."""
    from peft import get_peft_model, set_peft_model_state_dict

    fresh, names = list(model.fresh_modules), [f"part{number}" for number in range(len(parts))]
    with warnings.catch_warnings():  # PEFT asks for an attribute that Transformers has renamed
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        wrapped = get_peft_model(model, parts[0].config, adapter_name=names[0])
        for name, part in zip(names[1:], parts[1:], strict=True):
            wrapped.add_adapter(name, part.config)
    for name, part in zip(names, parts, strict=True):
        set_peft_model_state_dict(wrapped, part.factors, adapter_name=name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        wrapped.add_weighted_adapter(names, list(weights), "combined", combination_type=combination, density=density)
    wrapped.set_adapter("combined")
    for name in names:
        wrapped.delete_adapter(name)
    wrapped.get_base_model().fresh_modules = fresh
    return wrapped
