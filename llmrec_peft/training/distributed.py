"""The processes (ranks) of one launch: their session, errors on all ranks, and comparisons between ranks."""

from __future__ import annotations

import atexit
import gc
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object, str_to_bool

from llmrec_peft.errors import ConfigError, LLMRecError, machine_fault


def _flag(name: str) -> bool:
    return bool(str_to_bool(os.environ.get(name, "false")))


def uses_deepspeed() -> bool:
    """Whether the launch configuration selects DeepSpeed."""
    return _flag("ACCELERATE_USE_DEEPSPEED")


def uses_fsdp() -> bool:
    """Whether the launch configuration selects FSDP."""
    return _flag("ACCELERATE_USE_FSDP")


def on_cpu() -> bool:
    """Whether the processes run on the CPU: by the launch configuration, or because there is no accelerator."""
    return _flag("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()


def device_arguments() -> dict[str, Any]:
    """Arguments of Transformers by which the processes of this launch form one group, with or without a GPU.

    On a machine without a GPU, Accelerate takes several processes for one group each unless `use_cpu` is set. With
    `use_cpu` it ignores DeepSpeed, which needs the name of the backend instead.
    """
    if uses_deepspeed():
        return {"ddp_backend": "gloo"} if on_cpu() else {}
    return {"use_cpu": True} if on_cpu() else {}


def partial_state() -> PartialState:
    """State of this launch: rank, number of processes, device. The first call forms the process group.

    Raises:
        ConfigError: DeepSpeed together with the CPU of Accelerate, or without the package.
    """
    if PartialState._shared_state:
        return PartialState()
    if uses_deepspeed():
        if _flag("ACCELERATE_USE_CPU"):
            raise ConfigError(
                "ACCELERATE_USE_CPU=true (--cpu) cannot go with DeepSpeed, which Accelerate would leave out; set "
                "DS_ACCELERATOR=cpu instead"
            )
        _require_deepspeed()
        # DeepSpeed calls functions that torch has renamed, in every exchange.
        warnings.filterwarnings("ignore", r"`torch.distributed.\w+_tensor` is deprecated", FutureWarning)
        if on_cpu():
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
    names = {"use_cpu": "cpu", "ddp_backend": "backend"}
    return PartialState(**{names[key]: value for key, value in device_arguments().items()})


def _require_deepspeed() -> None:
    try:
        import deepspeed  # noqa: F401
    except ImportError:
        raise ConfigError(
            "the launch configuration selects DeepSpeed, which is not installed; "
            "install it with: pip install llmrec_peft[deepspeed]"
        ) from None


@contextmanager
def distributed_session() -> Iterator[PartialState]:
    """Form the process group, and end it when all processes have left the block.

    After an error the group is left as it is: waiting for a process that has failed would never end.
    """
    state = partial_state()
    yield state
    state.wait_for_everyone()
    _end_group(state)


def _end_group(state: PartialState) -> None:
    """End the process group.

    Threads of gloo outlive the group where DDP wrapped a model. A thread that still holds tensors of the last exchange
    needs the interpreter's lock to release them, and aborts the process if the interpreter has ended. A garbage
    collection takes long enough for that, and releases the lock after it.
    """
    state.destroy_process_group()
    gc.collect()


@contextmanager
def raise_on_all_ranks() -> Iterator[None]:
    """Raise the error of one process on all of them when the block ends, so that none waits for one that has ended.

    Raises:
        LLMRecError: the process's own error, or else that of the first process that has one, with its rank.
    """
    state = partial_state()
    own: Exception | None = None
    try:
        yield
    except Exception as error:
        own = error
    if state.num_processes == 1:
        if own is not None:
            raise own
        return
    found = gather_object([None if own is None else (type(own), machine_fault(own) or str(own))])
    failed = [rank for rank, error in enumerate(found) if error is not None]
    if not failed:
        return
    kind, text = found[failed[0]]
    if own is not None and not isinstance(own, LLMRecError) and machine_fault(own) is None:
        raise own
    if len(failed) < state.num_processes:
        text = f"{text} (on process {failed[0]} of {state.num_processes})"
    shared = (kind if issubclass(kind, LLMRecError) else ConfigError)(text)
    # The first process prints the line for all of them.
    shared.reported_elsewhere = state.process_index != 0
    # All processes are at this line, so they can end the group at exit. A group that is still there when the
    # interpreter ends may abort.
    atexit.register(_end_group, state)
    raise shared from own


def check_ranks_equal(values: Mapping[str, str], advice: str) -> None:
    """Raise ConfigError, on every process, where a value (by name) is not the same on all of them."""
    with raise_on_all_ranks():
        found = gather_object([dict(values)])
        for rank, other in enumerate(found):
            for name in sorted(found[0].keys() | other.keys()):
                if found[0].get(name) != other.get(name):
                    raise ConfigError(
                        f"{name} is {found[0].get(name)} on process 0 and {other.get(name)} on process {rank}; {advice}"
                    )
