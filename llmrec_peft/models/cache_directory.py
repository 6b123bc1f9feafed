"""The directory where converted bases and fingerprints are cached."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """Where converted bases and fingerprints are cached: $LLMREC_PEFT_CACHE, or ~/.cache/llmrec_peft."""
    return Path(os.environ.get("LLMREC_PEFT_CACHE") or Path.home() / ".cache" / "llmrec_peft").expanduser()
