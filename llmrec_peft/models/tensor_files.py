"""Safetensors files: headers checked against the bytes, rows read by name, and the fingerprint of a checkpoint.

The header is parsed here, not by the safetensors library, since a fingerprint reads raw bytes and a refusal should name
what is wrong with a file. Format: an 8-byte little-endian length, then JSON that gives each
tensor's dtype, shape and byte range, then the bytes.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from llmrec_peft.documents import parse_json
from llmrec_peft.errors import DataError
from llmrec_peft.messages import shortened

SAMPLED_ABOVE = 8 * 1024**3
"""Tensors of a checkpoint of more bytes than this are sampled for its fingerprint; smaller ones are hashed whole."""
_TENSOR_PIECES, _TENSOR_PIECE = 256, 4096  # 1 MiB of a tensor
_FILE_PIECES, _FILE_PIECE = 128, 256
_CHUNK = 16 * 1024**2

_HEADER_LIMIT = 16 * 1024 * 1024  # 100,000 tensors
_SIZE_LIMIT = 2**40  # of one dimension
_NAME_LIMIT = 1_000  # characters of a tensor's name
_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8,
}  # fmt: skip


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies: file, name and bytes in it, its dtype (as safetensors spells it) and its shape."""

    file: Path
    name: str
    begin: int
    end: int
    dtype: str
    shape: tuple[int, ...]


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Entries of one safetensors file. Raises ValueError saying what is wrong if it is not a whole, sound one."""
    size = path.stat().st_size
    header, start = _parse_header(path, size)
    header.pop("__metadata__", None)
    entries = {name: _entry(path, name, value, start) for name, value in header.items()}
    end = start
    for entry in sorted(entries.values(), key=lambda entry: (entry.begin, entry.end)):
        if entry.begin != end:
            raise ValueError(
                f"has tensor {shortened(entry.name)!r} at byte {entry.begin - start} where its header leaves off at "
                f"{end - start}"
            )
        end = entry.end
    if end != size:
        raise ValueError(f"holds {size} bytes where its header says {end}")
    return entries


def read_metadata(path: Path) -> dict[str, str]:
    """Metadata of one safetensors file. Raises ValueError if its header is unsound."""
    metadata = _parse_header(path, path.stat().st_size)[0].get("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("has metadata that do not map texts to texts")
    return metadata


def _parse_header(path: Path, size: int) -> tuple[dict[str, Any], int]:
    """A header's mapping, and the byte at which the tensors begin."""
    with path.open("rb") as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        if _HEADER_LIMIT < length <= size - 8:
            raise ValueError(f"has a safetensors header of {length:,} bytes, and at most {_HEADER_LIMIT:,} are read")
        if not 2 <= length <= size - 8:
            raise ValueError(f"is not a safetensors file or is cut short ({size} bytes)")
        content = file.read(length)
    try:
        header = parse_json(content, "has a safetensors header that", error=DataError, strict=True)
    except DataError as error:
        raise ValueError(str(error).removesuffix("; correct it there")) from None
    if not isinstance(header, dict):
        raise ValueError("has a safetensors header that is not a mapping")
    return header, 8 + length


def _entry(path: Path, name: str, value: Any, start: int) -> TensorEntry:
    if len(name) > _NAME_LIMIT or not name.isprintable():
        raise ValueError(
            f"has a tensor named {shortened(name)!r}, and a name has at most {_NAME_LIMIT:,} printable characters"
        )
    try:
        dtype, shape, (begin, end) = value["dtype"], tuple(value["shape"]), value["data_offsets"]
        whole = all(type(number) is int and 0 <= number <= _SIZE_LIMIT for number in (*shape, begin, end))
        sound = whole and len(shape) <= 16 and end - begin == math.prod(shape) * _BYTES[dtype]
    except (KeyError, TypeError, ValueError):
        sound = False
    if not sound:
        raise ValueError(f"describes tensor {shortened(name)!r} wrongly in its header")
    return TensorEntry(path, name, start + begin, start + end, dtype, shape)


def save_tensors(tensors: Mapping[str, torch.Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Write a safetensors file whose bytes depend on its contents alone."""
    from safetensors.torch import save_file

    save_file(dict(tensors), path, metadata=dict(metadata))
    order_metadata(path)


def order_metadata(path: Path) -> None:
    """Write a safetensors file's header again with its metadata sorted by key: the library's order is random.

    The library sorts the tensors itself, by dtype and name. The new header has the length of the old one, or less and
    spaces behind it, so no tensor moves.
    """
    with path.open("r+b") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
        metadata = dict(sorted(header.pop("__metadata__", {}).items()))
        text = json.dumps({"__metadata__": metadata, **header}, ensure_ascii=False, separators=(",", ":")).encode()
        if len(text) > length:
            raise ValueError(f"has a header of {length} bytes that takes {len(text)} when it is written again")
        file.seek(8)
        file.write(text.ljust(length))


def check_finite(tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise ValueError naming the first tensor that holds a NaN or an infinity; no copy is made."""
    for name, value in tensors.items():
        if value.is_floating_point() and value.numel():
            low, high = torch.aminmax(value.detach())  # a NaN anywhere makes both NaN
            if not (math.isfinite(low) and math.isfinite(high)):
                raise ValueError(f"holds a number in tensor {shortened(name)!r} that is not finite")


def read_headers(files: Iterable[Path]) -> dict[str, TensorEntry]:
    """Entries of all files of one checkpoint. Raises ValueError, naming the file, if one is unsound."""
    entries: dict[str, TensorEntry] = {}
    for path in files:
        try:
            entries |= read_header(path)
        except ValueError as error:
            raise ValueError(f"{path.name} {error}") from None
    return entries


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


def fingerprint(entries: dict[str, TensorEntry]) -> str:
    """SHA-256 over names, dtypes, shapes and all bytes, in the order of the names; the same for any sharding.

    Above SAMPLED_ABOVE bytes in all, 1 MiB of each tensor is read in evenly spaced pieces, first and last bytes among
    them, and the fingerprint starts with "sampled-". A fine-tune moves nearly every weight and so shows; a change of a
    few rows may not.
    """
    digest = hashlib.sha256()
    maps: dict[Path, mmap.mmap] = {}
    total = sum(entry.end - entry.begin for entry in entries.values())
    sampled = total > SAMPLED_ABOVE
    try:
        with tqdm(total=total, desc="Reading the base", unit="B", unit_scale=True, disable=total < 4 * 1024**3) as bar:
            for name in sorted(entries):
                entry = entries[name]
                digest.update(json.dumps([name, entry.dtype, list(entry.shape)]).encode())
                if entry.end > entry.begin and entry.file not in maps:
                    with entry.file.open("rb") as file:
                        maps[entry.file] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                pieces = _TENSOR_PIECES if sampled else 0
                for begin, end in _pieces(entry.begin, entry.end, pieces, _TENSOR_PIECE):
                    for start in range(begin, end, _CHUNK):
                        digest.update(maps[entry.file][start : min(start + _CHUNK, end)])
                bar.update(entry.end - entry.begin)
    finally:
        for opened in maps.values():
            opened.close()
    return ("sampled-" if sampled else "") + digest.hexdigest()


def file_fingerprint(path: Path) -> str:
    """SHA-256 over a file's size and evenly spaced pieces of it: names a converted copy in the cache."""
    size = os.path.getsize(path)
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for begin, end in _pieces(0, size, _FILE_PIECES, _FILE_PIECE):
            file.seek(begin)
            digest.update(file.read(end - begin))
    return digest.hexdigest()


def _pieces(begin: int, end: int, count: int, size: int) -> list[tuple[int, int]]:
    """`count` evenly spaced ranges of `size` bytes; the whole range if it is hardly longer, or if `count` is 0."""
    if count == 0 or end - begin < 2 * count * size:
        return [(begin, end)]
    room = end - begin - size
    starts = [begin + room * piece // (count - 1) for piece in range(count)]
    return [(start, start + size) for start in starts]
