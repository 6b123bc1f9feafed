"""Run by a test: a recipe that is killed at the moment in which its n-th file would be moved into place.

Arguments: recipe, n (from 1), then the recipe's own arguments.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
from pathlib import Path


def main() -> None:
    """Run the recipe to its end, or to its death."""
    recipe, left, move = sys.argv[1], int(sys.argv[2]), os.replace

    def count(source, target, **options):
        nonlocal left
        left -= 1
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)
        return move(source, target, **options)

    path = Path(__file__).resolve().parents[2] / "recipes" / f"{recipe}.py"
    sys.argv = [str(path), *sys.argv[3:]]
    os.replace = count
    runpy.run_path(str(path), run_name="__main__")


if __name__ == "__main__":
    main()
