"""behavior.json: its parts and their types, and the digests that tie them to the weights.

The weights' file holds, in its metadata, the labels and words and the SHA-256 of the domain and of the calibration;
behavior.json holds the SHA-256 of the weights' file. So neither file can be edited without the other telling.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmrec_peft.data.files import plain
from llmrec_peft.errors import BundleError
from llmrec_peft.models.files import read_json
from llmrec_peft.models.options import METHODS
from llmrec_peft.probabilities import read_calibration

FORMAT_VERSION = 1
CONFIG, WEIGHTS, MANIFEST = "adapter_config.json", "adapter_model.safetensors", "behavior.json"
FILES = (CONFIG, WEIGHTS, MANIFEST)
MERGED = "merged"
"""What `kind` says in the behavior.json of a merged model; that of a bundle has no `kind`."""
_TYPES: dict[str, type | tuple[type, ...]] = {
    "method": str,
    "method_options": dict,
    "model_options": dict,
    "base": dict,
    "tokenizer": dict,
    "domain": dict,
    "labels": list,
    "words": list,
    "stream": dict,
    "calibration": (dict, type(None)),
    "counts": dict,
    "metrics": dict,
    "versions": dict,
    "files": dict,
}


def read_manifest(directory: str | Path) -> dict[str, Any]:
    """behavior.json of a bundle, with the types of its parts checked; no base is read.

    Raises BundleError for another format version, and for a part that is missing or not of its type.
    """
    refuse_merged(directory)
    path = Path(directory) / MANIFEST
    manifest = read_json(path)
    version = manifest.get("format_version")
    if version != FORMAT_VERSION:
        raise BundleError(
            f"{path} has format_version {version!r}, and this version reads {FORMAT_VERSION}; "
            "use the package version that wrote it, or train again"
        )
    for key, kind in _TYPES.items():
        if key not in manifest or not isinstance(manifest[key], kind):
            raise BundleError(f"{path} has no valid entry {key!r}; restore the file that training wrote")
    if manifest["method"] not in METHODS:
        raise BundleError(f"{path} names method {manifest['method']!r}, not one of {', '.join(METHODS)}; restore it")
    check_domain(manifest["domain"], str(path))
    check_calibration(manifest["calibration"], len(manifest["domain"]["outcomes"]), str(path))
    return manifest


def is_merged(directory: str | Path) -> bool:
    """Whether a directory's behavior.json says that it is a merged model, sound or not."""
    path = Path(directory) / MANIFEST
    try:
        return path.is_file() and read_json(path).get("kind") == MERGED
    except BundleError:
        return False


def refuse_merged(directory: str | Path) -> None:
    """Raise BundleError for a merged model where a bundle belongs."""
    if is_merged(directory):
        raise BundleError(
            f"{directory} is a merged model and no bundle: its adapter is in its weights already; load it with "
            "load_merged, score it with recipes/evaluate.py, train it further as model.base, or name the bundle that "
            "it was merged from"
        )


def installed(*packages: str) -> dict[str, str]:
    """Versions of those of the packages that are installed."""
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:  # the package itself too, run from a source tree
            continue
    return found


def check_domain(domain: Mapping[str, Any], where: str) -> None:
    """Raise BundleError unless `outcomes` maps two labels or more to texts and `stream` is a mapping or left out."""
    outcomes, stream = domain.get("outcomes"), domain.get("stream")
    if not (
        isinstance(outcomes, Mapping)
        and len(outcomes) >= 2
        and all(isinstance(part, str) for pair in outcomes.items() for part in pair)
    ):
        raise BundleError(
            f"{where}: the domain's outcomes must map two labels or more to words, not {outcomes!r}; "
            "restore the file that training wrote"
        )
    if not isinstance(stream, Mapping | None):
        raise BundleError(f"{where}: the domain's stream must be a mapping, not {stream!r}; restore the file")


def check_calibration(calibration: Mapping[str, Any] | None, labels: int, where: str) -> None:
    """Raise BundleError unless it is None, or a temperature and a bias for each label (or null) within their bounds."""
    read_calibration(calibration, labels, where)


def weights_metadata(
    labels: list[str], domain: Mapping[str, Any], calibration: Mapping[str, Any] | None
) -> dict[str, str]:
    """Metadata of the weights' file: the labels and words as JSON, digests of domain and calibration."""
    return {
        "format": "pt",
        "labels": json.dumps(labels),
        "words": json.dumps([str(word) for word in domain["outcomes"].values()]),
        "domain_sha256": digest(domain),
        "calibration_sha256": digest(calibration),
    }


def check_metadata(path: Path, manifest: Mapping[str, Any], metadata: Mapping[str, str]) -> None:
    """Raise BundleError where the labels, words, domain or calibration are not those that the weights were saved with.

    `path` is that of behavior.json.
    """
    expected = weights_metadata(manifest["labels"], manifest["domain"], manifest["calibration"])
    for key in ("labels", "words"):
        if metadata.get(key) != expected[key]:
            raise BundleError(
                f"{path} has the {key} {manifest[key]}, the weights {metadata.get(key)}; "
                "restore the file that training wrote"
            )
    for part in ("domain", "calibration"):
        found, said = expected[f"{part}_sha256"], metadata.get(f"{part}_sha256")
        if found != said:
            raise BundleError(
                f"{path} has a {part} with the SHA-256 {found[:16]}..., but the weights were saved with "
                f"{str(said)[:16]}...; restore the file that training wrote"
            )


def digest(value: Mapping[str, Any] | None) -> str:
    """SHA-256 of a mapping's canonical JSON: keys sorted, so the order of labels is for `labels` to keep."""
    text = json.dumps(plain(value), sort_keys=True, ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
