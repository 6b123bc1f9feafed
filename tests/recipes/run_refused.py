"""Run by a launcher: recipes that every process must refuse, one after another in the same processes.

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

from tests.recipes.conftest import load_recipe


def main() -> None:
    """Leave each case's exit code and what was said, by case and rank."""
    output, cases, rank = Path(sys.argv[1]), json.loads(sys.argv[2]), int(os.environ["RANK"])
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


if __name__ == "__main__":
    main()
