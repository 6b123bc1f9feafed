"""What the recipe tests share: the recipes themselves, a small log on disk, and one tiny run of each method."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tests.conftest import ROOT

CONFIGS = ROOT / "recipes" / "configs"


def launch_command(text: str) -> list[str]:
    """The words of the first launch command of a text, its lines joined; without `accelerate launch`."""
    lines = iter(re.sub(r"^#[ ]?", "", line) for line in text.splitlines())
    for line in lines:
        if "accelerate launch " in line:
            command = line[line.index("accelerate launch ") :].strip()
            while command.endswith("\\"):
                command = command[:-1] + next(lines).strip()
            return shlex.split(command)[2:]
    raise AssertionError(f"no launch command in {text[:200]!r}")


def opening_comment(path: Path) -> str:
    text = path.read_text("utf-8")
    assert text.startswith("#"), f"{path} must open with its launch command"
    return text[: re.search(r"^(?!#)", text, re.MULTILINE).start()]


def load_recipe(name: str) -> ModuleType:
    """Import `recipes/NAME.py`, which is a script and in no package."""
    spec = importlib.util.spec_from_file_location(f"recipe_{name}", ROOT / "recipes" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def recipe() -> Callable[[str], Callable[[list[str]], None]]:
    """`recipe("lora")`: the recipe's `main`, to be called with a list of arguments."""
    return lambda name: load_recipe(name).main


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a simulated log of 24 users; read-only."""
    from llmrec_peft.data.simulate import write_simulated_shop

    return write_simulated_shop(tmp_path_factory.mktemp("log"), users=24, items=30, sessions=3)


@pytest.fixture(scope="session")
def arguments(data, tiny_base) -> Callable[[str, Path], list[str]]:
    """`arguments("lora", out)`: a run of the shipped configuration, made tiny, on the log of `data`."""

    def make(method: str, out: Path) -> list[str]:
        domain = {"context": 3, "targets": 6, "max_length": 512}
        train = {"max_steps": 4, "batch_size": 4, "micro_tokens": 600, "logging_steps": 1, "eval_steps": 2}
        evaluation = {"valid_targets": "null", "test_targets": "null", "bootstrap": 50}
        flags = {
            "data.path": data,
            "model.base": tiny_base("llama"),
            "output_dir": out,
            **{f"domain.stream.{key}": value for key, value in domain.items()},
            **{f"train.{key}": value for key, value in train.items()},
            **{f"evaluation.{key}": value for key, value in evaluation.items()},
        }
        files = ["--config", str(CONFIGS / "movies" / f"{method}.yaml")]
        files += ["--domain", str(CONFIGS / "shop" / "domain.yaml")]
        return files + [f"--{key}={value}" for key, value in flags.items()]

    return make


@pytest.fixture(scope="session")
def trained(recipe, arguments, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Path]]:
    """`trained("lora")`: the output directory of a tiny run of that recipe; read-only."""
    kept = os.environ.get("TENSORBOARD_LOGGING_DIR")
    made: dict[str, Path] = {}

    def factory(method: str) -> Path:
        if method not in made:
            out = tmp_path_factory.mktemp("run") / method
            # Answers are the same to the bit on the same number of threads alone, and which test asks first varies.
            threads = torch.get_num_threads()
            torch.set_num_threads(1)
            try:
                recipe(method)(arguments(method, out))
            finally:
                torch.set_num_threads(threads)
            made[method] = out
        return made[method]

    yield factory
    # Each run points TensorBoard at its own directory.
    if kept is None:
        os.environ.pop("TENSORBOARD_LOGGING_DIR", None)
    else:
        os.environ["TENSORBOARD_LOGGING_DIR"] = kept
