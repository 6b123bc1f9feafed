"""A run's directory: what it holds, how a run starts in it, and how a run is resumed."""

import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers.integrations.integration_utils import get_reporting_integration_callbacks

from llmrec_peft.config.renamed_keys import with_new_names
from llmrec_peft.config.schema import DistillConfig, RunConfig, config_to_yaml
from llmrec_peft.documents import read_mapping, read_yaml
from llmrec_peft.errors import ConfigError, DataError
from llmrec_peft.files import sweep, write_json, write_text, writing
from llmrec_peft.runs.launch_checks import check_shared
from llmrec_peft.runs.output_paths import check_output_directory
from llmrec_peft.runs.settings import flat_settings, flatten
from llmrec_peft.training.distributed import partial_state, raise_on_all_ranks
from llmrec_peft.training.resume import check_checkpoint, last_checkpoint, unfinished_checkpoints

# Files that a training recipe writes into its output directory. It deletes nothing else there.
RESULTS = ("metrics.json", "predictions.parquet", "report.md", "reliability.png", "learning_curve.png")
DIRECTORIES = ("bundle", "student", "checkpoints", "logs")
SETTINGS = "config.yaml"

# Prefixes of the settings that decide the trained weights: a resumed run must have the same values.
WEIGHTS = (
    "domain.", "method.", "train.", "model.dtype", "model.attn", "model.head_init", "model.head_scale", "student.",
    "loss.", "teacher_outputs.targets", "teacher_outputs.only",
)  # fmt: skip
ELSEWHERE = ("train.report_to", "train.logging_steps", "train.resume")
# These settings decide which checkpoint is the best, where one is selected.
SELECTION = ("evaluation.valid_targets", "evaluation.batch_tokens")
NO_SELECTION = ("train.select_metric", "train.save_steps")


@dataclass(frozen=True)
class Run:
    """A run; `checkpoint` is the checkpoint that it resumes, None for a new run."""

    config: RunConfig
    directory: Path
    checkpoint: str | None = None

    def path(self, name: str) -> Path:
        """Path of one of the run's outputs."""
        return self.directory / name


def prepare_run(config: RunConfig) -> Run:
    """Check what can be checked before the log is read; write nothing yet.

    Raises:
        ConfigError: the batch does not divide over the ranks, a tracker does not exist, the output directory cannot be
            written or holds somebody else's files, or a run to resume is not there or was started with other settings.
    """
    state = partial_state()
    ranks = state.num_processes
    if config.train.batch_size % ranks:
        raise ConfigError(
            f"train.batch_size {config.train.batch_size} must be a multiple of the {ranks} processes; "
            f"use {-(-config.train.batch_size // ranks) * ranks}"
        )
    try:
        get_reporting_integration_callbacks(config.train.report_to)
    except ValueError as error:
        raise ConfigError(f"train.report_to {config.train.report_to}: {' '.join(str(error).split())}") from None
    directory = Path(config.output_dir)
    check_output_directory(directory, _inputs(config), writes=(*RESULTS, *DIRECTORIES, SETTINGS))
    checkpoint = None
    if config.train.resume:
        checkpoint = _checkpoint_of(directory, config)
        if checkpoint is None and state.is_main_process:
            print(f"train.resume: {directory} holds no complete checkpoint; training starts from the beginning")
    elif not holds_run(directory):
        _refuse_foreign(directory)
    # The callback of TensorBoard reads its directory from this variable only.
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(directory / "logs")
    return Run(config, directory, checkpoint)


def _inputs(config: RunConfig) -> dict[str, str | None]:
    """Paths that a run reads, by the key that names them."""
    found: dict[str, str | None] = {"data.path": config.data.path}
    if isinstance(config, DistillConfig):
        return found | {"teacher": config.teacher, "base": config.base, "student.base": config.student.base}
    return found | {"model.base": config.model.base}


def holds_run(directory: Path) -> bool:
    """Whether a training recipe wrote this directory: it has its configuration, or the note beside its checkpoints."""
    try:
        found = read_yaml(directory / SETTINGS, error=ConfigError)
        if isinstance(found, dict) and {"data", "train", "evaluation", "output_dir"} <= found.keys():
            return bool({"domain", "teacher"} & found.keys())
    except ConfigError:
        pass
    return "streams" in _record(directory)


def _record(directory: Path) -> dict[str, Any]:
    """Fingerprint of the run's data and base (`streams`) and its launch (`launch`); empty where unknown."""
    try:
        return read_mapping(directory / "checkpoints" / "streams.json")
    except DataError:
        return {}


def _refuse_foreign(directory: Path) -> None:
    for name in (*RESULTS, *DIRECTORIES, SETTINGS):
        if (directory / name).exists():
            raise ConfigError(
                f"output_dir {directory} holds {name}, but no {SETTINGS} of a training run that says whose it is; "
                "choose another directory, or remove it"
            )


def begin_run(run: Run, fingerprint: str, launch: str) -> None:
    """Prepare the output directory, and write the settings, the fingerprint of the data and base, and the launch.

    A new run replaces an old one in the same directory; a resumed run keeps its complete checkpoints.

    Raises:
        ConfigError: on every process, if the directory cannot be written or is not shared by all, or if a resumed run
            would train on other streams than before or be split over other processes.
    """
    state, checkpoints = partial_state(), run.path("checkpoints")
    with raise_on_all_ranks():
        if run.config.train.resume:
            _check_resumed(run, checkpoints, fingerprint, launch)
    with raise_on_all_ranks():
        if state.is_main_process:
            with writing(run.directory):
                _make_ready(run, checkpoints)
                write_text(config_to_yaml(_settings(run.config)), run.path(SETTINGS))
                write_json({"streams": fingerprint, "launch": launch}, checkpoints / "streams.json")
    with raise_on_all_ranks():
        check_shared(run.path(SETTINGS), state)


def _check_resumed(run: Run, checkpoints: Path, fingerprint: str, launch: str) -> None:
    old = _record(run.directory)
    if not old and run.checkpoint is None:
        return
    if old.get("streams") != fingerprint:
        raise ConfigError(
            f"train.resume: the checkpoints in {checkpoints} were trained on streams {str(old.get('streams'))[:12]}, "
            f"and the data and base now give {fingerprint[:12]}; use the same data and base, or start a new run"
        )
    if run.checkpoint is not None and old.get("launch") != launch:
        raise ConfigError(
            f"train.resume: the checkpoints in {checkpoints} are of {old.get('launch')}, and this is {launch}; "
            "launch the same way, or start a new run"
        )


def _make_ready(run: Run, checkpoints: Path) -> None:
    run.directory.mkdir(parents=True, exist_ok=True)
    sweep(run.directory)
    # Its presence marks the run as complete.
    run.path("metrics.json").unlink(missing_ok=True)
    if run.config.train.resume:
        for path in unfinished_checkpoints(checkpoints):
            shutil.rmtree(path)
    else:
        _clear(run.directory)
    checkpoints.mkdir(parents=True, exist_ok=True)


def _settings(config: RunConfig) -> RunConfig:
    """The configuration that is written down: `train.resume` is left out, since it does not change the run."""
    return replace(config, train=replace(config.train, resume=False))


def _checkpoint_of(directory: Path, config: RunConfig) -> str | None:
    """The checkpoint to resume, None if none is complete; ConfigError for other settings than the run's."""
    if not holds_run(directory) or not (directory / SETTINGS).is_file():
        raise ConfigError(f"train.resume: {directory} holds no run (no {SETTINGS}); start one without train.resume")
    found = read_yaml(directory / SETTINGS, error=ConfigError, what=f"train.resume: {directory / SETTINGS}")
    if not isinstance(found, dict):
        raise ConfigError(f"train.resume: {directory / SETTINGS} is not a mapping of keys; start a new run")
    old, new = flatten(with_new_names(found)), flat_settings(config)
    for key in sorted(old.keys() | new.keys()):
        if _decides(key, config) and old.get(key) != new.get(key):
            raise ConfigError(
                f"train.resume: {directory} was started with {key} {old.get(key)!r}, and now it is {new.get(key)!r}; "
                f"use the same settings, or start a new run"
            )
    checkpoint = last_checkpoint(directory / "checkpoints")
    if checkpoint is not None:
        check_checkpoint(checkpoint)
    return checkpoint


def _decides(key: str, config: RunConfig) -> bool:
    """Whether a setting changes the weights that a run ends with."""
    if key in SELECTION:
        return config.train.eval_steps > 0
    if key in NO_SELECTION and not config.train.eval_steps:
        return False
    if key == "train.epochs" and config.train.max_steps > 0:
        return False
    return key.startswith(WEIGHTS) and key not in ELSEWHERE


def _clear(directory: Path) -> None:
    for name in RESULTS:
        (directory / name).unlink(missing_ok=True)
    for name in DIRECTORIES:
        shutil.rmtree(directory / name, ignore_errors=True)
