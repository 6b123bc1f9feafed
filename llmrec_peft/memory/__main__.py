"""Estimate the peak memory of training per device, without loading weights; `llmrec memory` is the same.

python -m llmrec_peft.memory --base meta-llama/Llama-3.1-8B --method qlora --gpus 8 [--json]
"""

import json
import sys

from llmrec_peft.boundary import exit_on_error
from llmrec_peft.config.parsing import parse_config
from llmrec_peft.memory.memory_options import MemoryConfig


def main(args: list[str] | None = None, prog: str | None = None) -> None:
    """Print the estimate as a table, or as JSON with --json."""
    given = list(sys.argv[1:] if args is None else args)
    as_json = "--json" in given
    config = parse_config(MemoryConfig, [word for word in given if word != "--json"], prog=prog)
    with exit_on_error():
        from llmrec_peft.memory.estimate import estimate_memory

        estimate = estimate_memory(config)
        print(json.dumps(estimate.to_dict(), indent=1) if as_json else f"{estimate.summary}\n\n{estimate.table()}")


if __name__ == "__main__":
    main()
