"""Model cards: the README.md of a bundle and of a merged model, with metrics in the Hub's own format.

A card is made of the manifest alone. Domains and labels are other people's text, so it stands in a card only as
Python spells it (`repr`, which leaves no line break and nothing invisible), inside code marks.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from llmrec_peft.files import plain
from llmrec_peft.models.base import BASES
from llmrec_peft.models.stock_parts import HEAD_NAMES

CARD = "README.md"
REPOSITORY = "OWNER/NAME"
"""What stands in a card for the repository that it will lie in, which its writer does not know."""
SPLITS = ("valid", "test")
_METHODS = {
    "lora": "A LoRA adapter",
    "qlora": "A LoRA adapter, trained in 4 bits,",
    "adapter": "A bottleneck adapter",
    "head": "A classification head",
    "full": "All weights of a classifier",
}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)


def bundle_card(manifest: Mapping[str, Any]) -> str:
    """README.md of a bundle, from what its behavior.json holds: YAML for the Hub, then Markdown."""
    manifest = plain(manifest)
    method, base = manifest["method"], _base(manifest)
    library = "peft" if method in ("lora", "qlora") else "llmrec_peft"
    relation = "finetune" if method == "full" else "adapter"
    opening = f"{_METHODS[method]} on {base}."
    return _card(manifest, _data(manifest, library, method, relation), opening, _bundle_use(manifest), "")


def merged_card(manifest: Mapping[str, Any]) -> str:
    """README.md of a merged model, from what its behavior.json holds: YAML for the Hub, then Markdown."""
    manifest = plain(manifest)
    several = len(manifest["merged_from"]) > 1
    data = _data(manifest, "transformers", "merged", "merge" if several else "finetune")
    opening = (
        f"A stock sequence classifier in {_dtype(manifest)}: {_base(manifest)}, with what was trained in its weights."
    )
    return _card(manifest, data, opening, _merged_use(manifest), _merging(manifest))


def student_card(manifest: Mapping[str, Any]) -> str:
    """README.md of a distilled student, from what its behavior.json holds: YAML for the Hub, then Markdown."""
    manifest = plain(manifest)
    options = manifest["student"]["options"]
    kinds = {
        "ids": "A tiny decoder that reads item ids, one token an event, in place of item texts",
        "shallow": f"Layers {manifest['student'].get('layers')} of its teacher",
        "small": f"A smaller base, {_base(manifest)}",
    }
    opening = f"A stock sequence classifier in float32, distilled: {kinds[options['kind']]}."
    data = _data(manifest, "transformers", "distilled", "finetune")
    return _card(manifest, data, opening, _merged_use(manifest), _teaching(manifest))


def hub_id(base: str) -> str | None:
    """Hub id of a base's name; None for a path, which means nothing to others and tells them about a machine."""
    if base in BASES:
        return BASES[base].hub_id
    return base if _HUB_ID.fullmatch(base) and not Path(base).expanduser().exists() else None


# -- parts -------------------------------------------------------------------------------------------


def _data(manifest: Mapping[str, Any], library: str, method: str, relation: str) -> Any:
    """The card's YAML block."""
    from huggingface_hub import EvalResult, ModelCardData

    name = _name(manifest)
    kind = re.sub(r"\W+", "-", name).strip("-") or "behaviour"
    results = [
        EvalResult(
            task_type="text-classification", task_name="Behaviour classification", dataset_type=kind, dataset_name=name,
            dataset_split=split, metric_type=_line(metric), metric_name=_line(metric), metric_value=value,
        )
        for split, values in _metrics(manifest).items() for metric, value in values.items() if isinstance(value, float)
    ]  # fmt: skip
    base = hub_id(str(manifest["base"].get("name")))
    return ModelCardData(
        base_model=base,
        base_model_relation=None if base is None else relation,
        library_name=library,
        pipeline_tag="text-classification",
        tags=["llmrec_peft", "recommendation", method],
        model_name=f"{name} ({method})",
        eval_results=results or None,
    )


def _card(manifest: Mapping[str, Any], data: Any, opening: str, use: str, merging: str) -> str:
    labels = _code([str(label) for label in manifest["labels"]])
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {_code(_name(manifest), bare=True)}: behaviour classifier",
        f"{opening} It reads what a user did, in order, and answers which of {labels} comes next.",
        "## Labels",
        _table(("class", "label", "word in the stream"), _label_rows(manifest)),
        "## Use",
        use,
        "## Stream",
        _stream(manifest),
        merging,
        "## Metrics",
        _metrics_text(manifest),
        "## Data",
        _data_text(manifest),
        "## Limits",
        _limits(manifest),
        "## Versions",
        _versions(manifest),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _label_rows(manifest: Mapping[str, Any]) -> Iterable[tuple[str, ...]]:
    for number, (label, word) in enumerate(zip(manifest["labels"], manifest["words"], strict=True)):
        yield str(number), _code(label), _code(word)


def _bundle_use(manifest: Mapping[str, Any]) -> str:
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
    dtype, packed = _dtype(manifest["model_options"]), method == "qlora"
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
    return f"{ours} PEFT alone {how}:\n\n{_python(lines + _answer(manifest))}"


def _four_bits(manifest: Mapping[str, Any]) -> list[str]:
    """Lines that hold the base in 4 bits as training did, and its head whole."""
    options = manifest["method_options"]
    dtype = _dtype({"dtype": options.get("compute_dtype") or manifest["model_options"].get("dtype")})
    return [
        "four_bits = BitsAndBytesConfig(",
        f"    load_in_4bit=True, bnb_4bit_quant_type={options.get('quant_type', 'nf4')!r},",
        f"    bnb_4bit_use_double_quant={options.get('double_quant', True)!r},",
        f"    bnb_4bit_compute_dtype=torch.{dtype},",
        f"    llm_int8_skip_modules={['lm_head', *HEAD_NAMES]!r},",
        ")",
    ]


def _merged_use(manifest: Mapping[str, Any]) -> str:
    lines = [
        "import torch",
        "from transformers import AutoModelForSequenceClassification, AutoTokenizer",
        "",
        f'tokenizer = AutoTokenizer.from_pretrained("{REPOSITORY}")',
        f'model = AutoModelForSequenceClassification.from_pretrained("{REPOSITORY}", dtype=torch.{_dtype(manifest)})',
    ]
    ours = (
        "`llmrec_peft.checkpoints.loading.load_trained` of a downloaded copy checks its files first, and keeps the "
        "head in float32."
    )
    return f"{_python(lines + _answer(manifest))}\n\n{ours}"


def _answer(manifest: Mapping[str, Any]) -> list[str]:
    """Lines that answer one event after another by `tokenizer` and `model`."""
    domain, calibration = manifest["domain"], manifest["calibration"] or {}
    texts = [str(domain.get(key) or "") for key in ("header", "event", "marker")]
    scale = f" / {float(calibration.get('temperature', 1.0))!r}"
    bias = calibration.get("bias")
    shift = "" if bias is None else f" + torch.tensor({[float(value) for value in bias]!r})"
    return [
        "",
        f"header, event, marker = {', '.join(map(repr, texts))}  # put values for what is in braces",
        f"pieces = [header, event, marker, {str(manifest['words'][-1])!r}, event, marker]",
        *_around(manifest["tokenizer"]),
        'inside = [token for piece in pieces for token in tokenizer(piece, add_special_tokens=False)["input_ids"]]',
        "with torch.no_grad():",
        "    logits = model(input_ids=torch.tensor([before + inside + behind])).logits[0].float()",
        f"probabilities = (logits{scale}{shift}).softmax(-1)  # {[str(label) for label in manifest['labels']]!r}",
    ]


def _around(tokenizer: Mapping[str, Any]) -> list[str]:
    """Lines that set the tokens before and behind a prompt; older manifests do not say them."""
    known = [tokenizer.get(key) for key in ("prefix", "suffix")]
    if all(isinstance(ids, list) and all(type(number) is int for number in ids) for ids in known):
        return [f"before, behind = {known[0]!r}, {known[1]!r}  # BOS, if there is one; CLS and SEP of an encoder"]
    return [
        'around = tokenizer("")["input_ids"]  # none, or BOS; CLS and SEP of an encoder',
        "before, behind = around[:1], around[1:]",
    ]


def _stream(manifest: Mapping[str, Any]) -> str:
    domain, stream = manifest["domain"], manifest["stream"]
    rows = [(key, _code(str(domain[key]))) for key in ("header", "event", "marker") if domain.get(key)]
    rows += [(_code(key, bare=True), _code(value)) for key, value in stream.items() if value is not None]
    if manifest["calibration"]:
        rows.append(("calibration", _code(manifest["calibration"])))
    text = (
        "The header, then each event's text, the marker and the word of what the user did. The last event ends at its "
        "marker, where the answer is read. Pieces are tokenised apart and joined. Titles and other values must be one "
        "line without the marker's text."
    )
    return f"{_table(('part', 'value'), rows)}\n\n{text}"


def _merging(manifest: Mapping[str, Any]) -> str:
    rows = [
        (_code(part.get("name")), _code(part["method"]), _code(part["weights_sha256"][:16]), _code(part["weight"]))
        for part in manifest["merged_from"]
    ]
    text = _table(("bundle", "method", "SHA-256 of its weights", "weight"), rows)
    if manifest["combination"]:
        text += f"\n\nCombined by {_code(manifest['combination'])}."
    measured = manifest["measured"]
    if measured:
        names = {"max_difference": "largest difference of a logit", "mean_difference": "mean difference of a logit",
                 "tolerance": "largest difference allowed", "answers": "answers compared", "streams": "of",
                 "auc_adapted": "AUC, adapter", "auc_merged": "AUC, merged",
                 "stock_prompts": "prompts compared in stock classes",
                 "stock_difference": "largest difference of a logit in stock classes",
                 "text_same_tokens": "of these prompts, tokenised whole to the same tokens",
                 "text_difference": "largest difference of a logit, prompts tokenised whole",
                 "text_mean_difference": "mean difference of a logit, prompts tokenised whole",
                 "text_left_difference": "the same, padded on the left"}  # fmt: skip
        found = [(names[key], _number(measured[key])) for key in names if measured.get(key) is not None]
        text += "\n\nAnswers of the adapter on its base and of these weights, compared before they were published:\n\n"
        text += _table(("measured", "value"), found)
        text += _through_text(measured)
    return f"## Merged from\n\n{text}"


def _through_text(measured: Mapping[str, Any]) -> str:
    """Differences of logits when a whole prompt is tokenised as one text."""
    names = ("stock_prompts", "text_same_tokens", "text_difference", "text_left_difference", "tolerance")
    found = [measured.get(name) for name in names]
    if not all(map(_is_number, found)):
        return ""
    count, same, whole, left, allowed = (value for value in found if value is not None)
    lines = []
    if same == count:
        lines.append("A whole prompt, `tokenizer(text)`, gives the same tokens as its pieces.")
    else:
        lines.append(
            f"A whole prompt, `tokenizer(text)`, gives other tokens than its pieces in {count - same} of {count} cases "
            f"and moves logits by up to {_number(whole)}; training saw pieces, so join them as above."
        )
    if left > max(whole, allowed):
        lines.append(f"Pad on the right: on the left, positions move, and logits by up to {_number(left)}.")
    return "\n\n" + " ".join(lines)


def _teaching(manifest: Mapping[str, Any]) -> str:
    teacher, loss = manifest["student"]["teacher"], manifest["student"]["loss"]
    rows = [(_code(key, bare=True), _code(value)) for key, value in loss.items()]
    if teacher is None:
        return f"## Loss\n\nNo teacher was asked.\n\n{_table(('term or setting', 'value'), rows)}"
    text = (
        f"Its teacher: {_code(teacher['method'], bare=True)} on {_code(teacher['base'])}, weights "
        f"{_code(teacher['weights'][:16], bare=True)}, which answered {teacher['targets']:,} training targets."
    )
    return f"## Teacher\n\n{text}\n\n{_table(('term or setting', 'value'), rows)}"


def _metrics(manifest: Mapping[str, Any]) -> dict[str, dict[str, float | int]]:
    """Finite numbers of each split that was measured."""
    found = {}
    for split in SPLITS:
        values = manifest["metrics"].get(split)
        if isinstance(values, Mapping):
            found[split] = {str(key): value for key, value in values.items() if _is_number(value)}
    return found


def _metrics_text(manifest: Mapping[str, Any]) -> str:
    metrics = _metrics(manifest)
    if not metrics:
        return "None were recorded."
    names = dict.fromkeys(name for values in metrics.values() for name in values)
    rows = [(_code(name, bare=True), *(_number(values.get(name)) for values in metrics.values())) for name in names]
    text = _table(("metric", *metrics), rows)
    if "valid" in metrics:
        text += "\n\n`valid` chose the checkpoint and fitted the calibration, so it is somewhat too good."
    if manifest.get("merged_from"):
        text += "\n\nMeasured with the adapter, before merging."
    return text


def _data_text(manifest: Mapping[str, Any]) -> str:
    counts = dict(manifest["counts"])
    split = counts.pop("split", None)
    tables = {key: value for key, value in counts.items() if isinstance(value, Mapping)}
    columns = list(dict.fromkeys(name for value in tables.values() for name in value))
    rows = [(_code(key, bare=True), *(_number(value.get(name)) for name in columns)) for key, value in tables.items()]
    parts = [_table(("split", *(_code(name, bare=True) for name in columns)), rows)] if rows else []
    parts += [f"- {_code(key, bare=True)}: {_number(value)}" for key, value in counts.items() if key not in tables]
    if isinstance(split, Mapping):
        moments = split.get("boundaries")
        told = f", at {_code(moments)} seconds of the log's clock" if moments else ""
        parts.append(f"Split by {_code(split.get('by'), bare=True)}{told}.")
    return "\n\n".join(parts) or "No counts were recorded."


def _limits(manifest: Mapping[str, Any]) -> str:
    base, stream = manifest["base"], manifest["stream"]
    lines = ["It knows what the log showed: items that users were not shown, and later tastes, are outside of it."]
    sizes = [stream.get(key) for key in ("context", "targets")]
    if all(isinstance(size, int) for size in sizes):
        most = sum(sizes) - 1
        lines.append(f"Training saw at most {most} events before an answer; a longer history was never tried.")
    source = str(base.get("source") or base.get("name"))
    if "merged_from" not in manifest and base.get("name") in BASES and not source.startswith("Hub "):
        lines.append(
            f"The base's weights came from {_code(source)}. Those on the Hub are rounded otherwise, so answers on them "
            "differ a little."
        )
    if not hub_id(str(base.get("name"))):
        lines.append(
            f"The base is no model of the Hub; its fingerprint is {_code(base.get('fingerprint'), bare=True)}."
        )
    if manifest.get("model_options", {}).get("trust_remote_code"):
        lines.append("The base brings code of its own: loading needs `trust_remote_code=True`.")
    return "\n".join(f"- {line}" for line in lines)


def _versions(manifest: Mapping[str, Any]) -> str:
    found = [_code(f"{key} {value}", bare=True) for key, value in manifest["versions"].items()]
    return f"Written with {', '.join(found)}." if found else "Not recorded."


def _base(manifest: Mapping[str, Any]) -> str:
    """A base as the card names it: its Hub id, or the last part of its path."""
    name = str(manifest["base"].get("name"))
    return _code(hub_id(name) or re.split(r"[/\\]", name.rstrip("/\\"))[-1], bare=True)


def _dtype(options: Mapping[str, Any]) -> str:
    """A number format that torch has by this name."""
    dtype = options.get("dtype")
    return dtype if dtype in ("float32", "bfloat16", "float16") else "float32"


def _name(manifest: Mapping[str, Any]) -> str:
    """The domain's name, if it has one."""
    return _line(manifest["domain"].get("name") or "") or "behaviour"


def _line(text: Any) -> str:
    """A text as one short line of what can be seen, for the YAML block."""
    text = "".join(sign if sign.isprintable() else " " for sign in str(text))
    return " ".join(text.split())[:80]


# -- Markdown ----------------------------------------------------------------------------------------


def _code(value: Any, *, bare: bool = False) -> str:
    """A value in code marks, as Python spells it; `bare` leaves the quotes of a text out."""
    text = repr(value)
    text = text[1:-1] if bare and isinstance(value, str) else text
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    pad = " " if text.startswith("`") or text.endswith("`") or not text else ""
    marks = "`" * (longest + 1)
    return f"{marks}{pad}{text or ' '}{pad}{marks}"


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines)


def _python(lines: Iterable[str]) -> str:
    return "\n".join(["```python", *lines, "```"])


def _number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e-3 else f"{value:.4f}"
    return "" if value is None else f"{value:,}" if _is_number(value) else _code(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
