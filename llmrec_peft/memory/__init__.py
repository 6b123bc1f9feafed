"""Peak memory of training per device, estimated without the base's weights: `llmrec memory --help`."""
