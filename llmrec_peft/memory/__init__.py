"""Peak memory of training per device, estimated without the base's weights: `python -m llmrec_peft.memory --help`."""

from llmrec_peft.memory.estimate import Estimate, Part, estimate_memory
from llmrec_peft.memory.memory_options import MemoryConfig

__all__ = ["Estimate", "MemoryConfig", "Part", "estimate_memory"]
