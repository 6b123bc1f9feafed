"""Readers of the forms that behaviour logs come in; one registry feeds lookup, error text and documentation."""

# Importing a reader's module registers it; detection and messages follow this order.
from llmrec_peft.data.sources import directory  # noqa: F401, I001
from llmrec_peft.data.sources import movielens, amazon, amazon_older, taobao, mind, recbole, text, hub  # noqa: F401
from llmrec_peft.data.sources.registry import READERS, RawLog, Reader, describe_formats, detect_format, read_log

__all__ = ["READERS", "RawLog", "Reader", "describe_formats", "detect_format", "read_log"]
