"""Every launch configuration is what its name says, by accelerate's own reading and DeepSpeed's own classes."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands import launch
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env, prepare_simple_launcher_cmd_env
from torch.distributed.fsdp import CPUOffloadPolicy

from llmrec_peft.runs.settings import flatten
from tests.conftest import ROOT
from tests.recipes.conftest import launch_command, opening_comment

LAUNCHERS = sorted((ROOT / "accelerate_configs").rglob("*.yaml"))
DEEPSPEED = sorted((ROOT / "ds_configs").rglob("*.json"))
CONTENT = {path: yaml.safe_load(path.read_text("utf-8")) for path in LAUNCHERS}
ZERO = {
    # accelerate's file: (DeepSpeed's file, ZeRO stage, where weights go, where optimiser states go)
    "zero1": ("zero1", 1, None, None),
    "zero2": ("zero2", 2, None, None),
    "zero3": ("zero3", 3, None, None),
    "zero3_bf16": ("zero3_bf16", 3, None, None),
    "zero3_offload": ("zero3_cpu_offload", 3, "cpu", "cpu"),
    "zero3_nvme_offload": ("zero3_nvme_offload", 3, "nvme", "cpu"),
    "multi_node_zero3": ("zero3", 3, None, None),
}
WORLDS = {
    # accelerate's file: (what it starts, machines, processes)
    "single_cpu": ("one process", 1, 1),
    "single_gpu": ("one process", 1, 1),
    "two_cpu": ("torchrun", 1, 2),
    "ddp": ("torchrun", 1, 8),
    "multi_node_ddp": ("torchrun", 2, 16),
    "fsdp2": ("torchrun", 1, 8),
    "fsdp2_qlora": ("torchrun", 1, 8),
    **{name: ("DeepSpeed", 2 if name.startswith("multi_node") else 1, 16 if name.startswith("multi_node") else 8)
       for name in ZERO},
}  # fmt: skip
# What DeepSpeed and the trainer fill in: `auto` by the key's path, for a model of width 64 and a batch of 4 a process.
AUTO = {
    "train_batch_size": 4,
    "train_micro_batch_size_per_gpu": 4,
    "gradient_accumulation_steps": 1,
    "gradient_clipping": 0.5,
    "bf16.enabled": False,
    "zero_optimization.reduce_bucket_size": 64 * 64,
    "zero_optimization.stage3_prefetch_bucket_size": int(0.9 * 64 * 64),
    "zero_optimization.stage3_param_persistence_threshold": 10 * 64,
}


def named(paths: list[Path]):
    return [pytest.param(path, id=path.stem) for path in paths]


def zero_launchers():
    return named([path for path in LAUNCHERS if "deepspeed_config" in CONTENT[path]])


def launched(path: Path, monkeypatch, *flags: str):
    """What `accelerate launch` makes of a file's own command, up to where it would start processes.

    Of many machines this is the second: accelerate looks on the first alone whether the port is free.
    """
    monkeypatch.chdir(ROOT)
    words = launch_command(opening_comment(path))
    if "--machine_rank" in words:
        words[words.index("--machine_rank") + 1] = "1"
    args = launch.launch_command_parser().parse_args([*flags, *words])
    args, defaults, precision_from_file = launch._validate_launch_command(args)
    if args.use_deepspeed:
        given = list(defaults.deepspeed_config) + ["mixed_precision"] * precision_from_file
        args.deepspeed_fields_from_accelerate_config = ",".join(given)
        return args, "DeepSpeed", prepare_deepspeed_cmd_env(args)[1]
    if args.use_fsdp or args.multi_gpu:
        return args, "torchrun", prepare_multi_gpu_env(args)
    command, environment = prepare_simple_launcher_cmd_env(args)
    assert command[0] == sys.executable
    return args, "one process", environment


def test_there_are_files_to_check():
    assert {path.stem for path in LAUNCHERS} == set(WORLDS)
    assert {path.stem for path in DEEPSPEED} == {names[0] for names in ZERO.values()}


@pytest.mark.parametrize("path", named(LAUNCHERS))
def test_no_key_is_unknown(path):
    parser = launch.launch_command_parser()
    options = {action.dest for action in parser._actions}
    content = CONTENT[path]
    assert content.keys() <= {field.name for field in fields(ClusterConfig)}
    assert content.get("fsdp_config", {}).keys() <= {name for name in options if name.startswith("fsdp_")}
    deepspeed = next(group for group in parser._action_groups if group.title == "DeepSpeed Arguments")
    assert content.get("deepspeed_config", {}).keys() <= {action.dest for action in deepspeed._group_actions}
    # A flag that has a value of its own passes over the file's (same_network, rdzv_backend, downcast_bf16).
    deaf = {action.dest for action in parser._actions if action.default is not None}
    assert not content.keys() & deaf


@pytest.mark.parametrize("path", named(LAUNCHERS))
def test_the_command_starts_the_processes_of_its_name(path, monkeypatch):
    config = load_config_from_file(str(path))
    args, how, environment = launched(path, monkeypatch)
    _, machines, processes = WORLDS[path.stem]
    assert (how, args.num_machines, args.num_processes) == WORLDS[path.stem]
    assert (config.num_machines, config.num_processes) == (machines, processes)
    assert environment["ACCELERATE_MIXED_PRECISION"] == "no"
    if how == "one process":
        assert environment["ACCELERATE_USE_CPU"] == str(path.stem == "single_cpu")
    else:
        assert int(args.nproc_per_node) == processes // machines


@pytest.mark.parametrize("path", named([path for path in LAUNCHERS if path.stem != "single_cpu"]))
def test_bf16_is_a_flag_that_every_file_takes(path, monkeypatch):
    _, _, environment = launched(path, monkeypatch, "--mixed_precision", "bf16")
    assert environment["ACCELERATE_MIXED_PRECISION"] == "bf16"
    assert "mixed_precision" not in environment.get("ACCELERATE_CONFIG_DS_FIELDS", "")


@pytest.mark.parametrize("path", named([path for path in LAUNCHERS if path.stem.startswith("multi_node")]))
def test_a_command_for_many_machines_names_rank_address_and_port(path, monkeypatch):
    args, _, _ = launched(path, monkeypatch)
    # What torchrun reads; DeepSpeed's own launchers, which need ssh to every machine, are not used.
    assert (args.nnodes, args.node_rank, args.rdzv_backend, args.rdzv_endpoint) == ("2", 1, "static", "HOST:29500")


@pytest.mark.parametrize("path", named([path for path in LAUNCHERS if "gpu" in path.stem or "cpu" not in path.stem]))
def test_untested_configurations_are_marked(path):
    comment = " ".join(
        line.removeprefix("#").strip() for line in path.read_text("utf-8").split("\ncompute_")[0].split("\n")
    )
    assert "Never run on a GPU" in comment or "Never run by us, neither on a GPU nor on a CPU" in comment


@pytest.mark.parametrize("path", named([path for path in LAUNCHERS if CONTENT[path].get("fsdp_config")]))
def test_fsdp_is_version_2_with_whole_tensors_in_checkpoints(path, monkeypatch):
    """The plugin of the environment that accelerate sets, as the trainer builds it."""
    _, _, environment = launched(path, monkeypatch)
    for name, value in environment.items():
        if name.startswith(("FSDP_", "ACCELERATE_")):
            monkeypatch.setenv(name, value)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2 and plugin.state_dict_type.name == "FULL_STATE_DICT"
    assert plugin.transformer_cls_names_to_wrap is None  # the classifier names the classes of its base's layers
    assert plugin.reshard_after_forward is True and not isinstance(plugin.cpu_offload, CPUOffloadPolicy)
    assert not plugin.cpu_ram_efficient_loading and not plugin.activation_checkpointing


def test_a_shared_4_bit_base_is_stored_in_the_type_that_it_computes_in():
    words = launch_command(opening_comment(ROOT / "accelerate_configs" / "fsdp2_qlora.yaml"))
    for flag in ("--model.dtype", "--method.compute_dtype", "--method.quant_storage"):
        assert words[words.index(flag) + 1] == "bfloat16"


# -- DeepSpeed -----------------------------------------------------------------------------------


def test_every_deepspeed_file_is_named_by_a_launcher():
    used = {CONTENT[path]["deepspeed_config"]["deepspeed_config_file"] for path in LAUNCHERS if "zero" in path.stem}
    assert used == {path.relative_to(ROOT).as_posix() for path in DEEPSPEED}


@pytest.mark.parametrize("path", zero_launchers())
def test_launcher_and_deepspeed_file_set_nothing_twice(path):
    """Accelerate refuses some of these pairs, and passes over others in silence."""
    ours = CONTENT[path]["deepspeed_config"]
    assert ours["deepspeed_config_file"] == f"ds_configs/{ZERO[path.stem][0]}.json"
    assert ours.keys() <= {"deepspeed_config_file", "deepspeed_multinode_launcher"}
    assert "mixed_precision" not in CONTENT[path]
    theirs = json.loads((ROOT / ours["deepspeed_config_file"]).read_text("utf-8"), object_pairs_hook=once)
    assert not {"optimizer", "scheduler"} & theirs.keys()  # the Trainer makes them


def once(pairs: list[tuple]) -> dict:
    """An object of JSON whose keys differ."""
    assert len({key for key, _ in pairs}) == len(pairs), pairs
    return dict(pairs)


@pytest.fixture
def deepspeed():
    """Its tests are left out where it is not installed."""
    return pytest.importorskip("deepspeed")


@pytest.fixture
def plugin_of(deepspeed, monkeypatch):
    """`plugin_of(path, *flags)`: accelerate's plugin from the environment that a launcher's command sets."""
    from accelerate.utils import DeepSpeedPlugin

    def factory(path: Path, *flags: str):
        _, _, environment = launched(path, monkeypatch, *flags)
        for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
            monkeypatch.delenv(name)
        for name, value in environment.items():
            if name.startswith("ACCELERATE_"):
                monkeypatch.setenv(name, value)
        return DeepSpeedPlugin()

    return factory


@pytest.mark.parametrize("path", zero_launchers())
def test_accelerates_plugin_has_the_stage_of_its_name(path, plugin_of):
    plugin = plugin_of(path)
    _, stage, weights, states = ZERO[path.stem]
    assert plugin.zero_stage == stage
    assert (plugin.offload_param_device, plugin.offload_optimizer_device) == (weights or "none", states or "none")
    assert plugin.hf_ds_config.is_offload() == (weights is not None)
    assert plugin.zero3_save_16bit_model is False


@pytest.mark.parametrize(("flags", "enabled"), [((), False), (("--mixed_precision", "bf16"), True)])
@pytest.mark.parametrize("path", zero_launchers())
def test_one_deepspeed_file_serves_fp32_and_bf16(path, flags, enabled, plugin_of):
    plugin = plugin_of(path, *flags)
    plugin.set_mixed_precision(os.environ["ACCELERATE_MIXED_PRECISION"])
    assert plugin.deepspeed_config["bf16"]["enabled"] is enabled
    assert plugin.deepspeed_config["fp16"]["enabled"] is False


@pytest.mark.parametrize("path", named(DEEPSPEED))
def test_deepspeeds_own_class_takes_the_file(path, deepspeed):
    from accelerate.utils.deepspeed import HfDeepSpeedConfig
    from deepspeed.runtime.config import DeepSpeedConfig

    filled = HfDeepSpeedConfig(str(path))
    autos = {name for name, value in flatten(filled.config).items() if value == "auto"}
    assert autos <= AUTO.keys()
    for name in autos:
        node, key = filled.find_config_node(name)
        node[key] = AUTO[name]
    config = DeepSpeedConfig(filled.config)
    stage, weights, states = next(rest for name, *rest in ZERO.values() if name == path.stem)
    assert int(config.zero_config.stage) == stage
    for place, device in ((config.zero_config.offload_param, weights), (config.zero_config.offload_optimizer, states)):
        assert (place.device if place else None) == device
    assert config.gradient_clipping == 0.5 and config.train_batch_size == 4
    # Its bf16 mode would round the head and the adapters; torch_autocast leaves the weights as they are.
    assert not config.bfloat16_config.enabled and not config.float16_config.enabled
    expected = (True, torch.bfloat16) if path.stem.endswith("_bf16") else (False, None)
    assert (config.torch_autocast_enabled, config.torch_autocast_dtype) == expected
    # Its default of 5e8 elements would hold 2 GB in fp32 for gradients of an adapter.
    assert config.zero_config.reduce_bucket_size == 64 * 64
    assert config.zero_allow_untested_optimizer and not config.zero_config.gather_16bit_weights_on_model_save
    # Otherwise DeepSpeed's Adam takes the place of any optimiser, SGD as well.
    assert states is None or config.zero_force_ds_cpu_optimizer is False


@pytest.mark.parametrize("path", named(DEEPSPEED))
def test_deepspeed_knows_every_key(path, deepspeed):
    """The top level is read key by key, by names in a module of constants; the sections are classes with fields."""
    from deepspeed.runtime import constants
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadOptimizerConfig as States
    from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadParamConfig as Weights

    content = json.loads(path.read_text("utf-8"))
    top = {value for name, value in vars(constants).items() if name.isupper() and isinstance(value, str)}
    assert content.keys() - {"zero_optimization"} <= top
    zero = content["zero_optimization"]
    assert zero.keys() <= names(DeepSpeedZeroConfig)
    assert content.get("bf16", {}).keys() <= names(DeepSpeedBF16Config)
    assert content.get("torch_autocast", {}).keys() <= top
    assert zero.get("offload_param", {}).keys() <= names(Weights)
    assert zero.get("offload_optimizer", {}).keys() <= names(States)


def names(kind) -> set[str]:
    """Keys that a configuration class reads: its fields by their aliases, without those that it calls deprecated."""
    return {
        field.alias or name
        for name, field in kind.model_fields.items()
        if not (field.json_schema_extra or {}).get("deprecated")
    }
