"""Run by a launcher: recipes one after another in the same processes, whether they end well or are refused.

Arguments: output directory, then a JSON list of {"name", "recipe", "arguments", "of_rank_1", "path"}; `of_rank_1` are
the arguments of the second process alone, `path` a directory that it alone finds packages in.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from pathlib import Path

import torch

from llmrec_peft.training import distributed
from tests.recipes.conftest import load_recipe


def main() -> None:
    """Leave each case's exit code and what it wrote to stderr, by case and rank."""
    torch.set_num_threads(1)
    output, cases, rank = Path(sys.argv[1]), json.loads(sys.argv[2]), int(os.environ["RANK"])
    # A process group cannot be formed twice in one launch, so the recipes share one.
    end_group = distributed._end_group
    distributed._end_group = lambda state: None
    for case in cases:
        arguments, said = list(case["arguments"]), io.StringIO()
        if rank == 1:
            arguments += case.get("of_rank_1", [])
            sys.path[:0] = [case["path"]] if "path" in case else []
        code = 0
        with contextlib.redirect_stderr(said):
            try:
                load_recipe(case["recipe"]).main(arguments)
            except SystemExit as stop:
                code = stop.code
        if rank == 1 and "path" in case:
            sys.path.remove(case["path"])
        (output / f"{case['name']}.{rank}.json").write_text(json.dumps({"code": code, "said": said.getvalue()}))
    state = distributed.partial_state()
    state.wait_for_everyone()
    end_group(state)


if __name__ == "__main__":
    main()
