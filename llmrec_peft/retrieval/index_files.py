"""Files of a retrieval index: a manifest (`index.json`) and the arrays of its models (`index.safetensors`).

The manifest holds the models' settings, the fusion that was fitted with them, and the SHA-256 of the arrays' file. The
metadata of the arrays' file holds the SHA-256 of the manifest, so neither can be exchanged alone. Version 0.1.0 wrote
the same under the names `evidence.json` and `evidence.safetensors`, which are still read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from llmrec_peft.checkpoints.checksum import content_digest, sha256
from llmrec_peft.checkpoints.directory_checks import check_links, stray_weights
from llmrec_peft.checkpoints.manifest import read_manifest
from llmrec_peft.checkpoints.manifest_schema import FORMER_INDEX, INDEX, INDEX_ARRAYS, INDEX_MANIFEST
from llmrec_peft.errors import BundleError, ConfigError, input_errors, output_errors
from llmrec_peft.files import move_into_place, plain, scratch_directory, write_json
from llmrec_peft.retrieval.collaborative import MODELS
from llmrec_peft.retrieval.collaborative_model import CollaborativeModel
from llmrec_peft.retrieval.fusion import Fusion

DIRECTORY = "retrieval"
"""Name of the index's directory inside a bundle's."""
MANIFEST, ARRAYS = INDEX_MANIFEST, INDEX_ARRAYS
FORMER_NAMES = FORMER_INDEX.file, *FORMER_INDEX.fields["files"]
"""Names of both files in version 0.1.0."""


@dataclass(frozen=True)
class IndexContent:
    """Collaborative models of one log, and the item table that they are in.

    Attributes:
        models: the models by name.
        item_ids: large_string [items], the ids of the item table whose row numbers the models use.
        item_rows: int64 [items], labelled training rows of each item.
        note: counts and times of the rows that the models were fitted on.
    """

    models: dict[str, CollaborativeModel]
    item_ids: pa.Array
    item_rows: np.ndarray
    note: dict[str, Any]


def is_index(directory: str | Path) -> bool:
    """Whether a directory holds the files of a retrieval index, by their present or former names."""
    return any(all((Path(directory) / name).is_file() for name in pair) for pair in ((MANIFEST, ARRAYS), FORMER_NAMES))


def manifest_path(directory: str | Path) -> Path:
    """Path of an index's manifest: the present name, or the former one where only that exists."""
    path, former = Path(directory) / MANIFEST, Path(directory) / FORMER_NAMES[0]
    return former if former.is_file() and not path.exists() else path


def write_index(directory: Path, content: IndexContent, fusion: Fusion | None, adapter: str | None) -> Path:
    """Write a directory, whole or not at all; one that holds an index already is replaced.

    Raises BundleError if the directory holds something else.
    """
    from safetensors.numpy import save_file

    if directory.exists() and not is_index(directory) and any(directory.iterdir()):
        raise BundleError(f"{directory} exists and holds no retrieval index, so it is not replaced; choose another")
    writing = output_errors(BundleError, f"retrieval {directory}", "make room or choose another directory")
    with writing, scratch_directory(directory) as scratch:
        manifest = {
            "format_version": INDEX.version,
            "models": {name: model.settings() for name, model in content.models.items()},
            "fitted": content.note,
            "fusion": None if fusion is None else fusion.to_dict(),
            "adapter_sha256": adapter,
        }
        save_file(_tensors(content), scratch / ARRAYS, metadata={"manifest_sha256": _digest(manifest)})
        write_json(manifest | {"files": {ARRAYS: sha256(scratch / ARRAYS)}}, scratch / MANIFEST)
        scratch.chmod(0o755)
        move_into_place(scratch, directory)
    return directory


def read_index(directory: Path, adapter: str | None) -> tuple[IndexContent, Fusion | None]:
    """Read what `write_index` wrote, with all checks.

    adapter: SHA-256 of the adapter's weights in use; a fusion that was fitted with others is refused.
    """
    with input_errors(BundleError, f"retrieval index {directory}", "restore both files, or fit again"):
        return _read(directory, adapter)


def _read(directory: Path, adapter: str | None) -> tuple[IndexContent, Fusion | None]:
    from safetensors.numpy import load_file

    path = manifest_path(directory)
    arrays = directory / (ARRAYS if path.name == MANIFEST else FORMER_NAMES[1])
    for file in (path, arrays):
        if not file.is_file():
            raise BundleError(f"{directory} has no file {file.name}; fit and save the retrieval index again")
    check_links(directory, "retrieval index")
    stray = stray_weights(directory, (arrays.name,))
    if stray:
        raise BundleError(f"{directory} holds {', '.join(stray)}, which RetrievalIndex.save does not write; remove it")
    manifest = read_manifest(directory, INDEX if path.name == MANIFEST else FORMER_INDEX)
    _check_digests(path, arrays, manifest)
    fusion = None if manifest["fusion"] is None else Fusion.from_dict(manifest["fusion"])
    fitted_with = manifest["adapter_sha256"]
    if fusion is not None and adapter is not None and fitted_with is not None and fitted_with != adapter:
        raise BundleError(
            f"the fusion in {directory} was fitted with adapter weights {fitted_with[:16]}..., and these are "
            f"{adapter[:16]}...; fit it again, or restore the bundle"
        )
    return _content(path, load_file(arrays), manifest), fusion


def _check_digests(path: Path, arrays: Path, manifest: Mapping[str, Any]) -> None:
    """Raise BundleError unless both files are those that were written together."""
    # Imported here: that module imports torch, which retrieval does not need.
    from llmrec_peft.models.safetensors_header import read_header, read_metadata

    if manifest["files"][arrays.name] != sha256(arrays):
        raise BundleError(f"{arrays} is not the file that {path.name} was written with; restore both, or fit again")
    try:
        read_header(arrays)
        metadata = read_metadata(arrays)
    except ValueError as error:
        raise BundleError(f"{arrays} {error}; restore it or fit again") from None
    if metadata.get("manifest_sha256") != _digest({k: v for k, v in manifest.items() if k != "files"}):
        raise BundleError(f"{path} was changed after it was written; restore it or fit again")


def _digest(manifest: Mapping[str, Any]) -> str:
    return content_digest(plain(manifest))


def _tensors(content: IndexContent) -> dict[str, np.ndarray]:
    """All arrays of an index by their names in the file; strings as UTF-8 bytes and the end of each."""
    encoded = [value.encode("utf-8", "surrogatepass") for value in content.item_ids.to_pylist()]
    found: dict[str, np.ndarray] = {
        "item_ids": np.frombuffer(b"".join(encoded), np.uint8),
        "item_id_ends": np.cumsum([len(value) for value in encoded], dtype=np.int64),
        "item_rows": content.item_rows,
    }
    for name, model in content.models.items():
        found |= {f"{name}.{key}": np.ascontiguousarray(value) for key, value in model.arrays.items()}
    return found


def _content(path: Path, tensors: Mapping[str, np.ndarray], manifest: Mapping[str, Any]) -> IndexContent:
    """Models and item table of the arrays. Raises BundleError where they do not fit each other."""
    models = {name: _model(path, name, settings) for name, settings in manifest["models"].items()}
    known = {f"{name}.{key}" for name, model in models.items() for key in model.ARRAYS}
    if set(tensors) != known | {"item_ids", "item_id_ends", "item_rows"}:
        raise BundleError(f"{path}: the arrays are not those of its models; restore the files or fit again")
    kinds = {"item_ids": "u1", "item_id_ends": "i8", "item_rows": "i8"}
    wrong = [name for name, kind in kinds.items() if tensors[name].ndim != 1 or tensors[name].dtype != kind]
    ends = tensors["item_id_ends"]
    valid = not wrong and (np.diff(ends, prepend=0) >= 0).all() and ends[-1:].sum() == len(tensors["item_ids"])
    if not valid:
        raise BundleError(f"{path}: the arrays of its item ids are not valid; restore the files or fit again")
    if any(value.dtype.kind not in "fiu" for value in tensors.values()):
        raise BundleError(f"{path}: an array holds no numbers; restore the files or fit again")
    size = len(tensors["item_rows"])
    for name, model in models.items():
        model.set_arrays({key: tensors[f"{name}.{key}"] for key in model.ARRAYS})
        if not model.has_valid_arrays(size):
            raise BundleError(f"{path}: the arrays of model {name!r} do not fit {size} items; fit again")
    ids = _item_ids(tensors["item_ids"], ends)
    if len(ids) != size or tensors["item_rows"].min(initial=0) < 0:
        raise BundleError(f"{path}: {len(ids)} item ids for {size} items; restore the files or fit again")
    return IndexContent(models, ids, tensors["item_rows"], dict(manifest["fitted"]))


def _model(path: Path, name: str, settings: Mapping[str, Any]) -> CollaborativeModel:
    try:
        return MODELS[name](**settings)
    except (KeyError, TypeError, ConfigError):
        raise BundleError(f"{path} has model {name!r} with settings that this version does not know") from None


def _item_ids(text: np.ndarray, ends: np.ndarray) -> pa.Array:
    data, starts = text.tobytes(), np.concatenate([[0], ends[:-1]])
    return pa.array(
        [data[a:b].decode("utf-8", "surrogatepass") for a, b in zip(starts.tolist(), ends.tolist(), strict=True)],
        pa.large_string(),
    )
