"""Serving an exported student on ONNX Runtime: neither torch nor transformers nor pyarrow is imported."""

from llmrec_peft.serving.onnx_scorer import OnnxScorer

__all__ = ["OnnxScorer"]
