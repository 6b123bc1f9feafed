"""Loads trained directories (bundles, merged models, students), and builds new classifiers on a base.

`load_trained` reads a bundle, a merged model or a student. `load_classifier` is for training: it builds a classifier on
a base, or takes the one of a bundle.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmrec_peft.checkpoints.adapter_checks import (
    check_bundle,
    check_names,
    check_shapes,
    compare_config,
    plain_options,
    read_state,
    reading,
)
from llmrec_peft.checkpoints.adapter_tensors import adapter_config, adapter_tensors
from llmrec_peft.checkpoints.bundle import Bundle
from llmrec_peft.checkpoints.directory_checks import read_json
from llmrec_peft.checkpoints.manifest import is_merged, read_options
from llmrec_peft.checkpoints.manifest_schema import ADAPTER, CONFIG, MANIFEST, MERGED, WEIGHTS, ManifestKind
from llmrec_peft.checkpoints.merged_checks import check_merged, no_more_than, reading_merged
from llmrec_peft.errors import BundleError, ConfigError, ModelError
from llmrec_peft.messages import shortened
from llmrec_peft.models.base import base_source, load_tokenizer, resolve_base
from llmrec_peft.models.base_model import load_model
from llmrec_peft.models.base_weights import base_fingerprint
from llmrec_peft.models.building import build_classifier
from llmrec_peft.models.classifier import BehaviorClassifier
from llmrec_peft.models.fingerprints import fits, short, tokenizer_fingerprint
from llmrec_peft.models.head import outcomes_of
from llmrec_peft.models.safetensors_header import TensorEntry, read_headers
from llmrec_peft.models.selftest import check_base_for
from llmrec_peft.models.stock_parts import unread_tensors_of
from llmrec_peft.models.tensor_files import check_finite
from llmrec_peft.models.tuning_options import (
    LoraOptions,
    MethodOptions,
    ModelOptions,
    from_mapping,
    method_name_of,
    method_options,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llmrec_peft.data.domain import Domain


@dataclass(frozen=True)
class LoadOptions:
    """Options of loading a trained directory.

    Attributes:
        base: for a bundle, another path or name of its base; the base's weights must be the same.
        dtype: number format of the base's weights; None for that of the bundle or merged model. The head is float32.
        attn: attention kernel; None for that of the bundle or merged model.
        trust_remote_code: allow the base's own code to run; a bundle cannot allow it.
        mapped: for a bundle of method full, leave the weights in the pages of their file, which take no memory of their
            own. Kernels round by memory alignment, so logits may differ in the last bit from those in training.
    """

    base: str | None = None
    dtype: str | None = None
    attn: str | None = None
    trust_remote_code: bool = False
    mapped: bool = False


def load_trained(
    directory: str | Path, options: LoadOptions | None = None, *, kind: ManifestKind | None = None
) -> Bundle:
    """Load a bundle, a merged model or a student for predictions, with all checks of its files and of its base.

    Args:
        kind: ADAPTER or MERGED to accept only that kind; None to accept both.

    Raises:
        BundleError: the directory is damaged, does not match its base or is of another kind, or `options.base` is given
            for a merged model. The message has both values of a mismatch.
    """
    directory, options = Path(directory), options or LoadOptions()
    if kind is None:
        kind = MERGED if is_merged(directory) else ADAPTER
    return _load_merged(directory, options) if kind is MERGED else _load_bundle(directory, options)


def load_classifier(
    source: str | Path | ModelOptions | None = None,
    domain: Domain | Mapping[str, Any] | None = None,
    method: str | MethodOptions | None = None,
    **options: Any,
) -> BehaviorClassifier:
    """A classifier ready to train on a base model, or the trained one of a bundle.

    Args:
        source: a base (as `ModelOptions.base`, such as the directory of a merged model), a `ModelOptions`, or the
            directory of a bundle. None: the default base.
        domain: a `Domain` or its mapping; its outcomes give the labels and the label words that the head starts from.
        method: `lora` (the default), `qlora`, `adapter`, `head` or `full`, or the options object of one.
        options: fields of `ModelOptions` and of the method's options, by name. For a bundle: fields of `LoadOptions`.

    For a bundle, domain and method must be left out or equal those of the bundle.

    Raises:
        ModelError: the base or the method does not support the request.
        ConfigError: an unknown option.
        BundleError: a bundle that is damaged or does not match its base.
    """
    if isinstance(source, str | Path) and (Path(source) / MANIFEST).is_file() and not is_merged(source):
        return _classifier_of_bundle(Path(source), domain, method, options)
    base_options, tuning = _split_options(source, method, options)
    if domain is None:
        raise ModelError(
            "a classifier on a base model needs a domain for its labels; pass domain=Domain.from_yaml(...)"
        )
    classifier = build_classifier(base_options, tuning, outcomes_of(domain))
    check_base_for(classifier, domain)
    return classifier


def _classifier_of_bundle(
    directory: Path,
    domain: Domain | Mapping[str, Any] | None,
    method: str | MethodOptions | None,
    options: Mapping[str, Any],
) -> BehaviorClassifier:
    free = ("base", "dtype", "attn", "trust_remote_code")
    unknown = sorted(set(options) - set(free))
    if unknown:
        raise ConfigError(
            f"a bundle carries its own {unknown[0]!r}; only {', '.join(free)} can be set, so leave it out"
        )
    bundle = _load_bundle(directory, LoadOptions(**options))
    name = method if isinstance(method, str) or method is None else method_name_of(method)
    if name is not None and name != bundle.classifier.method:
        raise ModelError(
            f"bundle {directory} was trained by method {bundle.classifier.method}, not {name}; leave method out"
        )
    if domain is not None and outcomes_of(domain) != outcomes_of(bundle.domain):
        raise ModelError(
            f"bundle {directory} predicts {outcomes_of(bundle.domain)}, the domain given has {outcomes_of(domain)}; "
            "leave domain out"
        )
    check_base_for(bundle.classifier, bundle.domain)
    return bundle.classifier


def _split_options(
    source: str | Path | ModelOptions | None, method: str | MethodOptions | None, options: Mapping[str, Any]
) -> tuple[ModelOptions, MethodOptions]:
    """The options objects of base and method, from options by name."""
    model_fields = {field.name for field in dataclasses.fields(ModelOptions)}
    of_model = {key: value for key, value in options.items() if key in model_fields}
    of_method = {key: value for key, value in options.items() if key not in model_fields}
    if isinstance(source, ModelOptions):
        base_options = dataclasses.replace(source, **of_model)
    else:
        if source is not None:
            of_model.setdefault("base", str(source))
        base_options = from_mapping(ModelOptions, of_model, "model")
    if method is None or isinstance(method, str):
        return base_options, method_options(method or "lora", of_method)
    if of_method:
        raise ConfigError(f"option {min(of_method)!r} is given beside an options object; set it in the object")
    return base_options, method


# -- bundles -----------------------------------------------------------------------------------------


def _load_bundle(directory: Path, options: LoadOptions) -> Bundle:
    manifest, entries = check_bundle(directory)
    overrides = {"base": options.base, "dtype": options.dtype, "attn": options.attn}
    changed: dict[str, Any] = {key: value for key, value in overrides.items() if value is not None}
    if options.base is not None:
        changed["gguf_file"] = None
    stored = manifest["model_options"] | changed
    if stored.get("trust_remote_code") and not options.trust_remote_code:
        raise BundleError(
            f"{directory} asks to run code that comes with its base; pass trust_remote_code=True if wanted"
        )
    tuning, model_options = read_options(directory, manifest, stored)
    if isinstance(tuning, LoraOptions):
        tuning = plain_options(tuning)
    with reading(directory):
        tokenizer = _check_base(directory, manifest, model_options)
        classifier = build_classifier(
            model_options, tuning, outcomes_of(manifest["domain"]), trained=True, tokenizer=tokenizer,
            check=lambda stock: check_shapes(directory / WEIGHTS, stock, tuning, entries),
        )  # fmt: skip
        _check_config(directory, classifier)
        _load_tensors(directory, classifier, entries, options.mapped)
    return Bundle(classifier.eval(), tokenizer, manifest["domain"], manifest, manifest["calibration"])


def _check_base(directory: Path, manifest: dict[str, Any], options: ModelOptions) -> PreTrainedTokenizerBase:
    """Compare the fingerprints of the base and of its tokenizer with the manifest's; returns the tokenizer."""
    trust = options.trust_remote_code
    try:
        source = resolve_base(options.base, options.gguf_file)
        found = base_fingerprint(source, trust_remote_code=trust)
        tokenizer = load_tokenizer(source, trust_remote_code=trust)
    except ModelError as error:
        raise BundleError(f"bundle {directory} cannot reach its base: {error}; or pass base=") from error
    stated = manifest["base"].get("fingerprint")
    if found != stated:
        raise BundleError(
            f"bundle {directory} was trained on {_described(manifest['base'])} with fingerprint {short(stated)}, but "
            f"base {_described({'name': options.base, 'source': base_source(options.base)})} has {short(found)}; "
            "load it on the base that it was trained on"
        )
    stated = manifest["tokenizer"].get("fingerprint")
    if not fits(tokenizer, stated):
        raise BundleError(
            f"bundle {directory} was trained with a tokenizer of fingerprint {short(stated)}, but that of base "
            f"{options.base} has {short(tokenizer_fingerprint(tokenizer))}; use the base's own tokenizer files"
        )
    return tokenizer


def _described(base: Mapping[str, Any]) -> str:
    """A base's name, and where its weights come from if the name does not tell."""
    name, source = base.get("name"), base.get("source")
    return shortened(name, 300) if source in (None, name) else f"{shortened(name, 300)} (from {shortened(source, 300)})"


def _check_config(directory: Path, classifier: BehaviorClassifier) -> None:
    """Compare adapter_config.json with what the manifest's options make on this base."""
    made = json.loads(json.dumps(adapter_config(classifier, ""), default=str))
    targets = getattr(classifier.method_options, "target_modules", None)
    if isinstance(targets, list) and read_json(directory / CONFIG).get("target_modules") == sorted(targets):
        made["target_modules"] = sorted(targets)  # PEFT shortens a long list
    compare_config(directory, made)


def _load_tensors(
    directory: Path, classifier: BehaviorClassifier, entries: dict[str, TensorEntry], mapped: bool
) -> None:
    path, own = directory / WEIGHTS, adapter_tensors(classifier)
    check_names(path, {name: tuple(value.shape) for name, value in own.items()}, entries)
    state = read_state(path)
    if isinstance(classifier.method_options, LoraOptions):
        from peft import set_peft_model_state_dict

        set_peft_model_state_dict(classifier.model, state)
    elif mapped and classifier.method == "full":
        for name, value in classifier.model.named_parameters():
            value.data = state[name].to(value.device, value.dtype)
    else:
        classifier.load_trainable_state_dict(state)


# -- merged models and students ----------------------------------------------------------------------


def _load_merged(directory: Path, options: LoadOptions) -> Bundle:
    """A merged model or a student; the method of its classifier is "merged"."""
    if options.base is not None:
        raise BundleError(
            f"{directory} is a merged model, which holds its base's weights already; leave base {options.base!r} out"
        )
    trust = options.trust_remote_code
    manifest, shards, tokenizer = check_merged(directory, trust)
    model_options = from_mapping(
        ModelOptions,
        {
            "base": str(directory),
            "dtype": options.dtype or manifest["dtype"],
            "attn": options.attn or manifest.get("attn", "sdpa"),
            "trust_remote_code": trust,
        },
        "model",
    )
    labels = manifest["labels"]
    try:
        with reading_merged(directory), no_more_than(read_headers(shards)):
            model = load_model(
                str(directory), len(labels), id2label=dict(enumerate(labels)), dtype=model_options.dtype,
                attn_implementation=model_options.attn, trust_remote_code=trust, pad_token_id=tokenizer.pad_token_id,
            )  # fmt: skip
        check_finite(dict(model.named_parameters()))
    except ModelError as error:
        raise BundleError(f"merged model {directory} cannot be loaded: {error}") from error
    except ValueError as error:
        if isinstance(error, BundleError):
            raise
        raise BundleError(f"merged model {directory} {error}; {MERGED.restore}") from None
    unread = unread_tensors_of(model)
    if unread:
        raise BundleError(
            f"merged model {directory} holds the tensor {shortened(unread[0])!r}, which its model does not have "
            f"({len(unread)} in all); {MERGED.restore}"
        )
    if not model.trained_head:
        raise BundleError(f"merged model {directory} has no head for the labels {labels}; {MERGED.restore}")
    model.requires_grad_(False)
    classifier = BehaviorClassifier(model, "merged", labels)
    classifier.tokenizer, classifier.base, classifier.model_options = tokenizer, str(directory), model_options
    return Bundle(classifier.eval(), tokenizer, manifest["domain"], manifest, manifest["calibration"])
