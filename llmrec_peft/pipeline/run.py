"""A run's directory: what it holds, how it starts, and how it goes on."""

import json
import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from accelerate import PartialState
from transformers import set_seed

from ..config import TrainRecipeConfig, config_to_yaml
from ..errors import ConfigError
from ..training.trainer import last_checkpoint

# What a training recipe leaves in its output directory, and nothing else of it is ever deleted.
RESULTS = ("metrics.json", "predictions.parquet", "report.md", "reliability.png", "learning_curve.png")
DIRECTORIES = ("bundle", "checkpoints", "logs")


@dataclass(frozen=True)
class Run:
    """A started run."""

    config: TrainRecipeConfig
    directory: Path
    checkpoint: str | None = None

    def path(self, name: str) -> Path:
        """Path of one of the run's outputs."""
        return self.directory / name


def prepare_run(config: TrainRecipeConfig) -> Run:
    """Check that a run can start or go on, and seed everything; nothing is written yet.

    Raises:
        ConfigError: the batch does not divide over the ranks, or a run to resume is not there or was started with other
            settings.
    """
    ranks = PartialState().num_processes
    if config.train.batch_size % ranks:
        raise ConfigError(
            f"train.batch_size {config.train.batch_size} must be a multiple of the {ranks} processes; "
            f"use {-(-config.train.batch_size // ranks) * ranks}"
        )
    directory = Path(config.output_dir)
    checkpoint = _checkpoint_of(directory, config) if config.train.resume else None
    # The callback of TensorBoard reads its place from here alone.
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(directory / "logs")
    set_seed(config.train.seed)
    return Run(config, directory, checkpoint)


def begin_run(run: Run, fingerprint: str) -> None:
    """Make the output directory ready and write down the settings and what the run trains on.

    A new run takes the place of an old one in the same directory; one that resumes keeps its checkpoints.

    Raises:
        ConfigError: the directory cannot be written, or a resumed run would train on other streams than before.
    """
    state, path = PartialState(), run.path("checkpoints") / "streams.json"
    if run.checkpoint is not None:
        old = json.loads(path.read_text("utf-8"))["streams"] if path.is_file() else "nothing"
        if old != fingerprint:
            raise ConfigError(
                f"train.resume: the checkpoints in {path.parent} were trained on streams {old[:12]}, and the data now "
                f"gives {fingerprint[:12]}; use the same data, or start a new run"
            )
    if state.is_main_process:
        try:
            run.directory.mkdir(parents=True, exist_ok=True)
            if not run.config.train.resume:
                _clear(run.directory)
            write_text(run.path("config.yaml"), config_to_yaml(_settings(run.config)))
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, json.dumps({"streams": fingerprint}) + "\n")
        except OSError as error:
            raise ConfigError(
                f"output_dir {run.directory} cannot be written ({error.strerror}); choose another"
            ) from None
    state.wait_for_everyone()


def _settings(config: TrainRecipeConfig) -> TrainRecipeConfig:
    """The configuration that a run is known by: resuming it does not change it."""
    return replace(config, train=replace(config.train, resume=False))


def _checkpoint_of(directory: Path, config: TrainRecipeConfig) -> str | None:
    path = directory / "config.yaml"
    if not path.is_file():
        raise ConfigError(f"train.resume: {directory} holds no run (no config.yaml); start one without train.resume")
    old, new = (_flat(yaml.safe_load(text)) for text in (path.read_text("utf-8"), config_to_yaml(_settings(config))))
    for key in sorted(old.keys() | new.keys()):
        if key not in ("output_dir", "data.path") and old.get(key) != new.get(key):
            raise ConfigError(
                f"train.resume: {directory} was started with {key} {old.get(key)!r}, and now it is {new.get(key)!r}; "
                f"use the same settings, or start a new run"
            )
    return last_checkpoint(directory / "checkpoints")


def _flat(content: dict, prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in content.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return flat


def _clear(directory: Path) -> None:
    for name in RESULTS:
        (directory / name).unlink(missing_ok=True)
    for name in DIRECTORIES:
        shutil.rmtree(directory / name, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def write_json(path: Path, content: Any) -> None:
    """Write JSON whole or not at all; numbers that are undefined become null."""
    write_text(path, json.dumps(_plain(content), indent=2, allow_nan=False) + "\n")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and value != value:
        return None
    return value
