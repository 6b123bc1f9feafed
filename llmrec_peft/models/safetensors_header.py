"""Headers of safetensors files, checked against the bytes. Nothing here needs torch.

The header is parsed here, not by the safetensors library, because a fingerprint reads raw bytes and an error should say
what is wrong with a file. Format: an 8-byte little-endian length, then JSON that gives each tensor's dtype, shape and
byte range, then the bytes.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmrec_peft.documents import parse_json
from llmrec_peft.errors import DataError
from llmrec_peft.messages import shortened

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


def read_headers(files: Iterable[Path]) -> dict[str, TensorEntry]:
    """Entries of all files of one checkpoint. Raises ValueError, naming the file, if one is unsound."""
    entries: dict[str, TensorEntry] = {}
    for path in files:
        try:
            entries |= read_header(path)
        except ValueError as error:
            raise ValueError(f"{path.name} {error}") from None
    return entries
