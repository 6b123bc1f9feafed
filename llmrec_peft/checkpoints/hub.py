"""Pushing a bundle or a merged model to the Hub: only its own files, in one commit."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llmrec_peft.checkpoints.adapter_checks import check_bundle
from llmrec_peft.checkpoints.card_examples import REPOSITORY
from llmrec_peft.checkpoints.checksum import sha256, with_checksum
from llmrec_peft.checkpoints.directory_checks import is_weights, read_json
from llmrec_peft.checkpoints.manifest import is_merged, write_manifest
from llmrec_peft.checkpoints.manifest_schema import (
    CONFIG,
    MANIFEST,
    MERGED,
    MODEL_CONFIG,
    MODEL_INDEX,
    WEIGHTS,
)
from llmrec_peft.checkpoints.merged_checks import check_merged
from llmrec_peft.checkpoints.model_card import CARD, bundle_card, merged_card
from llmrec_peft.errors import BundleError, ConfigError
from llmrec_peft.files import write_json
from llmrec_peft.models.base import BASES, hub_id

_READ_FIRST = (CONFIG, MODEL_CONFIG, MODEL_INDEX)
"""Files by which other libraries tell an adapter from a whole model."""


def push_to_hub(
    directory: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    endpoint: str | None = None,
    base: str | None = None,
) -> str:
    """Check a bundle or a merged model, and put its own files into a Hub repository by one commit; returns its URL.

    A repository that does not exist is made. What an earlier push left there and this one does not replace is removed.

    Args:
        directory: a bundle or a merged model; other files in it stay where they are.
        repo_id: `owner/name`, or the name alone for the token's owner.
        private: whether a new repository is private; the owner's setting if None.
        token: the Hub's token; the one of `hf auth login` or $HF_TOKEN if None.
        revision: branch to commit to, made if missing; main if None.
        endpoint: URL of another Hub; $HF_ENDPOINT or huggingface.co if None.
        base: Hub id of the same base, to be recorded in place of the local path that training was given.

    Raises:
        BundleError: a damaged directory, or a repository that holds another model.
        ConfigError: a base that is a local path, a repository's name that cannot be, no token or one that may not
            write, no connection.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    directory = Path(directory)
    with tempfile.TemporaryDirectory() as scratch:
        files = _files(directory, Path(scratch), base)
        api = HfApi(endpoint=endpoint, token=token, library_name="llmrec_peft")
        with _hub_errors(repo_id):
            url = api.create_repo(repo_id, private=private, exist_ok=True)
            repo_id = url.repo_id
            if revision is not None:
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            present = api.list_repo_files(repo_id, revision=revision)
        old = _replaced(present, files, repo_id)
        card = files[CARD].read_text(encoding="utf-8").replace(REPOSITORY, repo_id).encode()
        operations: list[CommitOperationAdd | CommitOperationDelete] = []
        operations += [CommitOperationDelete(path_in_repo=name) for name in old]
        operations += [
            CommitOperationAdd(path_in_repo=name, path_or_fileobj=card if name == CARD else str(path))
            for name, path in files.items()
        ]
        message = commit_message or f"Upload {'merged model' if is_merged(directory) else 'bundle'}"
        with _hub_errors(repo_id):
            # One commit, where upload_folder may make several: no reader finds weights beside another's behavior.json.
            api.create_commit(repo_id, operations, commit_message=message, revision=revision)
    return str(url)


# -- what is pushed ----------------------------------------------------------------------------------


def _files(directory: Path, scratch: Path, base: str | None) -> dict[str, Path]:
    """Files of a sound directory by name: as they lie there, or in `scratch` where the base's name changes them."""
    if is_merged(directory):
        manifest, shards, tokenizer = check_merged(directory)
        names = [path.name for path in shards] + [MODEL_INDEX] * (directory / MODEL_INDEX).is_file()
        names += [MODEL_CONFIG, *_tokenizer_files(directory, tokenizer), MANIFEST]
        write_card = merged_card
    else:
        manifest, _ = check_bundle(directory)
        names = [CONFIG, WEIGHTS, MANIFEST]
        write_card = bundle_card
    name, card = str(manifest["base"].get("name")), directory / CARD
    if hub_id(name) is None and base is None:
        raise ConfigError(
            f"{directory} names its base by the path {name!r}, which says nothing to others; pass base='owner/name', "
            "the Hub id of the same weights"
        )
    edited = _text(card) not in (None, write_card(manifest))
    if base is not None:
        manifest = {**manifest, "base": {**manifest["base"], "name": base, "source": base}}
        if is_merged(directory):
            write_manifest(scratch, manifest, MERGED)
        else:
            _rename_base(directory, scratch, manifest, base)
    if edited:
        shutil.copyfile(card, scratch / CARD)
    else:
        (scratch / CARD).write_text(write_card(manifest), encoding="utf-8")
    return {name: scratch / name if (scratch / name).is_file() else directory / name for name in (*names, CARD)}


def _text(card: Path) -> str | None:
    """A card's text. Raises BundleError if it is not UTF-8."""
    try:
        return card.read_text(encoding="utf-8") if card.is_file() else None
    except UnicodeDecodeError:
        raise BundleError(f"{card} is not UTF-8 text; correct it, or remove it and it is written again") from None


def _rename_base(directory: Path, scratch: Path, manifest: Mapping[str, Any], base: str) -> None:
    """Write the two files of a bundle that name its base, with another name."""
    config = read_json(directory / CONFIG)
    hub_base = BASES[base].hub_id if base in BASES else base
    write_json({**config, "base_model_name_or_path": hub_base}, scratch / CONFIG)
    options = {**manifest["model_options"], "base": base, "gguf_file": None}
    digests = {**manifest["files"], CONFIG: sha256(scratch / CONFIG)}
    content = {**manifest, "model_options": options, "files": digests}
    write_json(content if manifest["format_version"] == 1 else with_checksum(content), scratch / MANIFEST)


def _tokenizer_files(directory: Path, tokenizer: Any) -> list[str]:
    """Names of those of a tokenizer's files that are there."""
    names = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"]
    names += ["chat_template.jinja", *tokenizer.vocab_files_names.values()]
    return [name for name in dict.fromkeys(names) if (directory / name).is_file() and not is_weights(name)]


def _replaced(present: list[str], files: Collection[str], repo_id: str) -> list[str]:
    """Files that an earlier push left in a repository, and that would change what these are read as.

    Raises BundleError if there are weights and no behavior.json: the repository is somebody else's model.
    """
    models = [name for name in present if "/" not in name and (is_weights(name) or name in _READ_FIRST)]
    if models and MANIFEST not in present:
        raise BundleError(
            f"repository {repo_id} holds {models[0]!r} and no {MANIFEST}, so it is another model's; name another one"
        )
    return [name for name in models if name not in files]


# -- errors ------------------------------------------------------------------------------------------


@contextmanager
def _hub_errors(repo_id: str) -> Iterator[None]:
    """Turn what the Hub's client raises into one line."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled

    login = "log in with `hf auth login`, set HF_TOKEN or pass token"
    try:
        yield
    except HFValidationError as error:
        raise ConfigError(f"repo_id {repo_id!r} cannot be: {_line(error)}; write owner/name") from None
    except OfflineModeIsEnabled:
        raise ConfigError(f"{repo_id} cannot be reached while HF_HUB_OFFLINE is set; unset it to push") from None
    except LocalTokenNotFoundError:
        raise ConfigError(f"{repo_id} needs a token, and there is none on this machine; {login}") from None
    except HfHubHTTPError as error:
        status = error.response.status_code
        detail = _line(error.server_message or "")
        hint = {
            401: login,
            403: "use a token that may write there",
            404: "check the owner's name, and that the token may see it",
        }
        raise ConfigError(
            f"the Hub refused the push to {repo_id} with status {status}{f' ({detail})' if detail else ''}; "
            f"{hint.get(status, 'try again later')}"
        ) from error
    except ValueError as error:  # such as a card's YAML that the Hub cannot read
        raise ConfigError(f"{repo_id} was not pushed: {_line(error)}; correct it and push again") from error
    except Exception as error:  # the client's transport raises many kinds
        cause = error.__cause__ or error
        raise ConfigError(
            f"{repo_id} was not pushed: {type(cause).__name__}: {_line(cause)}; check the connection and try again"
        ) from error


def _line(error: object) -> str:
    return " ".join(str(error).split())[:200]
