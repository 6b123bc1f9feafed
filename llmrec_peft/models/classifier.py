"""The behaviour classifier: a stock sequence classifier whose head is read at the marker tokens.

Shape letters: B rows, L tokens in a row, P cached tokens before them, T markers in the batch, H hidden width, C labels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from llmrec_peft.errors import ModelError
from llmrec_peft.models import attention
from llmrec_peft.models.last_layer import LastLayer
from llmrec_peft.models.segment_mask import segment_mask
from llmrec_peft.models.sharding import assign, whole, whole_shape
from llmrec_peft.models.stock_parts import backbone_of, head_of, is_encoder

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import Cache, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from llmrec_peft.models.tuning_options import MethodOptions, ModelOptions


class BehaviorClassifier(nn.Module):
    """Wraps a stock `AutoModelForSequenceClassification`, or a PeftModel around one, in `.model`.

    Attributes:
        method: name of the tuning method.
        labels: names of the labels in class order.
        encoder: whether the base is bidirectional.
        tokenizer, base, model_options, method_options: how the classifier was built; `load_classifier` sets them and
            `save_bundle` stores them.
        initial_factors: low-rank factors that an initialisation moved out of the base weights (PiSSA, OLoRA); see
            `lora.py`.
        selftests: results of `selftest.py`, by measurement: what is wrong with the base, or None.
    """

    def __init__(self, model: PreTrainedModel | PeftModel, method: str, labels: list[str]) -> None:
        super().__init__()
        self.model: Any = model
        self.method = method
        self.labels = list(labels)
        self.encoder = is_encoder(self.stock.config)
        self._last_layer = LastLayer(self.stock)
        if not self.encoder:
            attention.install(self.stock)
        # Set right after construction, except on models that are never saved.
        self.tokenizer: PreTrainedTokenizerBase = None  # type: ignore[assignment]
        self.base: str = ""
        self.model_options: ModelOptions = None  # type: ignore[assignment]
        self.method_options: MethodOptions | None = None
        self.initial_factors: dict[str, torch.Tensor] = {}
        self.selftests: dict[tuple[str, torch.dtype, str], str | None] = {}

    @property
    def stock(self) -> PreTrainedModel:
        """The stock classifier, with any adapters inside it."""
        return self.model.get_base_model() if hasattr(self.model, "peft_config") else self.model

    @property
    def _no_split_modules(self) -> Any:
        """Class names of the base's layers; under FSDP, Accelerate wraps each layer on its own."""
        return self.stock._no_split_modules

    @property
    def head(self) -> nn.Module:
        """The head as the forward pass calls it (PEFT wraps it)."""
        return head_of(self.stock)

    @property
    def config(self) -> PreTrainedConfig:
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

        Raises:
            ModelError: an encoder with candidates or with two markers in a row, flash attention with candidates, or
                rows without candidates whose positions do not count from 0.
        """
        if markers is None:
            raise ModelError(
                "forward needs markers, the flat index b * L + l of each prediction; pass the collator's batch"
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
        """Inputs of a decoder's head in `forward`, [T, H]; arguments as in `forward`."""
        # Only the markers are read after the last layer, and there are far fewer of them than tokens.
        places = markers if self._last_layer.runs_once else None
        with self._last_layer.only_at(places):
            return self.hidden_states(input_ids, position_ids, markers, attention_mask, segment)

    def hidden_states(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor | None,
        markers: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        segment: torch.Tensor | None = None,
        past: Cache | None = None,
        past_seen: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Last hidden state of a decoder at each marker, [T, H]; arguments as in `forward`.

        Args:
            past: a Transformers cache with the keys and values of P earlier tokens; those of these tokens are added.
            past_seen: bool [B, P], which of the earlier tokens the row sees.
        """
        mask, positions = attention_mask, position_ids
        if segment is not None:
            mask = segment_mask(self.stock, segment, attention_mask, past_seen)
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

    def _head_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [T, C] in float32 of head inputs [T, H]; autocast is off, as it would round them to 3 digits."""
        with torch.autocast(hidden.device.type, enabled=False):
            return self.head(hidden.float()).float()

    def _encoder_logits(
        self,
        input_ids: torch.Tensor,
        markers: torch.Tensor,
        attention_mask: torch.Tensor | None,
        segment: torch.Tensor | None,
    ) -> torch.Tensor:
        if segment is not None:
            raise ModelError(
                f"base {self.config.model_type} is a bidirectional encoder and cannot hide candidates from each other; "
                "use it for pointwise records, or use a decoder"
            )
        rows = markers // input_ids.shape[1]
        if len(rows) != len(torch.unique(rows)):
            raise ModelError(
                f"base {self.config.model_type} is a bidirectional encoder and predicts once a row, but a row has "
                "several markers; use it for pointwise records, or use a decoder"
            )
        # Encoders have different modules before the head, so the whole stock forward runs; a hook records the input of
        # the head, [B, H], and the head runs again on it in float32.
        read: list[torch.Tensor] = []
        hook = self.head.register_forward_pre_hook(lambda _head, inputs: read.append(inputs[0]))
        try:
            self.stock(input_ids=input_ids, attention_mask=attention_mask)
        finally:
            hook.remove()
        return self._head_logits(read[0]).index_select(0, rows)

    def trainable_parameters(self) -> tuple[int, int]:
        """Counts of (trainable, all) parameters; packed 4-bit weights count as the numbers they hold."""
        trainable = total = 0
        for parameter in self.parameters():
            state = getattr(parameter, "quant_state", None)
            count = (whole_shape(parameter) if state is None else state.shape).numel()
            total += count
            trainable += count if parameter.requires_grad else 0
        return trainable, total

    def summary(self, base: str | None = None) -> str:
        """One line for the log: method, `base` (None for the name or path of its base), trained parameters, labels."""
        trainable, total = self.trainable_parameters()
        base = base or self.base or self.config.model_type
        return (
            f"{self.method} on {base}: {trainable:,} of {total:,} parameters train "
            f"({trainable / total:.2%}), {len(self.labels)} labels ({', '.join(self.labels)})"
        )

    def trainable_state_dict(self) -> dict[str, torch.Tensor]:
        """Detached whole tensors of all trainable parameters, the head among them, by their names inside `.model`.

        Where the parameters are split over ranks, all ranks must call this.
        """
        return {name: whole(value) for name, value in self.model.named_parameters() if value.requires_grad}

    def load_trainable_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Copy tensors of `trainable_state_dict` back. Raises ModelError for a missing, extra or misshapen tensor.

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
    """Positions [1, L] = 0, 1, 2, ... of rows without candidates and without left padding.

    Pad tokens on the right may have any position. Transformers would take such positions for packed sequences and build
    a mask, but plain causal attention needs none.
    """
    length = input_ids.shape[1]
    plain = torch.arange(length, device=input_ids.device)[None, :]
    if position_ids is not None and not torch.equal(position_ids.flatten()[markers], markers % length):
        raise ModelError(
            "rows without segment and attention_mask must have positions 0, 1, 2, ... up to their last marker; "
            "pass segment for candidates and attention_mask for left padding"
        )
    return plain
