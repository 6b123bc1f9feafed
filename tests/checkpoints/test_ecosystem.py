"""LoRA bundles without this package: PEFT and Transformers alone give the same answers, as a model card says."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llmrec_peft.checkpoints.loading import load_trained
from llmrec_peft.checkpoints.model_card import CARD
from llmrec_peft.data.domain import Domain
from llmrec_peft.data.vocabulary import Vocabulary
from llmrec_peft.evaluation.calibration import Calibration
from tests.conftest import KINDS
from tests.support.bundles import DOMAIN, PROMPTS, answers, write_bundle

# PEFT's own call
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

CASES = [
    *((kind, options) for kind in KINDS for options in ({}, {"dora": True}, {"init": "pissa"})),
    ("llama", {"init": "gaussian", "layers": [1]}),
    ("llama", {"init": "olora", "rslora": True}),
    ("llama", {"target_modules": ["q_proj", "v_proj"], "rslora": True}),
    *((kind, {"bias": bias}) for kind in ("gpt2", "qwen2", "bert") for bias in ("all", "lora_only")),
]
CARDS = ("lora", "qlora", "begins")


@pytest.fixture(scope="module")
def with_bos(tiny_base, tmp_path_factory) -> Path:
    """The tiny llama with a tokenizer that puts a token in front of a text."""
    directory = Path(shutil.copytree(tiny_base("llama"), tmp_path_factory.mktemp("bos") / "base"))
    content = json.loads((directory / "tokenizer.json").read_text())
    number = next(token["id"] for token in content["added_tokens"] if token["content"] == "<s>")
    pieces = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    content["post_processor"] = {
        "type": "TemplateProcessing", "single": pieces, "pair": [*pieces, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [number], "tokens": ["<s>"]}},
    }  # fmt: skip
    (directory / "tokenizer.json").write_text(json.dumps(content))
    return directory


@pytest.fixture(scope="module")
def jobs(tiny_base, with_bos, tmp_path_factory) -> dict[str, dict]:
    """What PEFT alone is to answer, by name, with the bundle that each is about."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    root, made = tmp_path_factory.mktemp("bundles"), {}
    for number, (kind, options) in enumerate(CASES):
        bundle = write_bundle(root / str(number), tiny_base(kind), r=4, **options)
        made[f"{kind} {options}"] = {"base": str(tiny_base(kind)), "bundle": str(bundle), "prompts": PROMPTS}
    calibration = {"temperature": 1.5, "bias": [0.25, -0.25]}
    for name in CARDS:
        base = with_bos if name == "begins" else tiny_base("llama")
        method = "qlora" if name == "qlora" else "lora"
        bundle = write_bundle(root / name, base, method, r=4, calibration=calibration)
        blocks = re.findall(r"^```python\n(.*?)^```$", (bundle / CARD).read_text("utf-8"), flags=re.M | re.S)
        made[name] = {"base": str(base), "bundle": str(bundle), "code": blocks[1]}
    torch.set_num_threads(threads)
    return made


@pytest.fixture(scope="module")
def found(jobs, tmp_path_factory) -> dict[str, torch.Tensor]:
    """Answers by one process that never imports this package."""
    directory = tmp_path_factory.mktemp("alone")
    (directory / "jobs.json").write_text(json.dumps(list(jobs.values())))
    script = Path(__file__).with_name("run_peft_alone.py")
    command = [sys.executable, str(script), str(directory / "jobs.json"), str(directory / "out.json")]
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    values = json.loads((directory / "out.json").read_text())
    return {name: torch.tensor(value) for name, value in zip(jobs, values, strict=True)}


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("kind", "options"), CASES)
def test_the_same_logits_in_a_padded_batch(kind, options, jobs, found, tiny_base):
    name = f"{kind} {options}"
    expected = answers(Path(jobs[name]["bundle"]))
    assert expected.std() > 0.05 and torch.allclose(found[name], expected, atol=1e-5)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", CARDS)
def test_the_code_of_a_card_gives_the_same_prediction(name, jobs, found):
    """Its tokens are those of a stream, piece by piece, and its probabilities are calibrated."""
    loaded = load_trained(jobs[name]["bundle"])
    domain = Domain.from_dict(DOMAIN)
    vocabulary = Vocabulary(domain, loaded.tokenizer)
    assert len(vocabulary.prefix) == (name == "begins")
    header, event = (vocabulary.tokens([text])[0] for text in (domain.header, domain.event))
    pieces = [vocabulary.prefix, header, event, vocabulary.marker, vocabulary.outcomes[-1], event, vocabulary.marker]
    ids = torch.tensor([[int(token) for piece in pieces for token in piece]])
    with torch.no_grad():
        logits = loaded.classifier(ids, markers=torch.tensor([ids.shape[1] - 1]))
    assert torch.allclose(found[name][0], logits[0], atol=1e-5)
    expected = torch.tensor(Calibration.from_dict(loaded.calibration).apply(logits.numpy()))[0]
    assert torch.allclose(found[name][1], expected.float(), atol=1e-5)
