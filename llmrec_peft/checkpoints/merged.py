"""Merged models: a stock sequence classifier in a directory, and the behavior.json that says where it comes from.

Transformers alone loads such a directory with `AutoModelForSequenceClassification`. Its `behavior.json` differs from a
bundle's: `kind` is "merged", it has the fingerprint of all weights, the head's among them, and it seals itself, so that
an edit of the domain or of the calibration shows.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from llmrec_peft.checkpoints.bundle import Bundle, load_bundle
from llmrec_peft.checkpoints.manifest import (
    MANIFEST,
    MERGED,
    check_calibration,
    check_domain,
    check_labels,
    is_merged,
    read_manifest,
)
from llmrec_peft.checkpoints.merged_checks import check_config, check_formats, check_tokenizer, no_more_than
from llmrec_peft.checkpoints.sealing import Real, check_schema, check_seal, sealed, sha256
from llmrec_peft.errors import BundleError, ModelError, input_errors, output_errors
from llmrec_peft.files import move_into_place, plain, scratch_directory, write_json
from llmrec_peft.messages import shortened
from llmrec_peft.models.base import load_model, load_tokenizer
from llmrec_peft.models.classifier import BehaviorClassifier
from llmrec_peft.models.fingerprints import fits, short, tokenizer_fingerprint
from llmrec_peft.models.model_files import check_links, read_json, stray_weights
from llmrec_peft.models.prompt_tokens import save_tokenizer, tokens_around
from llmrec_peft.models.tensor_files import check_finite, fingerprint, read_headers
from llmrec_peft.models.tuning_options import ModelOptions

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
FORMAT_VERSION = 1
_RATIO = Real(-1e300, 1e300)
_SCHEMA: dict[str, Any] = {
    "merged_from": [{"name?": (str, None), "method": str, "weights_sha256": str, "weight": _RATIO}],
    "combination": (dict, None),
    "base": {"name": (str, None)},
    "dtype": ("float32", "bfloat16", "float16"),
    "weights": {"fingerprint": str},
    "tokenizer": {"fingerprint": str},
    "domain": dict,
    "labels": [str],
    "words": [str],
    "stream": dict,
    "calibration": (dict, None),
    "counts": {"split?": ({"boundaries?": ([_RATIO], None)}, None)},
    "metrics": {"test?": (dict, None)},
    "measured": {str: (str, _RATIO, None)},
    "versions": {str: str},
    "files": {CONFIG: str},
    "attn?": ("sdpa", "eager"),
    "student?": {"options": dict, "loss": dict, "teacher": (dict, None)},
    "seal": str,
}
_RESTORE = "restore the file that merging wrote, or merge again"


# -- reading ---------------------------------------------------------------------------------------


def load_answering(
    directory: str | Path,
    *,
    base: str | None = None,
    dtype: str | None = None,
    attn: str | None = None,
    trust_remote_code: bool = False,
) -> Bundle:
    """A bundle or a merged model, whichever lies there, ready to answer; arguments as `load_bundle` takes them.

    Raises BundleError if it is damaged, does not match its base, or if `base` is given for a merged model.
    """
    options = {"dtype": dtype, "attn": attn, "trust_remote_code": trust_remote_code}
    if not is_merged(directory):
        return load_bundle(directory, base=base, **options)
    if base is not None:
        raise BundleError(
            f"{directory} is a merged model, which holds its base's weights already; leave base {base!r} out"
        )
    return load_merged(directory, **options)


def read_answering(directory: str | Path) -> dict[str, Any]:
    """behavior.json of a bundle or of a merged model. Raises BundleError where there is none, or an unsound one."""
    if not (Path(directory) / MANIFEST).is_file():
        raise BundleError(
            f"bundle {directory} has no {MANIFEST}; name the directory `bundle` that a training run left, or a merged "
            "model"
        )
    return read_merged(directory) if is_merged(directory) else read_manifest(directory)


def read_merged(directory: str | Path) -> dict[str, Any]:
    """behavior.json of a merged model, its parts' types and its seal checked; no weight is read.

    Raises BundleError for what is no merged model, another format version, and anything missing or edited.
    """
    path = Path(directory) / MANIFEST
    if not path.is_file():
        raise BundleError(f"{directory} has no {MANIFEST}; name the directory that merging wrote")
    manifest = read_json(path)
    if manifest.get("kind") != MERGED:
        raise BundleError(f"{directory} is no merged model (kind {manifest.get('kind')!r}); load it as a bundle")
    if type(manifest.get("format_version")) is not int or manifest["format_version"] != FORMAT_VERSION:
        raise BundleError(
            f"{path} has format_version {manifest.get('format_version')!r}, and this version reads {FORMAT_VERSION}; "
            "use the package version that wrote it, or merge again"
        )
    check_schema(manifest, _SCHEMA, path, _RESTORE)
    check_domain(manifest["domain"], str(path))
    check_calibration(manifest["calibration"], len(manifest["labels"]), str(path))
    check_labels(path, manifest, _RESTORE)
    check_seal(manifest, path, _RESTORE)
    return manifest


def check_merged(directory: str | Path, trust_remote_code: bool = False) -> tuple[dict[str, Any], list[Path], Any]:
    """Check a merged model's files against each other; returns its manifest, its weights' files and its tokenizer.

    No model is made. Raises BundleError as `load_merged` does.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise BundleError(f"{directory} is not a directory; name the one that merging wrote")
    with _reading(directory):
        check_links(directory, "merged model")
        manifest = read_merged(directory)
        shards = _check_files(directory, manifest)
        check_config(directory / CONFIG)
        check_tokenizer(directory)
        return manifest, shards, _tokenizer(directory, manifest, trust_remote_code)


def _reading(directory: Path) -> AbstractContextManager[None]:
    return input_errors(BundleError, f"merged model {directory}", _RESTORE)


def load_merged(
    directory: str | Path,
    *,
    dtype: str | None = None,
    attn: str | None = None,
    trust_remote_code: bool = False,
) -> Bundle:
    """Read a merged model, checking all that its behavior.json says; its classifier's method is "merged".

    Args:
        dtype: number format of the weights; the one that they were saved in if None. The head is float32.
        attn: attention kernel; the bundle's own if None.
        trust_remote_code: allow code that came with the base to run.

    Raises BundleError naming both values of any mismatch.
    """
    directory = Path(directory)
    manifest, shards, tokenizer = check_merged(directory, trust_remote_code)
    options = ModelOptions(
        base=str(directory), dtype=dtype or manifest["dtype"], attn=attn or manifest.get("attn", "sdpa"),
        trust_remote_code=trust_remote_code,
    )  # fmt: skip
    labels = manifest["labels"]
    try:
        with _reading(directory), no_more_than(read_headers(shards)):
            model = load_model(
                str(directory), len(labels), id2label=dict(enumerate(labels)), dtype=options.dtype,
                attn_implementation=options.attn, trust_remote_code=trust_remote_code,
                pad_token_id=tokenizer.pad_token_id,
            )  # fmt: skip
        check_finite(dict(model.named_parameters()))
    except ModelError as error:
        raise BundleError(f"merged model {directory} cannot be loaded: {error}") from error
    except ValueError as error:
        if isinstance(error, BundleError):
            raise
        raise BundleError(f"merged model {directory} {error}; {_RESTORE}") from None
    if model.unread:
        raise BundleError(
            f"merged model {directory} holds the tensor {shortened(model.unread[0])!r}, which its model has not "
            f"({len(model.unread)} in all); {_RESTORE}"
        )
    if not model.trained_head:
        raise BundleError(f"merged model {directory} has no head for the labels {labels}; {_RESTORE}")
    classifier = BehaviorClassifier(model.requires_grad_(False), MERGED, labels)
    classifier.tokenizer, classifier.base, classifier.model_options = tokenizer, str(directory), options
    return Bundle(classifier.eval(), tokenizer, manifest["domain"], manifest, manifest["calibration"])


def _check_files(directory: Path, manifest: Mapping[str, Any]) -> list[Path]:
    """Compare the files with the manifest, the weights by their fingerprint; returns the files of the weights."""
    shards = _shards(directory)
    strange = stray_weights(directory, [path.name for path in shards])
    if strange:
        raise BundleError(f"merged model {directory} holds {strange[0]!r} beside its own weights; remove it")
    for name, said in manifest["files"].items():
        if Path(name).name != name:
            raise BundleError(f"{directory / MANIFEST} names the file {name!r} outside of its directory; {_RESTORE}")
        found = sha256(directory / name) if (directory / name).is_file() else "none"
        if found != said:
            raise BundleError(
                f"{directory / name} has the SHA-256 {found[:16]}..., but {MANIFEST} says {str(said)[:16]}...; "
                f"{_RESTORE}"
            )
    try:
        entries = read_headers(shards)
        check_formats(entries)
        found = fingerprint(entries)
    except ValueError as error:
        raise BundleError(f"merged model {directory}: {error}; copy it again or merge again") from None
    said = manifest["weights"].get("fingerprint")
    if found != said:
        raise BundleError(
            f"the weights of {directory} have the fingerprint {short(found)}, but {MANIFEST} says {short(said)}; "
            "copy them again or merge again"
        )
    return shards


def _shards(directory: Path) -> list[Path]:
    """Safetensors files of a merged model, by its index if it has one."""
    if not (directory / INDEX).is_file():
        shards = [directory / WEIGHTS]
    else:
        names = read_json(directory / INDEX).get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(name, str) and "/" not in name for name in names.values()):
            raise BundleError(f"{directory / INDEX} has no map from tensors to files beside it; {_RESTORE}")
        shards = [directory / name for name in sorted(set(names.values()))]
    for path in shards:
        if not path.is_file():
            raise BundleError(
                f"merged model {directory} has no {path.name}; copy the whole directory that merging wrote"
            )
    return shards


def _tokenizer(directory: Path, manifest: Mapping[str, Any], trust_remote_code: bool) -> Any:
    try:
        tokenizer = load_tokenizer(str(directory), trust_remote_code=trust_remote_code)
    except ModelError as error:
        raise BundleError(f"merged model {directory} has no tokenizer that loads: {error}") from error
    found, said = tokenizer_fingerprint(tokenizer), manifest["tokenizer"].get("fingerprint")
    if found != said and fits(tokenizer, said):
        raise BundleError(
            f"the tokenizer of merged model {directory} puts an end token behind every text, which stock classes read "
            "in place of the marker, so other programs give other answers; merge again with this version"
        )
    if found != said:
        raise BundleError(
            f"merged model {directory} was trained with a tokenizer of fingerprint {short(said)}, but its files have "
            f"{short(found)}; {_RESTORE}"
        )
    return tokenizer


# -- writing ---------------------------------------------------------------------------------------


def check_output(directory: str | Path, *sources: str | Path) -> Path:
    """Where a merged model may be written: a new or empty directory, or one that holds a merged model.

    Raises BundleError for anything else, and for a directory that the merge itself reads from.
    """
    directory = without_links(directory)
    for source in sources:
        if directory.exists() and Path(source).exists() and directory.samefile(source):
            raise BundleError(f"{directory} is what is merged; choose another directory for the result")
    if directory.exists() and not directory.is_dir():
        raise BundleError(f"{directory} is a file; choose another directory for the merged model")
    if directory.exists() and any(directory.iterdir()) and not is_merged(directory):
        raise BundleError(
            f"{directory} exists and holds no merged model, so it is not replaced; choose another directory"
        )
    return directory


def without_links(directory: str | Path) -> Path:
    """A directory to write, by the place that it stands for if it is a link; BundleError for a link to itself."""
    directory = Path(directory)
    if not directory.is_symlink():
        return directory
    place = Path(os.path.realpath(directory))
    if place.is_symlink():
        raise BundleError(f"{directory} is a link that leads round in a circle; choose another directory")
    return place


@contextmanager
def scratch_beside(directory: Path) -> Iterator[Path]:
    """A directory beside `directory` that is gone when the block ends; what a killed process left goes too.

    Raises BundleError where the disk is full or cannot be written.
    """
    with contextlib.ExitStack() as stack:
        with writing(directory):
            scratch = stack.enter_context(scratch_directory(directory))
            scratch.chmod(0o755)
        yield scratch


def writing(directory: Path) -> AbstractContextManager[None]:
    """Turn what writing raises, by this and other libraries, into one line."""
    return output_errors(BundleError, f"merged model {directory}", "make room or choose another directory")


def loading_notes(classifier: BehaviorClassifier, tokenizer: Any) -> dict[str, Any]:
    """Entries of a manifest that say how the model is loaded again: its tokenizer and its attention kernel."""
    options = classifier.model_options
    return {
        "tokenizer": {
            "fingerprint": tokenizer_fingerprint(tokenizer),
            **tokens_around(tokenizer, encoder=classifier.encoder),
        },
        "attn": "eager" if options is not None and options.attn == "eager" else "sdpa",
    }


def save_merged(
    scratch: Path, model: nn.Module, tokenizer: Any, *, max_shard_size: str | int, trust_remote_code: bool = False
) -> None:
    """Write a stock classifier and its tokenizer into a scratch directory, in weights files of `max_shard_size`."""
    model.save_pretrained(scratch, max_shard_size=max_shard_size)
    save_tokenizer(tokenizer, scratch, trust_remote_code=trust_remote_code)
    for path in _shards(scratch):
        path.chmod(0o644)


def describe(scratch: Path, content: Mapping[str, Any]) -> dict[str, Any]:
    """Write behavior.json of what `save_merged` wrote; returns it.

    content: the entries but those that follow from the files.
    """
    written = {
        "weights": {"fingerprint": fingerprint(read_headers(_shards(scratch)))},
        "files": {CONFIG: sha256(scratch / CONFIG)},
    }
    return write_manifest(scratch, {"format_version": FORMAT_VERSION, "kind": MERGED, **content, **written})


def write_manifest(scratch: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Seal a manifest and write it; returns it as it will be read."""
    manifest = sealed(plain(manifest))
    write_json(manifest, scratch / MANIFEST)
    return manifest


def publish(scratch: Path, directory: Path) -> None:
    """Force a finished scratch directory to disk and move it into place; it is there whole, or not at all."""
    for path in (*scratch.iterdir(), scratch):
        _sync(path)
    move_into_place(scratch, directory)
    _sync(directory.parent)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def check_room(directory: Path, needed: int) -> None:
    """Raise BundleError where the disk has not `needed` bytes free."""
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise BundleError(
            f"merged model of {needed / 1e9:.2f} GB does not fit on the disk of {directory}, which has "
            f"{free / 1e9:.2f} GB free; make room or choose another directory"
        )
