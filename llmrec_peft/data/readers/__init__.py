"""Readers of the forms that behaviour logs come in; one registry feeds lookup, error text and documentation."""

# Importing a reader's module registers it; detection and messages follow this order.
from llmrec_peft.data.readers import directory  # noqa: F401, I001
from llmrec_peft.data.readers import (  # noqa: F401
    movielens, amazon, amazon_older, taobao, mind, recbole, text_records, hub_datasets,
)  # fmt: skip
from llmrec_peft.data.readers.registry import READERS, RawLog, Reader, describe_formats, detect_format, read_raw_log

__all__ = ["READERS", "RawLog", "Reader", "describe_formats", "detect_format", "read_raw_log"]
