"""The processes of one launch: joining them, failing together, and agreeing on what they work on."""

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
    """Whether the launch configuration asks for DeepSpeed."""
    return _flag("ACCELERATE_USE_DEEPSPEED")


def uses_fsdp() -> bool:
    """Whether the launch configuration asks for FSDP."""
    return _flag("ACCELERATE_USE_FSDP")


def on_cpu() -> bool:
    """Whether the processes run on the CPU: because they were told to, or because there is nothing else."""
    return _flag("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()


def device_arguments() -> dict[str, Any]:
    """Arguments of Transformers that make the processes of this launch find each other, with or without a GPU.

    Accelerate takes several processes on a machine without a GPU for one each, unless it is told of the CPU; told of
    the CPU it forgets DeepSpeed, which needs the name of the backend instead.
    """
    if uses_deepspeed():
        return {"ddp_backend": "gloo"} if on_cpu() else {}
    return {"use_cpu": True} if on_cpu() else {}


def partial_state() -> PartialState:
    """State of this launch: rank, number of processes, device. The first call joins the processes.

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
        # DeepSpeed calls what torch has renamed, in every exchange.
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
            "the launch configuration asks for DeepSpeed, which is not installed; "
            "install it with: pip install llmrec_peft[deepspeed]"
        ) from None


@contextmanager
def distributed_session() -> Iterator[PartialState]:
    """Join the processes, and part from them when all is done.

    After an error they are left as they are: a process that waits for one that has failed would wait for ever.
    """
    state = partial_state()
    yield state
    state.wait_for_everyone()
    _part(state)


def _part(state: PartialState) -> None:
    """End the process group.

    Threads of gloo outlive it where a model was wrapped by DDP. One that has yet to drop the tensors of the last
    exchange needs the interpreter's lock for that, and aborts the process if the interpreter has ended: a collection
    takes long enough, and gives the lock away after it.
    """
    state.destroy_process_group()
    gc.collect()


@contextmanager
def raise_on_all_ranks() -> Iterator[None]:
    """What fails on one process fails on all when the block ends, so that none waits for one that has gone.

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
    # One line for all of them: the first process speaks.
    shared.said_elsewhere = state.process_index != 0
    # They are in step, so they can part when they end; a group that is left to the interpreter's end may abort there.
    atexit.register(_part, state)
    raise shared from own


def check_ranks_equal(facts: Mapping[str, str], advice: str) -> None:
    """Raise ConfigError, on every process, where a fact is not the same on all of them."""
    with raise_on_all_ranks():
        found = gather_object([dict(facts)])
        for rank, other in enumerate(found):
            for name in sorted(found[0].keys() | other.keys()):
                if found[0].get(name) != other.get(name):
                    raise ConfigError(
                        f"{name} is {found[0].get(name)} on process 0 and {other.get(name)} on process {rank}; {advice}"
                    )
