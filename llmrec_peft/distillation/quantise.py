"""An ONNX graph with weights of 8 bits.

A weight w is stored as q = round(w / s) with a scale s for each group of weights, so that w is about s q. The groups
decide the error: one outlier makes s large for its whole group (Dettmers et al., "LLM.int8()", NeurIPS 2022).

Shape letters: V tokens of the vocabulary, W width of the embedding.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from llmrec_peft.distillation.onnx_model import quiet_exporter

BLOCK = 32
"""Weights of a column that share a scale, with `blocks`."""


def quantise(source: Path, target: Path, *, blocks: bool) -> None:
    """Write a graph with weights of 8 bits; the embedding has a scale for each token, and the head stays float32.

    Args:
        source: file of the float32 graph.
        target: file to write.
        blocks: matrix products have a scale for each block of weights and of activations, in place of one for each
            column of weights and each tensor of activations. One scale a tensor is faster in a small model, but ruins
            an LLM: a few activations of its first token are hundreds of times larger than all others, which one scale
            rounds to zero.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    model = onnx.load(str(source))
    head = [node.name for node in model.graph.node if "logits" in node.output]
    with quiet_exporter():
        if blocks:
            # Level 4: activations are quantised to 8 bits too, where the processor has a kernel for it.
            quantizer = MatMulNBitsQuantizer(
                model, bits=8, block_size=BLOCK, is_symmetric=True, accuracy_level=4, nodes_to_exclude=head
            )
            quantizer.process()
            model = quantizer.model.model
        else:
            # Unsigned: processors without VNNI add pairs of signed products in 16 bits, which would overflow.
            quantize_dynamic(
                model, str(target), op_types_to_quantize=["MatMul", "Gemm"], per_channel=True,
                weight_type=QuantType.QUInt8, nodes_to_exclude=head, extra_options={"MatMulConstBOnly": True},
            )  # fmt: skip
            model = onnx.load(str(target))
    _quantise_embedding(model)
    onnx.save(model, str(target))


def _quantise_embedding(model: Any) -> None:
    """Quantise the table [V, W] that `input_ids` look up, in place, with s = max |row| / 127 for each row.

    Gather(table, ids) becomes Cast(Gather(int8 table, ids)) * Gather(scales, ids). A table that another node reads too
    stays as it is: that node would keep the floats beside the integers.
    """
    from onnx import helper, numpy_helper

    graph = model.graph
    tables = {tensor.name: tensor for tensor in graph.initializer}
    lookups = [
        (place, node)
        for place, node in enumerate(graph.node)
        if node.op_type == "Gather" and node.input[0] in tables and node.input[1] == "input_ids"
    ]
    if len(lookups) != 1:
        return
    ((place, node),) = lookups
    table, output = tables[node.input[0]], node.output[0]
    if sum(table.name in other.input for other in graph.node) > 1:
        return
    values = numpy_helper.to_array(table)
    # The floor keeps a row of zeros from being divided by zero.
    scale = np.maximum(np.abs(values).max(1, keepdims=True), np.finfo(np.float32).tiny * 127) / np.float32(127)
    tensors = {"int8": np.rint(values / scale).astype(np.int8), "scale": scale.astype(np.float32)}
    graph.initializer.remove(table)
    graph.initializer.extend(numpy_helper.from_array(value, f"{table.name}_{key}") for key, value in tensors.items())
    graph.node.remove(node)
    nodes = [
        helper.make_node("Gather", [f"{table.name}_{key}", "input_ids"], [f"{output}_{key}"], axis=0) for key in tensors
    ]
    nodes += [
        helper.make_node("Cast", [f"{output}_int8"], [f"{output}_float"], to=1),  # 1 is FLOAT
        helper.make_node("Mul", [f"{output}_float", f"{output}_scale"], [output]),
    ]
    for number, made in enumerate(nodes):
        graph.node.insert(place + number, made)
