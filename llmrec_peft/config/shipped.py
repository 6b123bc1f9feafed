"""Configuration files that the package ships: for recipes, for `accelerate launch` and for DeepSpeed."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from llmrec_peft.errors import ConfigError

_PACKAGED = Path(__file__).parents[1] / "recipes"

FOLDERS = {
    "recipes/configs": _PACKAGED / "configs",
    "accelerate_configs": _PACKAGED / "accelerate_configs",
    "ds_configs": _PACKAGED / "ds_configs",
}
"""From a folder of the repository to its place in the package, which is a link to it in the repository."""


def shipped_files() -> list[str]:
    """Names of all shipped files as they stand in the repository, such as `recipes/configs/shop/lora.yaml`."""
    return [f"{folder}/{path.relative_to(place).as_posix()}" for folder, place in FOLDERS.items()
            for path in sorted(place.glob("**/*.*"))]  # fmt: skip


def locate(path: str, folder: str) -> str:
    """`path`, or the shipped file of this name if no such local file exists.

    Args:
        path: a local path, a path inside `folder` (`shop/lora.yaml`), or with the folder's name in front.
        folder: a key of `FOLDERS`.
    """
    if os.path.exists(path):
        return path
    name = path.removeprefix(f"{folder}/")
    if os.path.isabs(name) or ".." in Path(name).parts:
        return path
    place = os.path.join(FOLDERS[folder], name)
    return place if os.path.isfile(place) else path


def copy_shipped(directory: str) -> list[str]:
    """Copy all shipped files below `directory`, in the folders of the repository; returns their paths.

    Raises:
        ConfigError: one of the files exists already.
    """
    names = shipped_files()
    for name in names:
        if os.path.lexists(os.path.join(directory, name)):
            raise ConfigError(f"{directory} already holds {name}; remove it, or choose another directory")
    for name in names:
        folder = next(folder for folder in FOLDERS if name.startswith(f"{folder}/"))
        target = Path(directory, name)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(FOLDERS[folder] / name.removeprefix(f"{folder}/"), target)
    return [str(Path(directory, name)) for name in names]
