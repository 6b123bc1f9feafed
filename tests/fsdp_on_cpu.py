"""Runs a script under FSDP on CPU processes, which Accelerate by itself refuses to choose without a GPU.

Arguments: the script, then its own. The launch configuration, Trainer, Accelerate's wrapping and PyTorch's FSDP2 are
the real ones; what is changed is the choice of the backend (gloo) and of the device.
"""

from __future__ import annotations

import os
import runpy
import sys

os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"

from accelerate import PartialState
from accelerate.utils import DistributedType

from llmrec_peft.training import distributed as processes

PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)
processes.on_cpu = lambda: False

if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
