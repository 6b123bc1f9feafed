"""Python examples of model cards: how to load the model and predict with it.

The examples run as they stand, but for the repository's name and the values in braces; tests run them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmrec_peft.checkpoints.card_markdown import python_block
from llmrec_peft.models.base import hub_id
from llmrec_peft.models.stock_parts import HEAD_NAMES

REPOSITORY = "OWNER/NAME"
"""Placeholder for the name of the repository, which is not known when the card is written."""


def bundle_example(manifest: Mapping[str, Any]) -> str:
    ours = (
        "```python\n"
        "from huggingface_hub import snapshot_download\n"
        "from llmrec_peft import load_classifier\n\n"
        f'classifier = load_classifier(snapshot_download("{REPOSITORY}"))\n'
        "```\n\n"
        "`load_classifier` checks all files, the base and its tokenizer first."
    )
    method = manifest["method"]
    if method not in ("lora", "qlora"):
        return f"{ours} PEFT has no such adapter, so it cannot load this directory."
    base = hub_id(str(manifest["base"].get("name"))) or "BASE"
    dtype, packed = dtype_of(manifest["model_options"]), method == "qlora"
    arguments = f"num_labels={len(manifest['labels'])}, dtype=torch.{dtype}"
    arguments += ", quantization_config=four_bits" if packed else ""
    lines = [
        "import torch",
        "from peft import PeftModel",
        f"from transformers import AutoModelForSequenceClassification, AutoTokenizer{', BitsAndBytesConfig' * packed}",
        "",
        *(_four_bits(manifest) if packed else ()),
        f'tokenizer = AutoTokenizer.from_pretrained("{base}")',
        f'base = AutoModelForSequenceClassification.from_pretrained("{base}", {arguments})',
        f'model = PeftModel.from_pretrained(base, "{REPOSITORY}").eval()',
    ]
    how = "gives the same logits" if dtype == "float32" and not packed else "rounds more, and gives nearly those logits"
    return f"{ours} PEFT alone {how}:\n\n{python_block(lines + _prediction_lines(manifest))}"


def _four_bits(manifest: Mapping[str, Any]) -> list[str]:
    """Lines that hold the base in 4 bits as training did, and its head whole."""
    options = manifest["method_options"]
    dtype = dtype_of({"dtype": options.get("compute_dtype") or manifest["model_options"].get("dtype")})
    return [
        "four_bits = BitsAndBytesConfig(",
        f"    load_in_4bit=True, bnb_4bit_quant_type={options.get('quant_type', 'nf4')!r},",
        f"    bnb_4bit_use_double_quant={options.get('double_quant', True)!r},",
        f"    bnb_4bit_compute_dtype=torch.{dtype},",
        f"    llm_int8_skip_modules={['lm_head', *HEAD_NAMES]!r},",
        ")",
    ]


def merged_example(manifest: Mapping[str, Any]) -> str:
    lines = [
        "import torch",
        "from transformers import AutoModelForSequenceClassification, AutoTokenizer",
        "",
        f'tokenizer = AutoTokenizer.from_pretrained("{REPOSITORY}")',
        f'model = AutoModelForSequenceClassification.from_pretrained("{REPOSITORY}", dtype=torch.{dtype_of(manifest)})',
    ]
    ours = (
        "`llmrec_peft.checkpoints.loading.load_trained` of a downloaded copy checks its files first, and keeps the "
        "head in float32."
    )
    return f"{python_block(lines + _prediction_lines(manifest))}\n\n{ours}"


def _prediction_lines(manifest: Mapping[str, Any]) -> list[str]:
    """Lines that predict the label of an event by `tokenizer` and `model`."""
    domain, calibration = manifest["domain"], manifest["calibration"] or {}
    texts = [str(domain.get(key) or "") for key in ("header", "event", "marker")]
    scale = f" / {float(calibration.get('temperature', 1.0))!r}"
    bias = calibration.get("bias")
    shift = "" if bias is None else f" + torch.tensor({[float(value) for value in bias]!r})"
    return [
        "",
        f"header, event, marker = {', '.join(map(repr, texts))}  # put values for what is in braces",
        f"pieces = [header, event, marker, {str(manifest['words'][-1])!r}, event, marker]",
        *_surrounding_tokens(manifest["tokenizer"]),
        'inside = [token for piece in pieces for token in tokenizer(piece, add_special_tokens=False)["input_ids"]]',
        "with torch.no_grad():",
        "    logits = model(input_ids=torch.tensor([before + inside + behind])).logits[0].float()",
        f"probabilities = (logits{scale}{shift}).softmax(-1)  # {[str(label) for label in manifest['labels']]!r}",
    ]


def _surrounding_tokens(tokenizer: Mapping[str, Any]) -> list[str]:
    """Lines that set the tokens before and behind a prompt; older manifests do not say them."""
    known = [tokenizer.get(key) for key in ("prefix", "suffix")]
    if all(isinstance(ids, list) and all(type(number) is int for number in ids) for ids in known):
        return [f"before, behind = {known[0]!r}, {known[1]!r}  # BOS, if there is one; CLS and SEP of an encoder"]
    return [
        'around = tokenizer("")["input_ids"]  # none, or BOS; CLS and SEP of an encoder',
        "before, behind = around[:1], around[1:]",
    ]


def dtype_of(options: Mapping[str, Any]) -> str:
    """A number format that torch has by this name."""
    dtype = options.get("dtype")
    return dtype if dtype in ("float32", "bfloat16", "float16") else "float32"
