"""The benchmarks run, compare equal work, and say so; their speeds are not judged here."""

import importlib
import json

import pytest

from tests.conftest import ROOT

DOMAIN = ROOT / "recipes" / "configs" / "movies" / "domain.yaml"
LAYER = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64 + 2 * 32
"""Weights of a layer of the tiny base: query, output, key, value, three of the MLP, two norms."""
LORA = 2 * 64 + 2 * 48 + 3 * 96
"""Numbers that rank 1 adds to a layer."""

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # PEFT asks the base for an attribute that Transformers has renamed.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]


@pytest.fixture
def run(tiny_base, log_directory, tmp_path):
    """`run(module, *words)`: the result of a run on a tiny base and log; its file is result.json."""

    def short(name: str, *words: str) -> dict:
        module, _, command = name.partition(" ")
        return importlib.import_module(f"benchmarks.{module}").main(
            [*([command] if command else []), "--data", str(log_directory), "--domain", str(DOMAIN)]
            + ["--base", str(tiny_base("llama")), "--output", str(tmp_path / "result.json"), *words]
        )

    return short


SMALLEST = {
    "train_speed compare": "--rounds 1 --batch-size 2 --peer-targets 2 --peer-batch-sizes 1 --matmul-sizes 32",
    "train_speed profile": "--rounds 1 --tokens 400 --matmul-sizes 32",
    "train_speed curves": "--rounds 1 --context 0 --targets 2 --candidates 2 --rank 2 --layers 1 --window 3 4 "
    "--step-tokens 1 --tokens 60 --max-length 2048 --matmul-sizes 32",
    "score_speed history": "--rounds 1 --candidates 4 --tokens 60",
    "score_speed bank": "--rounds 1 --requests 2 --candidates 2 --domains 2",
    "quality.protocol": "--no-text --bootstrap 5",
    "quality.negatives": "--bootstrap 5",
    "quality.few_shot": "--targets 8 --seeds 0 --history 5 --window 4 --seen 8 --bootstrap 5 --test-targets 8",
}
"""What runs in this process; the others are `slow`."""


@pytest.mark.parametrize("name", SMALLEST)
def test_smallest_form(name, run, tmp_path, capsys):
    result = run(name, *SMALLEST[name].split())
    text = (tmp_path / "result.json").read_text(encoding="utf-8")
    assert {"command", "date", "seed", "machine", "versions", "settings", "minutes"} <= json.loads(text).keys()
    assert result["command"].startswith(f"python -m benchmarks.{name} --data log --domain recipes/configs/movies/")
    assert str(tmp_path) not in text and len(capsys.readouterr().out) > 100
