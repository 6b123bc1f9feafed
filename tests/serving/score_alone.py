"""Scores by an export in a process that can import neither torch nor transformers nor pyarrow; prints JSON."""

import json
import sys

for name in ("torch", "transformers", "pyarrow", "scipy", "yaml", "onnx"):
    sys.modules[name] = None

from llmrec_peft.serving import OnnxScorer  # noqa: E402

directory, items, requests = sys.argv[1:]
scorer = OnnxScorer.load(directory, items, threads=1)
found = scorer.score_many(json.loads(requests))
try:
    import llmrec_peft

    llmrec_peft.Scorer  # noqa: B018
except ImportError as error:
    message = str(error)
print(json.dumps({"answers": [one.tolist() for one in found], "message": message}))
