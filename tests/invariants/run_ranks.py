"""Run by a launcher of several processes: trains the small problem and leaves weights, losses and validation answers.

Arguments: base directory, output directory, then a JSON list of [name, settings of make_trainer].
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch

from llmrec_peft.data.domain import Domain
from llmrec_peft.data.streams import build_streams
from llmrec_peft.models.base import load_tokenizer
from llmrec_peft.training.distributed import distributed_session, uses_deepspeed
from tests.invariants.setup_run import DOMAIN, losses_of, make_trainer, splits, trained


def main() -> None:
    """Run the cases one after another."""
    torch.set_num_threads(1)
    if uses_deepspeed():
        import deepspeed

        # Optional extension for exchanges on one machine: to compile it takes a minute, and torch exchanges without it.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    base, output, cases = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
    with distributed_session() as state:
        tokenizer = load_tokenizer(base)
        valid = build_streams(splits().valid, Domain.from_dict(DOMAIN), tokenizer)
        for name, settings in cases:
            trainer = make_trainer(base, tokenizer, output / name, **settings)
            held = sum(value.numel() for value in trainer.model.parameters())
            dtypes = {str(getattr(value, "ds_tensor", value).dtype) for value in trainer.model.parameters()}
            trainer.train()
            predictions = trainer.predict_streams(valid)
            np.savez(
                output / f"{name}.{state.process_index}.npz",
                losses=losses_of(trainer),
                world=state.num_processes,
                held=held,
                dtypes=sorted(dtypes),
                total=trainer.model.trainable_parameters()[1],
                logits=predictions.logits,
                targets=predictions.targets,
                **{f"weight {key}": value for key, value in trained(trainer).items()},
            )


if __name__ == "__main__":
    main()
