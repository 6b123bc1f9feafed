"""Model cards: the README.md of a bundle, a merged model or a student, with metrics in the Hub's own format.

A card is made from the manifest alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from llmrec_peft.checkpoints.card_examples import bundle_example, dtype_of, merged_example
from llmrec_peft.checkpoints.card_markdown import code, is_number, number_text, one_line, table
from llmrec_peft.files import plain
from llmrec_peft.models.base import BASES, hub_id

CARD = "README.md"
SPLITS = ("valid", "test")
_METHODS = {
    "lora": "A LoRA adapter",
    "qlora": "A LoRA adapter, trained in 4 bits,",
    "adapter": "A bottleneck adapter",
    "head": "A classification head",
    "full": "All weights of a classifier",
}


def bundle_card(manifest: Mapping[str, Any]) -> str:
    """README.md of a bundle, from what its behavior.json holds: YAML for the Hub, then Markdown."""
    manifest = plain(manifest)
    method, base = manifest["method"], _base(manifest)
    library = "peft" if method in ("lora", "qlora") else "llmrec_peft"
    relation = "finetune" if method == "full" else "adapter"
    opening = f"{_METHODS[method]} on {base}."
    return _card(manifest, _data(manifest, library, method, relation), opening, bundle_example(manifest), "")


def merged_card(manifest: Mapping[str, Any]) -> str:
    """README.md of a merged model, from what its behavior.json holds: YAML for the Hub, then Markdown."""
    manifest = plain(manifest)
    several = len(manifest["merged_from"]) > 1
    data = _data(manifest, "transformers", "merged", "merge" if several else "finetune")
    opening = (
        f"A stock sequence classifier in {dtype_of(manifest)}: {_base(manifest)}, with what was trained in its weights."
    )
    return _card(manifest, data, opening, merged_example(manifest), _merging(manifest))


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
    return _card(manifest, data, opening, merged_example(manifest), _teaching(manifest))


# -- parts -------------------------------------------------------------------------------------------


def _data(manifest: Mapping[str, Any], library: str, method: str, relation: str) -> Any:
    """The card's YAML block."""
    from huggingface_hub import EvalResult, ModelCardData

    name = _name(manifest)
    kind = re.sub(r"\W+", "-", name).strip("-") or "behaviour"
    results = [
        EvalResult(
            task_type="text-classification", task_name="Behaviour classification", dataset_type=kind, dataset_name=name,
            dataset_split=split, metric_type=one_line(metric), metric_name=one_line(metric), metric_value=value,
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
    labels = code([str(label) for label in manifest["labels"]])
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {code(_name(manifest), bare=True)}: behaviour classifier",
        f"{opening} It reads what a user did, in order, and predicts which of {labels} comes next.",
        "## Labels",
        table(("class", "label", "word in the stream"), _label_rows(manifest)),
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
        yield str(number), code(label), code(word)


def _stream(manifest: Mapping[str, Any]) -> str:
    domain, stream = manifest["domain"], manifest["stream"]
    rows = [(key, code(str(domain[key]))) for key in ("header", "event", "marker") if domain.get(key)]
    rows += [(code(key, bare=True), code(value)) for key, value in stream.items() if value is not None]
    if manifest["calibration"]:
        rows.append(("calibration", code(manifest["calibration"])))
    text = (
        "The header, then each event's text, the marker and the word of what the user did. The last event ends at its "
        "marker, where the prediction is read. Pieces are tokenised apart and joined. Titles and other values must be "
        "one line without the marker's text."
    )
    return f"{table(('part', 'value'), rows)}\n\n{text}"


def _merging(manifest: Mapping[str, Any]) -> str:
    rows = [
        (code(part.get("name")), code(part["method"]), code(part["weights_sha256"][:16]), code(part["weight"]))
        for part in manifest["merged_from"]
    ]
    text = table(("bundle", "method", "SHA-256 of its weights", "weight"), rows)
    if manifest["combination"]:
        text += f"\n\nCombined by {code(manifest['combination'])}."
    measured = manifest["measured"]
    if measured:
        names = {"max_difference": "largest difference of a logit", "mean_difference": "mean difference of a logit",
                 "tolerance": "largest difference allowed", "answers": "predictions compared", "streams": "of",
                 "auc_adapted": "AUC, adapter", "auc_merged": "AUC, merged",
                 "stock_prompts": "prompts compared in stock classes",
                 "stock_difference": "largest difference of a logit in stock classes",
                 "text_same_tokens": "of these prompts, tokenised whole to the same tokens",
                 "text_difference": "largest difference of a logit, prompts tokenised whole",
                 "text_mean_difference": "mean difference of a logit, prompts tokenised whole",
                 "text_left_difference": "the same, padded on the left"}  # fmt: skip
        found = [(names[key], number_text(measured[key])) for key in names if measured.get(key) is not None]
        text += "\n\nPredictions of the adapter on its base and of these weights, compared before publishing:\n\n"
        text += table(("measured", "value"), found)
        text += _through_text(measured)
    return f"## Merged from\n\n{text}"


def _through_text(measured: Mapping[str, Any]) -> str:
    """Differences of logits when a whole prompt is tokenised as one text."""
    names = ("stock_prompts", "text_same_tokens", "text_difference", "text_left_difference", "tolerance")
    found = [measured.get(name) for name in names]
    if not all(map(is_number, found)):
        return ""
    count, same, whole, left, allowed = (value for value in found if value is not None)
    lines = []
    if same == count:
        lines.append("A whole prompt, `tokenizer(text)`, gives the same tokens as its pieces.")
    else:
        lines.append(
            f"A whole prompt, `tokenizer(text)`, gives other tokens than its pieces in {count - same} of {count} cases "
            f"and moves logits by up to {number_text(whole)}; training saw pieces, so join them as above."
        )
    if left > max(whole, allowed):
        lines.append(f"Pad on the right: on the left, positions move, and logits by up to {number_text(left)}.")
    return "\n\n" + " ".join(lines)


def _teaching(manifest: Mapping[str, Any]) -> str:
    teacher, loss = manifest["student"]["teacher"], manifest["student"]["loss"]
    rows = [(code(key, bare=True), code(value)) for key, value in loss.items()]
    if teacher is None:
        return f"## Loss\n\nTrained without a teacher.\n\n{table(('term or setting', 'value'), rows)}"
    text = (
        f"Its teacher: {code(teacher['method'], bare=True)} on {code(teacher['base'])}, weights "
        f"{code(teacher['weights'][:16], bare=True)}, which predicted {teacher['targets']:,} training targets."
    )
    return f"## Teacher\n\n{text}\n\n{table(('term or setting', 'value'), rows)}"


def _metrics(manifest: Mapping[str, Any]) -> dict[str, dict[str, float | int]]:
    """Finite numbers of each split that was measured."""
    found = {}
    for split in SPLITS:
        values = manifest["metrics"].get(split)
        if isinstance(values, Mapping):
            found[split] = {str(key): value for key, value in values.items() if is_number(value)}
    return found


def _metrics_text(manifest: Mapping[str, Any]) -> str:
    metrics = _metrics(manifest)
    if not metrics:
        return "None were recorded."
    names = dict.fromkeys(name for values in metrics.values() for name in values)
    rows = [(code(name, bare=True), *(number_text(values.get(name)) for values in metrics.values())) for name in names]
    text = table(("metric", *metrics), rows)
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
    rows = [
        (code(key, bare=True), *(number_text(value.get(name)) for name in columns)) for key, value in tables.items()
    ]
    parts = [table(("split", *(code(name, bare=True) for name in columns)), rows)] if rows else []
    parts += [f"- {code(key, bare=True)}: {number_text(value)}" for key, value in counts.items() if key not in tables]
    if isinstance(split, Mapping):
        moments = split.get("boundaries")
        told = f", at {code(moments)} seconds of the log's clock" if moments else ""
        parts.append(f"Split by {code(split.get('by'), bare=True)}{told}.")
    return "\n\n".join(parts) or "No counts were recorded."


def _limits(manifest: Mapping[str, Any]) -> str:
    base, stream = manifest["base"], manifest["stream"]
    lines = ["It knows what the log showed: items that users were not shown, and later tastes, are outside of it."]
    sizes = [stream.get(key) for key in ("context", "targets")]
    if all(isinstance(size, int) for size in sizes):
        most = sum(sizes) - 1
        lines.append(f"Training saw at most {most} events before a prediction; a longer history was never tried.")
    source = str(base.get("source") or base.get("name"))
    if "merged_from" not in manifest and base.get("name") in BASES and not source.startswith("Hub "):
        lines.append(
            f"The base's weights came from {code(source)}. Those on the Hub are rounded otherwise, so predictions "
            "on them differ a little."
        )
    if not hub_id(str(base.get("name"))):
        lines.append(f"The base is not on the Hub; its fingerprint is {code(base.get('fingerprint'), bare=True)}.")
    if manifest.get("model_options", {}).get("trust_remote_code"):
        lines.append("The base brings code of its own: loading needs `trust_remote_code=True`.")
    return "\n".join(f"- {line}" for line in lines)


def _versions(manifest: Mapping[str, Any]) -> str:
    found = [code(f"{key} {value}", bare=True) for key, value in manifest["versions"].items()]
    return f"Written with {', '.join(found)}." if found else "Not recorded."


def _base(manifest: Mapping[str, Any]) -> str:
    """A base as the card names it: its Hub id, or the last part of its path."""
    name = str(manifest["base"].get("name"))
    return code(hub_id(name) or re.split(r"[/\\]", name.rstrip("/\\"))[-1], bare=True)


def _name(manifest: Mapping[str, Any]) -> str:
    """The domain's name, if it has one."""
    return one_line(manifest["domain"].get("name") or "") or "behaviour"
