"""Tensors in safetensors files: writing them, reading them by name or by row, checking that they are finite."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch

from llmrec_peft.messages import shortened
from llmrec_peft.models.safetensors_header import TensorEntry, order_metadata


def save_tensors(tensors: Mapping[str, torch.Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Write a safetensors file whose bytes depend on its contents alone."""
    from safetensors.torch import save_file

    save_file(dict(tensors), path, metadata=dict(metadata))
    order_metadata(path)


def check_finite(tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise ValueError naming the first tensor that holds a NaN or an infinity; no copy is made."""
    for name, value in tensors.items():
        if value.is_floating_point() and value.numel():
            low, high = torch.aminmax(value.detach())  # a NaN anywhere makes both NaN
            if not (math.isfinite(low) and math.isfinite(high)):
                raise ValueError(f"holds a number in tensor {shortened(name)!r} that is not finite")


def read_tensor(entry: TensorEntry) -> torch.Tensor:
    """One tensor of a file."""
    from safetensors import safe_open

    with safe_open(str(entry.file), framework="pt") as file:
        return file.get_tensor(entry.name)


def read_rows(entry: TensorEntry, rows: list[int]) -> torch.Tensor:
    """Rows of a matrix in a file, float32 [len(rows), width], without reading the rest of it."""
    from safetensors import safe_open

    with safe_open(str(entry.file), framework="pt") as file:
        matrix = file.get_slice(entry.name)
        return torch.cat([matrix[row : row + 1] for row in rows]).float()
