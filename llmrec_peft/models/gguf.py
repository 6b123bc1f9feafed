"""GGUF files: each is converted once to a safetensors checkpoint in the cache directory."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
from pathlib import Path

from llmrec_peft.errors import ModelError, joined_lines, output_errors
from llmrec_peft.files import scratch_directory, sweep
from llmrec_peft.models.cache_directory import cache_dir
from llmrec_peft.models.fingerprints import file_fingerprint

_log = logging.getLogger(__name__)
_CONVERSION = 1  # raise it when the converted copies in users' caches must be made again


def convert_once(gguf: Path, name: str) -> Path:
    """Directory of the safetensors copy of a GGUF file; it is made if the cache has none."""
    target = cache_dir() / "bases" / f"{name}-v{_CONVERSION}-{file_fingerprint(gguf)[:16]}"
    if target.is_dir():
        sweep(target.parent)
        return target
    if importlib.util.find_spec("gguf") is None:
        raise ModelError(f"base {gguf.name} needs the package gguf to be read; install it with: pip install gguf")
    _log.warning("converting %s to safetensors, once (about a minute)", gguf.name)
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
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
        model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        # The weights are plain float32 now, and save_pretrained refuses to write what says that it is quantised.
        with contextlib.suppress(AttributeError):
            del model.config.quantization_config
        model.hf_quantizer = None  # type: ignore[assignment]  # torch's stubs know tensors and modules only
        model.config._name_or_path = name
        model.save_pretrained(scratch)
        AutoTokenizer.from_pretrained(**source).save_pretrained(scratch)
        scratch.chmod(0o755)
    except (ValueError, KeyError, NotImplementedError) as error:
        raise ModelError(f"base {gguf} cannot be converted: {joined_lines(error)}; use a supported GGUF") from error
