"""Peak memory of training per device, estimated without the base's weights: `python -m llmrec_peft.memory --help`."""

from llmrec_peft.memory.config import MemoryConfig
from llmrec_peft.memory.estimate import Estimate, Part, estimate_memory

__all__ = ["Estimate", "MemoryConfig", "Part", "estimate_memory"]
