"""The behaviour classifier: a stock sequence classifier that answers at marker tokens.

Shape letters: B rows, L tokens in a row, T markers in the batch, H hidden width, C labels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llmrec_peft.checkpoints.manifest import MANIFEST, is_merged
from llmrec_peft.errors import ConfigError, ModelError
from llmrec_peft.models import attention
from llmrec_peft.models.base import Quantization, load_model, load_tokenizer, resolve_base
from llmrec_peft.models.head import outcomes_of, start_head
from llmrec_peft.models.last_layer import LastLayer
from llmrec_peft.models.selftest import check_base_for
from llmrec_peft.models.sharding import assign, whole, whole_shape
from llmrec_peft.models.stock_parts import backbone_of, head_name, is_encoder, modules_named
from llmrec_peft.models.tuning_options import (
    METHODS,
    AdapterOptions,
    FullOptions,
    LoraOptions,
    MethodOptions,
    ModelOptions,
    QloraOptions,
    changes_base,
    from_mapping,
    method_options,
)


class BehaviorClassifier(nn.Module):
    """Wraps a stock `AutoModelForSequenceClassification`, or a PeftModel around one, in `.model`.

    `method` is the tuning method, `labels` the label names in class order. `tokenizer`, `base`, `model_options` and
    `method_options` say how it was made; `load_classifier` sets them and `save_bundle` writes them down.
    """

    def __init__(self, model: nn.Module, method: str, labels: list[str]) -> None:
        super().__init__()
        self.model = model
        self.method = method
        self.labels = list(labels)
        self.encoder = is_encoder(self.stock.config)
        self._last_layer = LastLayer(self.stock)
        if not self.encoder:
            attention.install(self.stock)
        self.tokenizer: Any = None
        self.base: str = ""
        self.model_options: Any = None
        self.method_options: Any = None
        # Low-rank factors that an initialisation took out of the base weights (PiSSA, OLoRA); see `lora.py`.
        self.initial_factors: dict[str, torch.Tensor] = {}
        self.selftests: dict[tuple[Any, ...], str | None] = {}  # what `selftest` found wrong, by measurement

    @property
    def stock(self) -> nn.Module:
        """The stock classifier, with any adapters inside it."""
        return self.model.get_base_model() if hasattr(self.model, "peft_config") else self.model

    @property
    def _no_split_modules(self) -> Any:
        """Names of the classes of the base's layers; Accelerate shares them out one by one under FSDP."""
        return self.stock._no_split_modules

    @property
    def head(self) -> nn.Module:
        """The head as the forward pass calls it (PEFT wraps it)."""
        return getattr(self.stock, head_name(self.stock))

    @property
    def config(self) -> Any:
        """Transformers' configuration of the model; Trainer and accelerate look for it here."""
        return self.stock.config

    @property
    def device(self) -> torch.device:
        """Device of the first parameter."""
        return next(self.parameters()).device

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        markers: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        segment: torch.Tensor | None = None,
        **ignored: Any,
    ) -> torch.Tensor:
        """Logits of the markers, float32 [T, C] in class order.

        Args:
            input_ids: token ids, int64 [B, L].
            position_ids: positions, int64 [B, L]; those of pad tokens do not matter.
            markers: flat index b * L + l of each marker's last token, int64 [T].
            attention_mask: None, or int64 [B, L] with 0 at pad tokens; needed with left padding and for encoders.
            segment: None for rows without candidates, or int64 [B, L]: 0 for the prefix, a number for each candidate,
                -1 at pads.
            ignored: other columns of the batch (labels, groups), which the loss reads.

        Raises ModelError where the rows cannot give these answers: an encoder with candidates or with two markers in a
        row, flash attention with candidates, plain rows whose positions do not count from 0.
        """
        if markers is None:
            raise ModelError(
                "forward needs markers, the flat index b * L + l of each answer; pass the collator's batch"
            )
        if self.encoder:
            return self._encoder_logits(input_ids, markers, attention_mask, segment)
        return self._head_logits(self.head_inputs(input_ids, position_ids, markers, attention_mask, segment))

    def head_inputs(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor | None,
        markers: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        segment: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """What `forward` gives to the head of a decoder: [T, H]; arguments as `forward`'s."""
        # Packed tokens outnumber the answers, and only these are read behind the last layer.
        alone = markers if self._last_layer.runs_once else None
        with self._last_layer.answers(alone):
            return self.hidden_states(input_ids, position_ids, markers, attention_mask, segment)

    def hidden_states(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor | None,
        markers: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        segment: torch.Tensor | None = None,
        past: Any = None,
        past_seen: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """What the head reads: the last hidden state at each marker [T, H], of a decoder; arguments as `forward`'s.

        `past` is a cache of Transformers that holds keys and values of P tokens before these, and takes theirs in; all
        rows of `segment` see those that `past_seen`, bool [B, P], says.
        """
        mask, positions = attention_mask, position_ids
        if segment is not None:
            mask = self._segment_mask(segment, attention_mask, past_seen)
            if self.config._attn_implementation == attention.NAME:
                attention.lay_out(mask, segment, attention_mask, past_seen)
        elif attention_mask is None:
            positions = _plain_positions(input_ids, position_ids, markers)
        backbone = backbone_of(self.stock)
        output = backbone(
            input_ids=input_ids, position_ids=positions, attention_mask=mask, past_key_values=past,
            use_cache=past is not None,
        )  # fmt: skip
        hidden = output.last_hidden_state  # [B, L, H]
        return hidden.flatten(0, 1).index_select(0, markers)

    def _head_logits(self, answers: torch.Tensor) -> torch.Tensor:
        """The head's logits in float32, under autocast too, which would round them to 3 digits."""
        with torch.autocast(answers.device.type, enabled=False):
            return self.head(answers.float()).float()

    def _encoder_logits(
        self,
        input_ids: torch.Tensor,
        markers: torch.Tensor,
        attention_mask: torch.Tensor | None,
        segment: torch.Tensor | None,
    ) -> torch.Tensor:
        if segment is not None:
            raise ModelError(
                f"base {self.config.model_type} reads both ways and cannot hide candidates from each other; "
                "use it for pointwise records, or use a decoder"
            )
        rows = markers // input_ids.shape[1]
        if len(rows) != len(torch.unique(rows)):
            raise ModelError(
                f"base {self.config.model_type} reads both ways and gives one answer a row, but a row has several "
                "markers; use it for pointwise records, or use a decoder"
            )
        # Encoders differ in what leads to the head, so the stock forward runs whole, and the head again on its input.
        read: list[torch.Tensor] = []
        hook = self.head.register_forward_pre_hook(lambda _head, inputs: read.append(inputs[0]))
        try:
            self.stock(input_ids=input_ids, attention_mask=attention_mask)
        finally:
            hook.remove()
        return self._head_logits(read[0]).index_select(0, rows)

    def _segment_mask(
        self, segment: torch.Tensor, attention_mask: torch.Tensor | None, past_seen: torch.Tensor | None = None
    ) -> torch.Tensor:
        """4-D mask [B, 1, L, P + L] of allow(q, k) = k <= q and (segment[k] == 0 or segment[k] == segment[q]).

        The P tokens before these are prefix, as far as `past_seen` [B, P] says that they are there.

        A pad token (-1) sees itself alone, so that its softmax has a term, and no real token sees it. The mask goes to
        every layer unchanged: boolean for sdpa, additive in the model's dtype for eager.
        """
        kind = self.config._attn_implementation
        if kind not in ("sdpa", attention.NAME, "eager"):
            raise ModelError(f"attention {kind!r} cannot hide candidates from each other; set model.attn to sdpa")
        if attention_mask is not None:
            segment = segment.masked_fill(attention_mask == 0, -1)
        length = segment.shape[1]
        query, key = segment[:, :, None], segment[:, None, :]
        order = torch.arange(length, device=segment.device)
        allow = (key == 0) | ((key == query) & (key > 0))
        allow = (allow & (order[None, :] <= order[:, None])) | (order[None, :] == order[:, None])
        if past_seen is not None:
            earlier = past_seen[:, None, :].expand(-1, length, -1) & (segment >= 0)[:, :, None]
            allow = torch.cat([earlier, allow], dim=2)
        allow = allow[:, None]
        if kind != "eager":
            return allow
        dtype = self.stock.dtype
        additive = torch.zeros(allow.shape, dtype=dtype, device=segment.device)
        return additive.masked_fill_(~allow, torch.finfo(dtype).min)

    def trainable_parameters(self) -> tuple[int, int]:
        """Counts of (trainable, all) parameters; packed 4-bit weights count as the numbers they hold."""
        trainable = total = 0
        for parameter in self.parameters():
            state = getattr(parameter, "quant_state", None)
            count = (whole_shape(parameter) if state is None else state.shape).numel()
            total += count
            trainable += count if parameter.requires_grad else 0
        return trainable, total

    def summary(self) -> str:
        """One line for the log: method, base, parameters that train, head."""
        trainable, total = self.trainable_parameters()
        return (
            f"{self.method} on {self.base or self.config.model_type}: {trainable:,} of {total:,} parameters train "
            f"({trainable / total:.2%}), {len(self.labels)} labels ({', '.join(self.labels)})"
        )

    def trainable_state_dict(self) -> dict[str, torch.Tensor]:
        """Detached whole tensors of all trainable parameters, the head among them, by their names inside `.model`.

        Where the parameters are split over ranks, all ranks must call this.
        """
        return {name: whole(value) for name, value in self.model.named_parameters() if value.requires_grad}

    def load_trainable_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Copy tensors of `trainable_state_dict` back. Raises ModelError naming what is missing, extra or misshapen.

        Where the parameters are split over ranks, all ranks must call this with the same tensors.
        """
        own = {name: value for name, value in self.model.named_parameters() if value.requires_grad}
        for what, names in (("lacks", own.keys() - state.keys()), ("has an extra", state.keys() - own.keys())):
            if names:
                raise ModelError(
                    f"saved state {what} tensor {min(names)!r} ({len(names)} in all); load what this method saved"
                )
        for name, value in own.items():
            if whole_shape(value) != state[name].shape:
                raise ModelError(
                    f"saved tensor {name!r} has shape {tuple(state[name].shape)}, the model's has "
                    f"{tuple(whole_shape(value))}; use the same options"
                )
        for name, value in own.items():
            assign(value, state[name])


def _plain_positions(input_ids: torch.Tensor, position_ids: torch.Tensor | None, markers: torch.Tensor) -> torch.Tensor:
    """0, 1, 2, ... for rows without candidates or left padding.

    Pad tokens on the right may carry any position; passed on, they would make Transformers look for packed sequences
    and build a mask, where plain causal attention needs none.
    """
    length = input_ids.shape[1]
    plain = torch.arange(length, device=input_ids.device)[None, :]
    if position_ids is not None and not torch.equal(position_ids.flatten()[markers], markers % length):
        raise ModelError(
            "rows without segment and attention_mask must have positions 0, 1, 2, ... up to their last marker; "
            "pass segment for candidates and attention_mask for left padding"
        )
    return plain


def load_classifier(
    source: str | Path | ModelOptions | None = None,
    domain: Any = None,
    method: str | MethodOptions | None = None,
    **options: Any,
) -> BehaviorClassifier:
    """A classifier ready to train, on a base model; or the trained one of a bundle directory.

    Args:
        source: a base (as `ModelOptions.base`, such as a merged model's directory), a `ModelOptions`, or a bundle's
            directory. None: the default base.
        domain: a `Domain`, or its mapping; its outcomes give the labels and the words that the head starts from.
        method: `lora` (the default), `qlora`, `adapter`, `head` or `full`, or the options object of one.
        options: fields of `ModelOptions` and of the method's options, by name.

    For a bundle, domain and method must be left out or equal what the bundle holds. Raises ModelError for what a base
    or method cannot do, ConfigError for unknown options and BundleError for a bundle that does not match.
    """
    if isinstance(source, str | Path) and (Path(source) / MANIFEST).is_file() and not is_merged(source):
        return _restored(Path(source), domain, method, options)
    base_options, tuning = _split_options(source, method, options)
    if domain is None:
        raise ModelError(
            "a classifier on a base model needs a domain for its labels; pass domain=Domain.from_yaml(...)"
        )
    classifier = build_classifier(base_options, tuning, outcomes_of(domain))
    check_base_for(classifier, domain)
    return classifier


def _restored(directory: Path, domain: Any, method: Any, options: Mapping[str, Any]) -> BehaviorClassifier:
    from llmrec_peft.checkpoints.bundle import load_bundle

    free = ("base", "dtype", "attn", "trust_remote_code")
    unknown = sorted(set(options) - set(free))
    if unknown:
        raise ConfigError(
            f"a bundle carries its own {unknown[0]!r}; only {', '.join(free)} can be set, so leave it out"
        )
    bundle = load_bundle(directory, **options)
    name = method if isinstance(method, str) or method is None else name_of(method)
    if name is not None and name != bundle.classifier.method:
        raise ModelError(
            f"bundle {directory} was trained by method {bundle.classifier.method}, not {name}; leave method out"
        )
    if domain is not None and outcomes_of(domain) != outcomes_of(bundle.domain):
        raise ModelError(
            f"bundle {directory} answers {outcomes_of(bundle.domain)}, the domain given has {outcomes_of(domain)}; "
            "leave domain out"
        )
    check_base_for(bundle.classifier, bundle.domain)
    return bundle.classifier


def _split_options(source: Any, method: Any, options: Mapping[str, Any]) -> tuple[ModelOptions, MethodOptions]:
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


def name_of(options: MethodOptions) -> str:
    """Name of the method that an options object belongs to."""
    return next(name for name, kind in METHODS.items() if type(options) is kind)


def build_classifier(
    model_options: ModelOptions,
    tuning: MethodOptions,
    outcomes: Mapping[str, str],
    *,
    trained: bool = False,
    tokenizer: Any = None,
    check: Callable[[nn.Module], None] | None = None,
) -> BehaviorClassifier:
    """Classifier on a base, by options objects and outcomes (label -> word).

    `trained` leaves out work whose result a bundle's tensors will replace: the head's start, and the initialisations
    of LoRA that read the base's weights. `tokenizer` is the base's, where it has been loaded already. `check` is called
    with the stock model before the method's modules are put in. A base that is a classifier of these labels already (a
    merged model) keeps its head under `head_init: words`. Raises ConfigError for a method that the base's dtype does
    not serve.
    """
    if not trained:
        check_precision(model_options, tuning)
    base = resolve_base(model_options.base, model_options.gguf_file)
    if tokenizer is None:
        tokenizer = load_tokenizer(base, trust_remote_code=model_options.trust_remote_code)
    labels = list(outcomes)
    model = load_model(
        base,
        len(labels),
        id2label=dict(enumerate(labels)),
        dtype=model_options.dtype,
        attn_implementation=model_options.attn,
        quantization=quantization_of(tuning, model_options),
        trust_remote_code=model_options.trust_remote_code,
        pad_token_id=tokenizer.pad_token_id,
    )
    if not trained:
        start_head(model, base, tokenizer, outcomes, model_options)
    if model_options.activation_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    if check is not None:
        check(model)
    classifier = with_method(model, tuning, labels, base, trained)
    classifier.tokenizer = tokenizer
    classifier.base = model_options.base
    classifier.model_options = model_options
    classifier.method_options = _resolved(tuning, classifier)
    return classifier.eval()


def _resolved(tuning: MethodOptions, classifier: BehaviorClassifier) -> MethodOptions:
    """The options as a bundle keeps them: what a pattern of modules matched is listed, and never matched again."""
    targets = getattr(tuning, "target_modules", None)
    if not isinstance(targets, str) or targets == "all-linear":
        return tuning
    config = classifier.stock.peft_config["default"]
    return dataclasses.replace(tuning, target_modules=sorted(config.target_modules))


def check_precision(model_options: ModelOptions, tuning: MethodOptions) -> None:
    """Refuse to train what 8 bits of mantissa or fewer would round away."""
    if model_options.dtype == "float32":
        return
    if isinstance(tuning, FullOptions):
        raise ConfigError(
            f"model.dtype must be float32 with method full, not {model_options.dtype!r}, which rounds most updates "
            "away; keep float32 and launch with --mixed_precision bf16 (under ZeRO: accelerate_configs/zero3_bf16.yaml)"
        )
    if isinstance(tuning, LoraOptions) and changes_base(tuning):
        raise ConfigError(
            f"init {tuning.init} needs model.dtype float32, not {model_options.dtype!r}, as it takes a part out of the "
            "base weights that must go back exactly; use float32, or init default"
        )


def quantization_of(tuning: MethodOptions, model_options: ModelOptions) -> Quantization | None:
    """How the base's linear layers are held; None for whole numbers."""
    if not isinstance(tuning, QloraOptions):
        return None
    return Quantization(
        tuning.quant_type,
        tuning.double_quant,
        tuning.compute_dtype or model_options.dtype,
        tuning.quant_storage or "uint8",
    )


def with_method(
    model: nn.Module, tuning: MethodOptions, labels: list[str], base: str, trained: bool
) -> BehaviorClassifier:
    """The classifier of a stock model: its frozen and trained parts set, and the method's modules put in."""
    method = name_of(tuning)
    if isinstance(tuning, LoraOptions):
        from llmrec_peft.models.lora import add_lora

        model, initial = add_lora(model, tuning, base, trained=trained)
        classifier = BehaviorClassifier(model, method, labels)
        classifier.initial_factors = initial
        return classifier
    model.requires_grad_(method == "full")
    if isinstance(tuning, AdapterOptions):
        from llmrec_peft.models.bottleneck import add_adapters

        add_adapters(model, tuning)
    for name in model.fresh_modules:
        for module in modules_named(model, name):
            module.requires_grad_(True)
    return BehaviorClassifier(model, method, labels)
