"""Run by a launcher: a recipe of which one process kills itself in the middle of saving a checkpoint.

Arguments: recipe, rank that dies, step whose checkpoint is being saved, and what is about to be written then
("optimizer", the trainer's "state", or the "marker"); then the recipe's own arguments.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
from pathlib import Path

from llmrec_peft.training.trainer import BehaviorTrainer

METHODS = {"optimizer": "_save_optimizer_and_scheduler", "state": "_save_rng_state", "marker": "_mark_complete"}


def main() -> None:
    """Run the recipe to its end, or to this process's."""
    recipe, rank, step, before = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    save = getattr(BehaviorTrainer, METHODS[before])

    def die(trainer, *args, **kwargs):
        if trainer.state.global_step == step and trainer.args.process_index == rank:
            os.kill(os.getpid(), signal.SIGKILL)
        return save(trainer, *args, **kwargs)

    setattr(BehaviorTrainer, METHODS[before], die)
    path = Path(__file__).resolve().parents[2] / "recipes" / f"{recipe}.py"
    sys.argv = [str(path), *sys.argv[5:]]
    runpy.run_path(str(path), run_name="__main__")


if __name__ == "__main__":
    main()
