"""Reads and writes the manifest of a trained directory, with all of its entries checked. Nothing here needs torch.

One function reads every kind of `manifest_schema`. The checks run in this order: the kind, the format version, the
types of all entries, what the entries say of each other, and the manifest's own checksum.
"""

from __future__ import annotations

import importlib.metadata
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmrec_peft.checkpoints.checksum import KEY, check_checksum, with_checksum
from llmrec_peft.checkpoints.directory_checks import read_json
from llmrec_peft.checkpoints.manifest_schema import ADAPTER, EXPORT, MANIFEST, MERGED, ManifestKind
from llmrec_peft.checkpoints.value_schema import check_schema
from llmrec_peft.errors import BundleError, ConfigError, LLMRecError
from llmrec_peft.files import plain, write_json
from llmrec_peft.messages import shortened
from llmrec_peft.models.tuning_options import METHODS, MethodOptions, ModelOptions, from_mapping, method_options
from llmrec_peft.probabilities import read_calibration

_log = logging.getLogger(__name__)

ALL_LINEAR = "all-linear"
MAX_NAMES = 20_000
"""Names in `target_modules`, at most."""
_warned: set[str] = set()  # manifests of format 1 that a warning has named


def read_manifest(directory: str | Path, kind: ManifestKind | None = None) -> dict[str, Any]:
    """Read the manifest of a trained directory and check all of its entries; no weight and no base is read.

    Args:
        kind: what the directory must be; None for a bundle, a merged model or a student, whichever it is.

    Raises:
        BundleError: there is no manifest, it is of another kind or format version, an entry is missing or has a wrong
            type, entries contradict each other, or the file was edited.
    """
    directory = Path(directory)
    if kind is None:
        if not (directory / MANIFEST).is_file():
            raise BundleError(f"bundle {directory} has no {MANIFEST}; name {ADAPTER.made_by}, or a merged model")
        kind = MERGED if is_merged(directory) else ADAPTER
    path = directory / kind.file
    if not path.is_file():
        raise BundleError(f"{directory} has no {kind.file}; name {kind.made_by}")
    manifest = read_json(path, kind.restore)
    _check_kind(path, manifest, kind)
    _check_version(path, manifest, kind)
    check_schema(manifest, kind.fields, path, kind.restore)
    if kind in (ADAPTER, MERGED):
        _check_model(path, manifest, kind)
    elif kind is EXPORT:
        _check_export(path, manifest)
    _check_own_checksum(path, manifest, kind)
    return manifest


def write_manifest(directory: Path, content: Mapping[str, Any], kind: ManifestKind) -> dict[str, Any]:
    """Write a manifest with its format version, kind and checksum; returns it as it will be read."""
    header: dict[str, Any] = {"format_version": kind.version}
    if kind.kind is not None:
        header["kind"] = kind.kind
    manifest = with_checksum(plain({**header, **content}))
    write_json(manifest, directory / kind.file)
    return manifest


def is_merged(directory: str | Path) -> bool:
    """Whether a directory's behavior.json says that it is a merged model, sound or not."""
    path = Path(directory) / MANIFEST
    try:
        return path.is_file() and read_json(path).get("kind") == MERGED.kind
    except BundleError:
        return False


def refuse_merged(directory: str | Path) -> None:
    """Raise BundleError if a directory is a merged model; a bundle is needed."""
    if is_merged(directory):
        raise BundleError(
            f"{directory} is a merged model, not a bundle: its adapter is in its weights already; load it with "
            "load_trained, score it with recipes/evaluate.py, train it further as model.base, or name the bundle that "
            "it was merged from"
        )


def installed(*packages: str) -> dict[str, str]:
    """Versions of those of the packages that are installed."""
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:  # this package too, if it runs from a source tree
            continue
    return found


# -- header ------------------------------------------------------------------------------------------


def _check_kind(path: Path, manifest: Mapping[str, Any], kind: ManifestKind) -> None:
    found = manifest.get("kind")
    if kind is ADAPTER:
        refuse_merged(path.parent)
    elif kind is MERGED and found != kind.kind:
        raise BundleError(f"{path.parent} is not a merged model (kind {shortened(repr(found))}); load it as a bundle")
    elif kind is EXPORT and found != kind.kind:
        raise BundleError(f"{path} is not of an exported student; name {kind.made_by}")


def _check_version(path: Path, manifest: Mapping[str, Any], kind: ManifestKind) -> None:
    version = manifest.get("format_version")
    if type(version) is not int or not 1 <= version <= kind.version:
        known = "1" if kind.version == 1 else f"1 to {kind.version}"
        raise BundleError(
            f"{path} has format_version {shortened(repr(version))}, and this version reads {known}; "
            f"use the package version that wrote it, or {kind.again}"
        )


def _check_own_checksum(path: Path, manifest: Mapping[str, Any], kind: ManifestKind) -> None:
    if kind.checksum_from is None:
        return
    if manifest["format_version"] >= kind.checksum_from:
        check_checksum(manifest, path, kind.restore)
    elif KEY in manifest:
        raise BundleError(
            f"{path} has format_version {manifest['format_version']}, which has no checksum, and has one, so it was "
            f"edited; {kind.restore}"
        )
    elif str(path) not in _warned:
        _warned.add(str(path))
        _log.warning(
            "%s %s is of format %d, which has no checksum: an edit of its metrics or counts would not show; load it "
            "and save it again to add one", kind.name, path.parent, manifest["format_version"],
        )  # fmt: skip


# -- content -----------------------------------------------------------------------------------------


def _check_model(path: Path, manifest: Mapping[str, Any], kind: ManifestKind) -> None:
    """Check what the manifest of a bundle or of a merged model says beyond the types of its entries."""
    if kind is ADAPTER and manifest["method"] not in METHODS:
        raise BundleError(
            f"{path} names method {shortened(repr(manifest['method']))}, not one of {', '.join(METHODS)}; restore it"
        )
    check_domain(manifest["domain"], str(path))
    check_calibration(manifest["calibration"], len(manifest["domain"]["outcomes"]), str(path))
    _check_labels(path, manifest, kind.restore)
    if kind is ADAPTER:
        read_options(path.parent, manifest)


def _check_labels(path: Path, manifest: Mapping[str, Any], advice: str) -> None:
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


def _check_export(path: Path, manifest: Mapping[str, Any]) -> None:
    """Raise BundleError where the labels of an export are not those of its domain, or lack their tokens."""
    outcomes, labels, tokens = manifest["domain"]["outcomes"], manifest["labels"], manifest["tokens"]["outcomes"]
    if labels != list(outcomes) or len(labels) < 2 or len(tokens) != len(labels):
        raise BundleError(
            f"{path} has the labels {labels} with {len(tokens)} words, but its domain has {outcomes}; {EXPORT.restore}"
        )


def check_domain(domain: Mapping[str, Any], where: str) -> None:
    """Raise BundleError unless a domain's mapping makes a `Domain` of two labels or more."""
    from llmrec_peft.data.domain import Domain  # needs Arrow

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
        raise BundleError(f"{error} (the domain of a bundle; {ADAPTER.restore})") from None


def check_calibration(calibration: Mapping[str, Any] | None, labels: int, where: str) -> None:
    """Raise BundleError unless it is None, or a temperature and a bias for each label (or null) within their bounds."""
    read_calibration(calibration, labels, where)


# -- options -----------------------------------------------------------------------------------------


def is_pattern(targets: Any) -> bool:
    """Whether `target_modules` is a regular expression: a text other than all-linear."""
    return isinstance(targets, str) and targets != ALL_LINEAR


def read_options(
    directory: Path, manifest: Mapping[str, Any], stored: Mapping[str, Any] | None = None
) -> tuple[MethodOptions, ModelOptions]:
    """Options objects of a bundle's manifest; `stored` replaces its model options.

    Raises BundleError for values of another type or out of bounds, and for a pattern in target_modules.
    """
    path, method = directory / MANIFEST, manifest["method"]
    stored = manifest["model_options"] if stored is None else stored
    try:
        tuning = method_options(method, manifest["method_options"])
        options = from_mapping(ModelOptions, stored, "model")
    except (ConfigError, TypeError) as error:
        # The advice of a ConfigError, after its last semicolon, is about a configuration.
        raise BundleError(f"{path}: {str(error).rpartition('; ')[0] or error}; {ADAPTER.restore}") from None
    _check_targets(path, getattr(tuning, "target_modules", ALL_LINEAR))
    return tuning, options


def _check_targets(path: Path, targets: Any) -> None:
    """Refuse `target_modules` that is not all-linear or a list of names: a stranger's pattern may never end."""
    if is_pattern(targets):
        raise BundleError(
            f"{path} has target_modules {shortened(repr(targets))}, and a bundle's must be {ALL_LINEAR} or a list of "
            "module names: patterns are not read from a file; train again, which writes the names"
        )
    if isinstance(targets, list):
        names = all(isinstance(name, str) and re.fullmatch(r"[\w.\-]{1,500}", name) for name in targets)
        if not names or len(targets) > MAX_NAMES:
            raise BundleError(
                f"{path} has target_modules that are not up to {MAX_NAMES:,} names of modules; {ADAPTER.restore}"
            )
