"""Configuration files that the package ships: for recipes, for `accelerate launch` and for DeepSpeed."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from llmrec_peft.documents import read_yaml
from llmrec_peft.errors import ConfigError
from llmrec_peft.messages import shortened

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


def launch_config(name: str) -> str:
    """Path of a configuration of `accelerate launch`: a local file, or a shipped one by path or name (`zero3`).

    Raises:
        ConfigError: there is no such file.
    """
    for path in (name, f"{name}.yaml"):
        found = locate(path, "accelerate_configs")
        if os.path.isfile(found):
            return found
    shipped = ", ".join(path.stem for path in sorted(FOLDERS["accelerate_configs"].glob("*.yaml")))
    raise ConfigError(
        f"--launch {shortened(name)} is not a file; give an accelerate configuration, or one of {shipped}"
    )


def deepspeed_config(launch_file: str) -> str | None:
    """Path of the shipped DeepSpeed file that a launch configuration names; None to leave it as it is named.

    Accelerate looks for the file below the working directory, where it is only in the repository.
    """
    content = read_yaml(launch_file, error=ConfigError, what=f"--launch {shortened(launch_file)}")
    section = content.get("deepspeed_config") if isinstance(content, dict) else None
    named = section.get("deepspeed_config_file") if isinstance(section, dict) else None
    if not isinstance(named, str):
        return None
    found = locate(named, "ds_configs")
    return None if found == named else found


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
