"""A run's checkpoints on disk: which of them are complete, and whether one can be read."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import TrainerState
from transformers.trainer import OPTIMIZER_NAME, SCALER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_pt_utils import safe_globals
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import SAFE_WEIGHTS_NAME

from llmrec_peft.documents import MAX_JSON_BYTES, parse_json, read_bytes
from llmrec_peft.errors import ConfigError, input_errors

COMPLETE = "complete"
"""File that is written last into a checkpoint; a checkpoint without it is ignored."""
_ADVICE = "remove it to resume from the one before, or start a new run"


def last_checkpoint(directory: str | Path) -> str | None:
    """The newest complete checkpoint in a run's directory; unfinished ones are ignored."""
    found = [path.parent for path in Path(directory).glob(f"{PREFIX_CHECKPOINT_DIR}-*/{COMPLETE}")]
    steps = {step: path for path in found if (step := path.name.split("-")[-1]).isascii() and step.isdigit()}
    return str(steps[max(steps, key=int)]) if steps else None


def unfinished_checkpoints(directory: str | Path) -> list[Path]:
    """Checkpoints whose saving was cut off."""
    found = Path(directory).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
    return [path for path in found if path.is_dir() and not (path / COMPLETE).is_file()]


@contextmanager
def reading(directory: str | Path) -> Iterator[None]:
    """Turn what the libraries raise on a damaged checkpoint into ConfigError."""
    with input_errors(ConfigError, f"train.resume: checkpoint {directory}", _ADVICE):
        yield


def check_checkpoint(directory: str | Path) -> None:
    """Read the headers of a checkpoint's files, before the run that it belongs to is changed.

    Raises:
        ConfigError: a file is missing or damaged.
    """
    place = Path(directory)
    what = f"train.resume: {place / TRAINER_STATE_NAME}"
    content = read_bytes(place / TRAINER_STATE_NAME, error=ConfigError, limit=MAX_JSON_BYTES)
    state = parse_json(content, what, error=ConfigError, advice=_ADVICE)
    with reading(place):
        step = TrainerState(**state).global_step
    if not isinstance(step, int) or not 0 <= step < 2**63:
        raise ConfigError(f"{what} has global_step {step!r}, which must be a whole number of at least 0; {_ADVICE}")
    weights = place / SAFE_WEIGHTS_NAME
    if weights.exists():  # DeepSpeed writes them in files of its own
        with reading(weights), safe_open(weights, "pt") as file:
            file.keys()
    names = (OPTIMIZER_NAME, SCHEDULER_NAME, SCALER_NAME)
    for path in [*(place / name for name in names if (place / name).exists()), *sorted(place.glob("rng_state*.pth"))]:
        with reading(path), safe_globals():
            torch.load(path, map_location="cpu", weights_only=True, mmap=True)
