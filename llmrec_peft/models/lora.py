"""LoRA and QLoRA through PEFT, so that PEFT alone can load their bundles.

Shape letters: I inputs and O outputs of a layer, r rank. W is [O, I], A [r, I], B [O, r]; the layer adds s B A to W.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers.pytorch_utils import Conv1D

from llmrec_peft.errors import BundleError, ModelError
from llmrec_peft.messages import shortened
from llmrec_peft.models.base_weights import backbone_entries
from llmrec_peft.models.fused_lora import fuse_lora
from llmrec_peft.models.stock_parts import HEAD_NAMES, backbone_of, fresh_modules_of
from llmrec_peft.models.tensor_files import read_tensor
from llmrec_peft.models.tuning_options import LoraOptions, QloraOptions, changes_base, matching_names

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel

_log = logging.getLogger(__name__)
_SAME = re.compile(r"\.lora_([AB])\.default\.weight$")


def add_lora(
    model: PreTrainedModel, options: LoraOptions, base: str, *, trained: bool = False
) -> tuple[PeftModel, dict[str, torch.Tensor]]:
    """Wrap a stock classifier in a PeftModel.

    Returns:
        The PeftModel, and the initial factors A and B if `options.init` moves part of the base weights into them
        (PiSSA, OLoRA); else an empty mapping. `plain_factors` needs them to write an adapter for the original base.
        With `trained`, the base is left unchanged.

    Raises:
        ModelError: options that the model cannot take.
    """
    from peft import get_peft_model

    fresh = fresh_modules_of(model)
    config = lora_config(model, options, trained=trained)
    try:
        with warnings.catch_warnings():  # PEFT reads an attribute that Transformers has renamed
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            wrapped = get_peft_model(model, config)
    except ValueError as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(f"LoRA cannot be added: {reason}; correct target_modules or layers") from error
    wrapped.get_base_model().fresh_modules = fresh  # type: ignore[assignment]  # stubs know tensors and modules only
    _check_bias(wrapped, options)
    if options.init == "loftq" and not trained:
        _start_loftq(wrapped, base)
    initial: dict[str, torch.Tensor] = {}
    if changes_base(options) and not trained:
        initial = {name: value.detach().clone() for name, value in wrapped.named_parameters() if _SAME.search(name)}
    fuse_lora(wrapped)
    return wrapped.eval(), initial


def lora_config(model: PreTrainedModel, options: LoraOptions, *, trained: bool = False) -> LoraConfig:
    """PEFT's configuration for a stock classifier. SEQ_CLS makes PEFT train and save the head with the adapter."""
    from peft import LoraConfig, TaskType

    targets = options.target_modules
    if targets == "all-linear":
        targets = _as_named(model, linear_names(model))
    elif isinstance(targets, str) and options.layers is not None:
        raise ModelError("layers cannot be set when target_modules is a pattern; list the names, or use all-linear")
    elif isinstance(targets, str):
        targets = matching_names(targets, [name for name, _ in model.named_modules() if name])
        if not targets:
            raise ModelError(f"LoRA cannot be added: no module's path is as target_modules {options.target_modules!r} "
                             "says; list the modules' names, or use all-linear")  # fmt: skip
    elif trained:
        targets = _present(model, targets)
    if options.target_modules != "all-linear":
        _refuse_rewritten(model, targets)
    depth = model.config.get_text_config().num_hidden_layers
    if options.layers is not None and max(options.layers) >= depth:
        raise ModelError(f"layers names layer {max(options.layers)}, but the base has {depth}; use 0 to {depth - 1}")
    transposed = any(isinstance(module, Conv1D) for module in model.modules())
    if transposed and options.init == "olora":
        raise ModelError("init olora does not fit the transposed weights of this base; use pissa or default")
    if options.init == "loftq" and isinstance(options, QloraOptions) and model.config.model_type == "gpt2":
        raise ModelError("init loftq does not fit the transposed weights of this base; use default")
    if options.init == "loftq" and not isinstance(options, QloraOptions):
        raise ModelError("init loftq corrects the error of a 4-bit base, and this base is whole; use method qlora")
    special = {"default": True, "loftq": True}
    start = True if trained else special.get(options.init, options.init)
    return LoraConfig(
        task_type=TaskType.SEQ_CLS,
        r=options.r,
        lora_alpha=options.alpha,  # type: ignore[arg-type]  # PEFT computes alpha / r, so a fraction will do
        lora_dropout=options.dropout,
        target_modules=targets,
        layers_to_transform=options.layers,
        bias=options.bias,
        use_dora=options.dora,
        use_rslora=options.rslora,
        init_lora_weights=start,  # type: ignore[arg-type]  # one of PEFT's names: LoraOptions has checked it
        fan_in_fan_out=transposed,
        modules_to_save=[name for name in fresh_modules_of(model) if name not in HEAD_NAMES] or None,
    )


def _present(model: PreTrainedModel, targets: list[str]) -> list[str]:
    """Those of a bundle's target names that end the path of a module, each once: PEFT's time grows with their square.

    The other names adapt nothing; a warning counts them. Raises BundleError if none is left.
    """
    ends: set[str] = set()
    for path, _ in model.named_modules():
        parts = path.split(".")
        ends.update(".".join(parts[start:]) for start in range(len(parts)))
    found = sorted(set(targets) & ends)
    absent = set(targets) - ends
    if not found:
        raise BundleError(
            f"the bundle's target_modules has {len(absent)} names, such as {shortened(repr(min(absent)))}, and none "
            "of them is in the base; restore the files that training wrote"
        )
    if absent:
        _log.warning("%d of %d names in target_modules, such as %s, are of no module of the base and adapt nothing",
                     len(absent), len(set(targets)), shortened(repr(min(absent))))  # fmt: skip
    return found


def linear_names(model: PreTrainedModel) -> list[str]:
    """Names of the linear layers inside the transformer's layers, as paths below the layer's number.

    Whole paths, since a bare `dense` of BERT would also match its pooler. Experts that a mixture stores in one fused
    parameter are not linear layers and are not adapted; a warning names them.
    """
    backbone, names = backbone_of(model), set()
    for path, module in backbone.named_modules():
        inside = re.search(r"\.\d+\.(.+)$", "." + path)
        if inside and isinstance(module, nn.Linear | Conv1D) and not _is_router(module):
            names.add(inside.group(1))
    fused = sorted({re.sub(r"\.\d+\.", ".N.", name) for name, value in backbone.named_parameters() if value.dim() == 3
                    and "expert" in name})  # fmt: skip
    if fused:
        _log.warning("all-linear adapts no experts of this base, which lie in %s; they stay as they are", fused)
    if not names:
        raise ModelError(f"{type(backbone).__name__} has no linear layers to adapt; name target_modules")
    return sorted(names)


def _is_router(module: nn.Module) -> bool:
    """Whether a linear layer is a router, whose subclass returns its choice of experts, as in Phi-MoE."""
    return "Router" in type(module).__name__ and type(module).forward is not nn.Linear.forward


def _as_named(model: PreTrainedModel, names: list[str]) -> list[str]:
    """The names without those that PEFT takes for parts of fused experts (`rewritten`); a warning names these."""
    moved = set(rewritten(model, names))
    if moved:
        _log.warning(
            "all-linear leaves out %s, which PEFT would take for experts of this mixture and adapt elsewhere; they "
            "stay as they are",
            sorted(moved),
        )
    left = [name for name in names if name not in moved]
    if not left:
        raise ModelError(f"PEFT would adapt none of the layers {names} as named; use method adapter, head or full")
    return left


def _refuse_rewritten(model: PreTrainedModel, targets: str | Iterable[str]) -> None:
    moved = rewritten(model, [targets] if isinstance(targets, str) else targets)
    if moved:
        raise ModelError(
            f"target_modules has {moved[0]!r}, which PEFT takes for a part of this mixture's fused experts, and the "
            "adapter would neither merge nor load; name other modules, or use all-linear, which leaves it out"
        )


def rewritten(model: PreTrainedModel, targets: Iterable[str]) -> list[str]:
    """Targets (names, or one pattern) that PEFT replaces by other modules or parameters on this model.

    PEFT reads adapters of mixtures that older versions of Transformers held expert by expert: there `gate_proj` becomes
    the experts' `gate_up_proj`, also where a shared expert or a dense layer is meant (peft#3711).
    """
    from peft import LoraConfig, TaskType

    try:
        from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
        from transformers.conversion_mapping import get_model_conversion_mapping
    except ImportError:  # a version without such conversions
        return []
    conversions = get_model_conversion_mapping(model)
    found = []
    for target in targets:
        pattern = not re.fullmatch(r"[\w.]+", target)
        wanted = target if pattern else [target]
        config = LoraConfig(task_type=TaskType.SEQ_CLS, target_modules=wanted)
        before = config.target_modules
        try:
            convert_peft_config_for_transformers(config, model=model, conversions=conversions)
        except ValueError:  # a part of a fused parameter without the others
            found.append(target)
            continue
        if config.target_parameters or (not pattern and config.target_modules != before):
            found.append(target)
    return found


def _check_bias(wrapped: PeftModel, options: LoraOptions) -> None:
    if options.bias == "none":
        return
    if not any(p.requires_grad for n, p in wrapped.named_parameters() if n.endswith("bias") and "lora_" not in n):
        raise ModelError(f"bias is {options.bias!r}, but the adapted layers of this base have no bias; set it to none")


def _start_loftq(wrapped: PeftModel, base: str) -> None:
    """LoftQ (Li et al. 2023) with one step: s B A is the best approximation of rank r to W - dequantised(W).

    With U S V^T the singular value decomposition of (W - dequantised(W)) / s: A = sqrt(S_r) V_r^T, B = U_r sqrt(S_r).
    PEFT's own version for bitsandbytes runs on accelerators only.
    """
    import bitsandbytes.functional as functional

    stock = wrapped.get_base_model()
    entries = backbone_entries(base)
    layers = [(name, module) for name, module in stock.named_modules() if "default" in getattr(module, "lora_A", {})]
    for name, layer in tqdm(layers, desc="LoftQ", unit="layer", disable=len(layers) < 50):
        packed = layer.get_base_layer().weight
        weight = read_tensor(entries[name.removeprefix(f"{stock.base_model_prefix}.") + ".weight"])
        weight = weight.to(packed.device, torch.float32)
        coarse = functional.dequantize_4bit(packed.data, packed.quant_state).float()  # [O, I]
        u, s, v = torch.linalg.svd((weight - coarse) / layer.scaling["default"], full_matrices=False)
        rank = layer.r["default"]
        with torch.no_grad():
            layer.lora_A["default"].weight[: len(s)].copy_(s[:rank, None].sqrt() * v[:rank])
            layer.lora_B["default"].weight[:, : len(s)].copy_(u[:, :rank] * s[:rank].sqrt())
        if layer.use_dora["default"]:  # its magnitudes were computed with B = 0
            layer.lora_magnitude_vector["default"].update_layer(
                base_layer=layer.get_base_layer(),
                lora_A=layer.lora_A["default"].weight,
                lora_B=layer.lora_B["default"].weight,
                scaling=layer.scaling["default"],
            )


def plain_factors(state: dict[str, torch.Tensor], initial: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """LoRA tensors of rank 2r for the original base: s (B A - B0 A0) = s [B, -B0] [A; A0].

    After PiSSA or OLoRA the base holds W - s B0 A0, so this is the difference of the trained weights to W. [B, -B0] is
    [O, 2r], [A; A0] is [2r, I]. Their configuration has rank 2r and still the scale s = alpha / r (`plain_config`).
    """
    result = dict(state)
    for name, value in initial.items():
        key = name.replace(".default.weight", ".weight")
        first = ".lora_A." in name
        result[key] = torch.cat([state[key], value if first else -value], dim=0 if first else 1)
    return result


def plain_config(config: LoraConfig) -> LoraConfig:
    """Copy of a LoRA configuration for the tensors of `plain_factors`: double rank, same scale."""
    import copy

    plain = copy.deepcopy(config)
    plain.r = 2 * config.r
    plain.lora_alpha = config.lora_alpha * (2**0.5 if config.use_rslora else 2)  # type: ignore[assignment]  # as above
    return plain
