"""Merging a bundle, or several, and what is printed of it."""

from pathlib import Path
from typing import Any

from llmrec_peft.checkpoints.manifest_schema import MANIFEST
from llmrec_peft.checkpoints.output_directory import check_output
from llmrec_peft.config.schema import DataConfig, MergeConfig
from llmrec_peft.data.domain import Domain
from llmrec_peft.errors import ConfigError
from llmrec_peft.merging.merging import merge_bundle, mergeable
from llmrec_peft.merging.weighted import combine_bundles
from llmrec_peft.models.base import load_tokenizer, resolve_base
from llmrec_peft.runs import output_paths as places
from llmrec_peft.runs.split_streams import check_split, read_log, split_of, streams_of
from llmrec_peft.training.distributed import distributed_session


def merge(config: MergeConfig) -> dict[str, Any]:
    """Write a merged model and print how far its answers are from its bundle's.

    Returns:
        What `merge_bundle` measured.

    Raises:
        LLMRecError: with one line on what cannot be merged.
    """
    with distributed_session() as state:
        if state.num_processes > 1:
            raise ConfigError(f"merging takes one process, not {state.num_processes}; launch it with --num_processes 1")
        return _merge(config)


def _merge(config: MergeConfig) -> dict[str, Any]:
    many = isinstance(config.bundle, list)
    bundles = config.bundle if many else [config.bundle]
    first = mergeable(bundles[0])
    places.check_place(Path(config.output_dir))
    check_output(config.output_dir, *bundles)
    inputs = {f"bundle {number}" if many else "bundle": path for number, path in enumerate(bundles)}
    inputs |= {"data.path": config.data.path, "base": config.base}
    places.check_output(config.output_dir, inputs, own=lambda path: path == Path(config.output_dir))
    settings = {
        "dtype": config.dtype,
        "base": config.base,
        "streams": None if config.data.path is None else _streams(config, bundles[0], first),
        "tolerance": config.tolerance,
        "max_shard_size": config.max_shard_size,
        "batch_tokens": config.batch_tokens,
        "trust_remote_code": config.trust_remote_code,
    }
    print(f"merging {', '.join(bundles)}", flush=True)
    if many:
        found = combine_bundles(
            bundles, config.weights, config.output_dir, combination=config.combination, density=config.density,
            **settings,
        )  # fmt: skip
    else:
        found = merge_bundle(bundles[0], config.output_dir, **settings)
    _print(found, Path(config.output_dir))
    return found


def _streams(config: MergeConfig, bundle: str, manifest: dict[str, Any]):
    """Streams of the log's split, by the first bundle's domain."""
    domain = Domain.of_manifest(manifest["domain"], source=f"{bundle}/{MANIFEST}")
    print(f"reading {config.data.path}", flush=True)
    data = DataConfig(path=config.data.path, format=config.data.format, null_times=config.data.null_times)
    splits = split_of(read_log(data), domain)
    check_split(splits, config.split, manifest["counts"].get("split"))
    options = manifest["model_options"]
    base = resolve_base(config.base) if config.base else resolve_base(options["base"], options.get("gguf_file"))
    tokenizer = load_tokenizer(base, trust_remote_code=config.trust_remote_code)
    return streams_of(splits, config.split, domain, tokenizer).limited(config.limit)


def _print(found: dict[str, Any], directory: Path) -> None:
    on = "made-up samples" if found["streams"] == "samples" else found["streams"]
    print(f"{found['answers']:,} answers on {on}; adapted and merged differ by")
    print(f"  {found['max_difference']:.3g} in a logit at most (tolerance {found['tolerance']:.3g})")
    print(f"  {found['mean_difference']:.3g} in the mean; the logits' standard deviation is {found['spread']:.3g}")
    if found["auc_adapted"] is not None and found["auc_merged"] is not None:
        print(f"  AUC {found['auc_adapted']:.6f} adapted, {found['auc_merged']:.6f} merged")
    _print_stock(found)
    print(f"{found['bytes'] / 1e9:.2f} GB in {found['dtype']}, {found['seconds']:.0f} s; written to {directory}")


def _print_stock(found: dict[str, Any]) -> None:
    """What stock classes answer, where `found` says so."""
    count, same = found["stock_prompts"], found["text_same_tokens"]
    print(f"{count} prompts in stock classes: {found['stock_difference']:.3g} in a logit at most on the same tokens")
    if same is None:
        return
    print(f"  {found['text_difference']:.3g} where whole texts are tokenised; {same} of {count} give the same tokens")
    if found["text_left_difference"] > max(found["text_difference"], found["tolerance"]):
        print(f"  {found['text_left_difference']:.3g} where they are padded on the left: pad on the right")
