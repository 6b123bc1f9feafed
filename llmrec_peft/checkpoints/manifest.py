"""behavior.json: its parts and their types, and the digests that tie them to the weights.

The weights' file holds, in its metadata, the format version, the labels and words, the method, the number format and
the SHA-256 of the domain, of the calibration and of the method's options; behavior.json holds the SHA-256 of the
weights' file, and seals itself. So no file can be edited without another telling.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmrec_peft.checkpoints.sealing import check_schema, check_seal, content_digest
from llmrec_peft.data.domain import Domain
from llmrec_peft.errors import BundleError, ConfigError, LLMRecError
from llmrec_peft.files import plain
from llmrec_peft.messages import shortened
from llmrec_peft.models.model_files import read_json
from llmrec_peft.models.tuning_options import METHODS, MethodOptions, ModelOptions, from_mapping, method_options
from llmrec_peft.probabilities import read_calibration

_log = logging.getLogger(__name__)

FORMAT_VERSION = 2
"""Of a bundle's behavior.json. Format 1 was not sealed; it is read with a warning."""
CONFIG, WEIGHTS, MANIFEST = "adapter_config.json", "adapter_model.safetensors", "behavior.json"
FILES = (CONFIG, WEIGHTS, MANIFEST)
MERGED = "merged"
"""What `kind` says in the behavior.json of a merged model; that of a bundle has no `kind`."""
_RESTORE = "restore the file that training wrote"
_SCHEMA: dict[str, Any] = {
    "method": str,
    "method_options": dict,
    "model_options": {"base": str, "dtype": str},
    "base": {"name": str, "source?": (str, None), "fingerprint": str},
    "tokenizer": {"fingerprint": str},
    "domain": dict,
    "labels": [str],
    "words": [str],
    "stream": dict,
    "calibration": (dict, None),
    "counts": {"split?": (dict, None)},
    "metrics": dict,
    "versions": {str: str},
    "files": {CONFIG: str, WEIGHTS: str},
    "seal?": str,
}
ALL_LINEAR = "all-linear"
MAX_NAMES = 20_000
"""Names in `target_modules`, at most."""
_warned: set[str] = set()  # directories of format 1 that were told of


def read_manifest(directory: str | Path) -> dict[str, Any]:
    """behavior.json of a bundle, with the types of its parts and its seal checked; no base is read.

    Raises BundleError for another format version, for a part that is missing or not of its type, and for an edit.
    """
    refuse_merged(directory)
    path = Path(directory) / MANIFEST
    manifest = read_json(path)
    check_version(path, manifest)
    check_schema(manifest, _SCHEMA, path, _RESTORE)
    if manifest["method"] not in METHODS:
        raise BundleError(
            f"{path} names method {shortened(repr(manifest['method']))}, not one of {', '.join(METHODS)}; restore it"
        )
    check_domain(manifest["domain"], str(path))
    check_calibration(manifest["calibration"], len(manifest["domain"]["outcomes"]), str(path))
    check_labels(path, manifest, _RESTORE)
    read_options(Path(directory), manifest)
    if manifest["format_version"] > 1:
        check_seal(manifest, path, _RESTORE)
    elif "seal" in manifest:
        raise BundleError(f"{path} has format_version 1, which has no seal, and a seal, so it was edited; {_RESTORE}")
    elif str(path) not in _warned:
        _warned.add(str(path))
        _log.warning(
            "bundle %s is of format 1, which is not sealed: an edit of its metrics or counts would not show; load it "
            "and save it again to seal it", directory,
        )  # fmt: skip
    return manifest


def check_labels(path: Path, manifest: Mapping[str, Any], advice: str) -> None:
    """Raise BundleError where the labels, words or stream settings are not those of the domain."""
    labels, words, domain = manifest["labels"], manifest["words"], manifest["domain"]
    if labels != list(domain["outcomes"]) or words != list(domain["outcomes"].values()):
        raise BundleError(
            f"{path} has the labels {shortened(labels)} with the words {shortened(words)}, but its domain has "
            f"{shortened(domain['outcomes'])}; {advice}"
        )
    if manifest["stream"] != (domain.get("stream") or {}):
        raise BundleError(
            f"{path} has the stream settings {shortened(manifest['stream'])}, but its domain has "
            f"{shortened(domain.get('stream'))}; {advice}"
        )


def is_pattern(targets: Any) -> bool:
    """Whether `target_modules` is a regular expression: a text other than all-linear."""
    return isinstance(targets, str) and targets != ALL_LINEAR


def read_options(
    directory: Path, manifest: Mapping[str, Any], stored: Mapping[str, Any] | None = None
) -> tuple[MethodOptions, ModelOptions]:
    """Options objects of a manifest; `stored` replaces its model options.

    Raises BundleError for values of another type or out of bounds, and for a pattern in target_modules.
    """
    path, method = directory / MANIFEST, manifest["method"]
    stored = manifest["model_options"] if stored is None else stored
    try:
        tuning = method_options(method, manifest["method_options"])
        options = from_mapping(ModelOptions, stored, "model")
    except (ConfigError, TypeError) as error:
        # The advice of a ConfigError, behind its last semicolon, is for a configuration.
        raise BundleError(f"{path}: {str(error).rpartition('; ')[0] or error}; {_RESTORE}") from None
    _check_targets(path, getattr(tuning, "target_modules", ALL_LINEAR))
    return tuning, options


def _check_targets(path: Path, targets: Any) -> None:
    """Refuse `target_modules` that is not all-linear or a list of names: a pattern of a stranger's may never end."""
    if is_pattern(targets):
        raise BundleError(
            f"{path} has target_modules {shortened(repr(targets))}, and a bundle's must be {ALL_LINEAR} or a list of "
            "module names: patterns are not read from a file; train again, which writes the names"
        )
    if isinstance(targets, list):
        names = all(isinstance(name, str) and re.fullmatch(r"[\w.\-]{1,500}", name) for name in targets)
        if not names or len(targets) > MAX_NAMES:
            raise BundleError(
                f"{path} has target_modules that are not up to {MAX_NAMES:,} names of modules; {_RESTORE}"
            )


def check_version(path: Path, manifest: Mapping[str, Any]) -> None:
    """Raise BundleError for a format version that is not read."""
    version = manifest.get("format_version")
    if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
        raise BundleError(
            f"{path} has format_version {shortened(repr(version))}, and this version reads 1 to {FORMAT_VERSION}; "
            "use the package version that wrote it, or train again"
        )


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
    """Raise BundleError unless a domain's mapping makes a `Domain`, of two labels or more."""
    outcomes, stream = domain.get("outcomes"), domain.get("stream")
    if not (
        isinstance(outcomes, Mapping)
        and len(outcomes) >= 2
        and all(isinstance(part, str) for pair in outcomes.items() for part in pair)
    ):
        raise BundleError(
            f"{where}: the domain's outcomes must map two labels or more to words, not {shortened(repr(outcomes))}; "
            "restore the file that training wrote"
        )
    if not isinstance(stream, Mapping | None):
        raise BundleError(
            f"{where}: the domain's stream must be a mapping, not {shortened(repr(stream))}; restore the file"
        )
    try:
        Domain.of_manifest(dict(domain), source=where)
    except LLMRecError as error:
        raise BundleError(f"{error} (the domain of a bundle; {_RESTORE})") from None


def check_calibration(calibration: Mapping[str, Any] | None, labels: int, where: str) -> None:
    """Raise BundleError unless it is None, or a temperature and a bias for each label (or null) within their bounds."""
    read_calibration(calibration, labels, where)


def weights_metadata(manifest: Mapping[str, Any]) -> dict[str, str]:
    """Metadata of the weights' file: what ties it to behavior.json. Texts, JSON of lists, and digests of mappings.

    manifest: entries of behavior.json, of which the labels, the domain, the calibration, the method, its options and
    the model options are read.
    """
    return {
        "format": "pt",
        "format_version": str(FORMAT_VERSION),
        "labels": json.dumps(manifest["labels"]),
        "words": json.dumps([str(word) for word in manifest["domain"]["outcomes"].values()]),
        "domain_sha256": digest(manifest["domain"]),
        "calibration_sha256": digest(manifest["calibration"]),
        "method": manifest["method"],
        "dtype": manifest["model_options"]["dtype"],
        "method_options_sha256": digest(manifest["method_options"]),
    }


def check_metadata(path: Path, manifest: Mapping[str, Any], metadata: Mapping[str, str]) -> None:
    """Raise BundleError where behavior.json is not what the weights were saved with.

    `path` is that of behavior.json.
    """
    version = str(manifest["format_version"])
    if metadata.get("format_version", "1") != version:
        raise BundleError(
            f"{path} has format_version {version}, the weights {shortened(metadata.get('format_version', '1'))}; "
            f"{_RESTORE}"
        )
    expected = weights_metadata(manifest)
    told = ("labels", "words") if version == "1" else ("labels", "words", "method", "dtype")
    for key in told:
        if metadata.get(key) != expected[key]:
            value = manifest["model_options"][key] if key == "dtype" else manifest[key]
            raise BundleError(
                f"{path} has the {key} {shortened(value)}, the weights {shortened(metadata.get(key))}; {_RESTORE}"
            )
    for part in ("domain", "calibration") if version == "1" else ("domain", "calibration", "method_options"):
        found, said = expected[f"{part}_sha256"], metadata.get(f"{part}_sha256")
        if found != said:
            raise BundleError(
                f"{path} has a {part} with the SHA-256 {found[:16]}..., but the weights were saved with "
                f"{str(said)[:16]}...; {_RESTORE}"
            )


def digest(value: Mapping[str, Any] | None) -> str:
    """SHA-256 of a mapping's canonical JSON, its values made those of JSON first."""
    return content_digest(plain(value))
