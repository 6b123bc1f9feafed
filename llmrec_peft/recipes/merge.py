"""Merging a bundle, or several, into a stock checkpoint."""

from pathlib import Path
from typing import Any

from llmrec_peft.checkpoints.manifest_schema import MANIFEST
from llmrec_peft.checkpoints.output_directory import check_output
from llmrec_peft.config.schema import DataConfig, MergeConfig
from llmrec_peft.data.domain import Domain
from llmrec_peft.data.streams import Streams
from llmrec_peft.errors import ConfigError
from llmrec_peft.merging.merge_bundle import MergeOptions, merge_bundle, mergeable
from llmrec_peft.merging.weighted_merge import combine_bundles
from llmrec_peft.models.base import load_tokenizer, resolve_base
from llmrec_peft.runs.output_paths import check_output_directory, check_writable
from llmrec_peft.runs.split_streams import check_split, read_log, split_by_domain, streams_for_split
from llmrec_peft.training.distributed import distributed_session


def merge(config: MergeConfig) -> dict[str, Any]:
    """Write a merged model and print how far its predictions are from those of its bundle.

    Returns:
        What `merge_bundle` measured.

    Raises:
        LLMRecError: with one line on what cannot be merged.
    """
    with distributed_session() as state:
        # Settings.
        if state.num_processes > 1:
            raise ConfigError(f"merging takes one process, not {state.num_processes}; launch it with --num_processes 1")
        out = Path(config.output_dir)
        many = isinstance(config.bundle, list)
        bundles = config.bundle if isinstance(config.bundle, list) else [config.bundle]
        manifest = mergeable(bundles[0])
        check_writable(out)
        check_output(out, *bundles)
        inputs = {f"bundle {number}" if many else "bundle": path for number, path in enumerate(bundles)}
        check_output_directory(
            out, inputs | {"data.path": config.data.path, "base": config.base}, own=lambda path: path == out
        )  # fmt: skip

        # Streams of the log that is measured on; without one, the merge is measured on synthetic inputs.
        streams = None if config.data.path is None else _streams(config, config.data.path, bundles[0], manifest)

        # Merge, measure and save.
        options = MergeOptions(
            dtype=config.dtype,
            base=config.base,
            streams=streams,
            tolerance=config.tolerance,
            max_shard_size=config.max_shard_size,
            batch_tokens=config.batch_tokens,
            trust_remote_code=config.trust_remote_code,
        )
        print(f"merging {', '.join(bundles)}", flush=True)
        if many:
            found = combine_bundles(
                bundles, config.weights or [], out, options, combination=config.combination, density=config.density
            )
        else:
            found = merge_bundle(bundles[0], out, options)

        # Report.
        _print(found, out)
        return found


def _streams(
    config: MergeConfig, path: str, bundle: str, manifest: dict[str, Any]
) -> Streams:  # fmt: skip
    """Streams of the log's split, by the first bundle's domain."""
    domain = Domain.of_manifest(manifest["domain"], source=f"{bundle}/{MANIFEST}")
    print(f"reading {path}", flush=True)
    data = DataConfig(path=path, format=config.data.format, null_times=config.data.null_times)
    splits = split_by_domain(read_log(data), domain)
    check_split(splits, config.split, manifest["counts"].get("split"))
    options = manifest["model_options"]
    base = resolve_base(config.base) if config.base else resolve_base(options["base"], options.get("gguf_file"))
    tokenizer = load_tokenizer(base, trust_remote_code=config.trust_remote_code)
    return streams_for_split(splits, config.split, domain, tokenizer).limited(config.limit)


def _print(found: dict[str, Any], directory: Path) -> None:
    on = "synthetic inputs" if found["streams"] == "samples" else found["streams"]
    print(f"{found['answers']:,} predictions on {on}, adapted and merged model:")
    print(f"  largest difference of a logit {found['max_difference']:.3g} (tolerance {found['tolerance']:.3g})")
    print(f"  mean difference {found['mean_difference']:.3g}; standard deviation of the logits {found['spread']:.3g}")
    if found["auc_adapted"] is not None and found["auc_merged"] is not None:
        print(f"  AUC {found['auc_adapted']:.6f} adapted, {found['auc_merged']:.6f} merged")
    _print_stock(found)
    print(f"{found['bytes'] / 1e9:.2f} GB in {found['dtype']}, {found['seconds']:.0f} s; written to {directory}")


def _print_stock(found: dict[str, Any]) -> None:
    """Print the differences between stock Transformers classes and this package."""
    count, same = found["stock_prompts"], found["text_same_tokens"]
    print(f"{count} prompts in stock Transformers classes, merged model and this package:")
    print(f"  largest difference of a logit {found['stock_difference']:.3g} on the same tokens")
    if same is None:
        return
    print(f"  {found['text_difference']:.3g} on prompts tokenized as one text; {same} of {count} have the same tokens")
    if found["text_left_difference"] > max(found["text_difference"], found["tolerance"]):
        print(f"  {found['text_left_difference']:.3g} with left padding: use right padding")
