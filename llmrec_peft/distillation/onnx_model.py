"""The ONNX graph of a classifier: from tokens to logits, with dynamic batch, length and number of markers.

Shape letters: B rows, L tokens of a row, T markers, C labels.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from llmrec_peft.errors import ModelError
from llmrec_peft.models.classifier import BehaviorClassifier

OPSET = 18
"""Default opset of the graph: the lowest that torch's exporter writes."""
_LOGGERS = ("torch.onnx", "onnxscript", "onnx_ir", "root", "onnxruntime.quantization.matmul_nbits_quantizer")


def check_opset(opset: int) -> int:
    """Raise ModelError unless torch writes an opset and the installed ONNX Runtime runs it."""
    import onnx
    import onnxruntime

    if isinstance(opset, bool) or not isinstance(opset, int) or opset < OPSET or not _runs(opset):
        highest = next(number for number in range(onnx.defs.onnx_opset_version(), 0, -1) if _runs(number))
        raise ModelError(
            f"opset must be from {OPSET}, the lowest that torch writes, to {highest}, the highest that onnxruntime "
            f"{onnxruntime.__version__} runs; got {opset!r}"
        )
    return opset


def _runs(opset: int) -> bool:
    """Whether the installed ONNX Runtime loads a graph of an opset."""
    import onnxruntime
    from onnx import TensorProto, defs, helper

    if opset > defs.onnx_opset_version():
        return False
    a, b = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "ab")
    graph = helper.make_graph([helper.make_node("Identity", ["a"], ["b"])], "try", [a], [b])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception:  # the library's exceptions share no other base class
        return False
    return True


class _GraphModule(nn.Module):
    """What is exported: `input_ids`, `position_ids`, `segment` [B, L] and `markers` [T] to logits [T, C].

    The attention mask is computed from `segment` inside the graph.
    """

    def __init__(self, classifier: BehaviorClassifier) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor, segment: torch.Tensor, markers: torch.Tensor
    ) -> torch.Tensor:
        hidden_TH = self.classifier.hidden_states(input_ids, position_ids, markers, segment=segment)
        logits: torch.Tensor = self.classifier.head(hidden_TH.float())
        return logits


def write_graph(classifier: BehaviorClassifier, path: Path, opset: int) -> None:
    """Export a decoder classifier to one ONNX file, weights included."""
    from llmrec_peft.serving.onnx_graph import INPUTS, OUTPUT

    # All sizes differ, so that the exporter mistakes none for another, nor for a constant.
    rows, length = 2, 7
    ids = torch.zeros(rows, length, dtype=torch.int64)
    positions = torch.arange(length).expand(rows, -1).contiguous()
    segment = torch.tensor([[0, 0, 0, 0, 0, 1, 2]] * rows)
    markers = torch.tensor([3, 5, 6, 13])
    # "answers" is the name of T in exports since version 0.1.0.
    batch, tokens, answers = (torch.export.Dim(name) for name in ("batch", "length", "answers"))
    shapes = [{0: batch, 1: tokens}] * 3 + [{0: answers}]
    with quiet_exporter(), torch.no_grad():
        program = torch.onnx.export(
            _GraphModule(classifier).eval(), (ids, positions, segment, markers), dynamo=True, opset_version=opset,
            input_names=list(INPUTS), output_names=[OUTPUT], dynamic_shapes=shapes, external_data=False, verbose=False,
        )  # fmt: skip
        assert program is not None  # it is with dynamo=True
        program.save(str(path), external_data=False)
    _strip_metadata(path)


def _strip_metadata(path: Path) -> None:
    """Remove the exporter's notes: stack traces with this machine's paths, which are larger than a small model.

    Shapes between nodes are removed too: onnxruntime infers them, and its quantiser fails on stale ones.
    """
    import onnx

    model = onnx.load(str(path))
    graph = model.graph
    del graph.value_info[:]
    for part in (model, graph, *graph.node, *graph.input, *graph.output, *graph.initializer):
        del part.metadata_props[:]
    for node in graph.node:
        node.doc_string = ""
    onnx.save(model, str(path))


@contextmanager
def quiet_exporter() -> Iterator[None]:
    """Silence the exporter and the quantiser inside: notes on optional packages, axis names and deprecated calls."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
