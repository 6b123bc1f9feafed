"""Launch configurations that a recipe cannot have are refused before anything is read or written."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import PartialState
from accelerate.utils.deepspeed import HfDeepSpeedConfig

from llmrec_peft.config.schema import LoraConfig, QloraConfig, read_config
from llmrec_peft.errors import ConfigError, ModelError
from llmrec_peft.models.quantization import check_quantization
from llmrec_peft.runs.launch_checks import check_launch
from llmrec_peft.runs.settings import shared_settings
from tests.conftest import ROOT


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        (
            {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_USE_CPU": "true"},
            ("ACCELERATE_USE_CPU", "DeepSpeed", "DS_ACCELERATOR=cpu"),
        ),
        ({"ACCELERATE_USE_FSDP": "true"}, ("FSDP", "GPU")),
    ],
)
def test_what_accelerate_would_leave_out_is_refused(variables, named, recipe, arguments, tmp_path, monkeypatch, capfd):
    """The variables are those that `accelerate launch` sets; the slow test below starts it."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(PartialState, "_shared_state", {})
    with pytest.raises(SystemExit) as stopped:
        recipe("lora")(arguments("lora", tmp_path / "out"))
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert stopped.value.code == 2 and len(said) == 1 and all(word in said[0] for word in named), said
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.launch
@pytest.mark.parametrize(
    ("name", "variables", "named"),
    [
        ("zero1", {"ACCELERATE_USE_CPU": "true"}, ("ACCELERATE_USE_CPU", "DeepSpeed", "DS_ACCELERATOR=cpu")),
        ("fsdp2", {}, ("FSDP", "GPU")),
    ],
)
def test_a_launch_is_refused_by_its_configuration(name, variables, named, arguments, tmp_path):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1"]
    command += ["--config_file", f"accelerate_configs/{name}.yaml", "recipes/lora.py"]
    done = subprocess.run(
        command + arguments("lora", tmp_path / "out"),
        env={**os.environ, **variables, "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and all(word in said[0] for word in named), done.stderr[-2000:]
    assert not (tmp_path / "out").exists()


def launch_with(stage: int, **sections) -> SimpleNamespace:
    """Arguments of Trainer as a DeepSpeed launch makes them."""
    settings = HfDeepSpeedConfig({"zero_optimization": {"stage": stage}, **sections})
    return SimpleNamespace(
        deepspeed_plugin=SimpleNamespace(zero_stage=stage, hf_ds_config=settings), device=torch.device("cpu")
    )


def config_of(method: str, arguments, *flags: str):
    kind = {"lora": LoraConfig, "qlora": QloraConfig}[method]
    return read_config(kind, [*arguments(method, Path("out")), *flags])


@pytest.mark.parametrize("section", ["bf16", "fp16"])
def test_deepspeeds_own_half_precision_is_refused(section, arguments):
    config = config_of("lora", arguments)
    check_launch(config, launch_with(2, **{section: {"enabled": False}}, torch_autocast={"enabled": True}))
    with pytest.raises(ConfigError, match=f"{section}.enabled .* torch_autocast"):
        check_launch(config, launch_with(2, **{section: {"enabled": True}}))


def test_four_bits_go_with_zero_2_and_not_with_3(arguments):
    config = config_of("qlora", arguments)
    check_launch(config, launch_with(2))
    with pytest.raises(ConfigError, match="qlora .* ZeRO-3"):
        check_launch(config, launch_with(3))


@pytest.mark.parametrize(
    ("flags", "refused"),
    [
        ([], True),
        (["--method.quant_storage=float32"], False),
        (["--method.quant_storage=float32", "--model.dtype=bfloat16"], True),
        (["--method.quant_storage=bfloat16", "--model.dtype=bfloat16"], False),
    ],
)
def test_four_bits_under_fsdp_are_stored_in_the_models_format(flags, refused, arguments, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setattr("llmrec_peft.runs.launch_checks.on_cpu", lambda: False)
    plain = SimpleNamespace(deepspeed_plugin=None, device=torch.device("cpu"))
    if refused:
        with pytest.raises(ConfigError, match="method.quant_storage must equal model.dtype"):
            check_launch(config_of("qlora", arguments, *flags), plain)
    else:
        check_launch(config_of("qlora", arguments, *flags), plain)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, whose kernels are there")
def test_a_device_without_kernels_is_named():
    check_quantization("nf4", torch.device("cpu"))
    with pytest.raises(ModelError, match="cannot quantise to nf4 on cuda .*method lora"):
        check_quantization("nf4", torch.device("cuda"))


def test_where_the_log_lies_may_differ_between_processes(arguments):
    facts = shared_settings(config_of("lora", arguments))
    assert shared_settings(config_of("lora", arguments, "--data.path=elsewhere")) == facts
    assert shared_settings(config_of("lora", arguments, "--train.seed=8")) != facts
    assert "the version of torch" in facts and "train.seed" in facts
