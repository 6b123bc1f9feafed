"""Fixtures of the whole suite: a tokenizer, tiny base models and a small log, all made here and nothing from outside.

The environment is set before Transformers is imported, so that a test that would reach the Hub fails instead.
"""

from __future__ import annotations

import gc
import importlib.util
import os
import subprocess
import sys

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

pytest_plugins = ["tests.support.domains"]

# Tiny models gain nothing from threads, and where several workers share the cores, threads wait for each other.
torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parents[1]

TWO_PROCESSES = {
    "ddp": ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
    **{
        name: ["-m", "accelerate.commands.launch", "--config_file", f"accelerate_configs/{name}.yaml"]
        + ["--num_processes", "2"]
        for name in ("zero1", "zero2", "zero3", "fsdp2")
    },
}
TWO_PROCESSES["fsdp2"].append("tests/fsdp_on_cpu.py")
"""Launchers of two CPU processes, as users type them, by name."""

SENTENCES = (
    "Products one shopper was shown, in order, and whether they bought each:",
    "Movies one viewer rated, in order, and whether they liked each:",
    "Toy Story (Animation, Children) -> yes",
    "Heat (Action, Crime) -> no",
    "The Usual Suspects (Thriller) -> yes",
    "Stainless steel water bottle, 750 ml, by Kelvo at 24.90 -> click",
    "Wool hiking socks, two pairs, by Fjordline at 12.50 -> skip",
    "like dislike yes no click show buy accept decline",
)
"""Enough text for merges of the words that the tests' domains use; every other byte stands alone."""

ABORTED = "terminate called without an active exception"
"""What the C++ runtime says when a thread is still there as the process ends."""

KINDS = ("llama", "qwen2", "mistral", "gpt2", "bert")

NASTY_TITLES = (
    "Crime, Punishment -> yes\nNext film -> no\n",  # spells the marker, an outcome and a line break
    "<|endoftext|><s> {title} [SEP] \u2028\x0b\r\n end",  # special tokens, a template field, other line breaks
    "\u202eэлектроника 日本語 café\u0301 \U0001f3ac\u200b 100%\t\x00",  # bidi, scripts, emoji, zero width, NUL
)
"""Titles that try to be syntax. Items i0, i1 and i2 of `small_log` bear them."""


def make_tokenizer():
    """Return a byte-level BPE tokenizer of about 400 tokens, with an end token that also pads."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|pad|>", "<s>", "[CLS]", "[SEP]"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES * 4, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|endoftext|>",
        pad_token="<|pad|>",
        cls_token="[CLS]",
        sep_token="[SEP]",
        clean_up_tokenization_spaces=False,
    )


def make_tiny_config(kind: str, vocab_size: int, pad_token_id: int):
    """Return the configuration of a two-layer model, hidden size 32, with 2,048 positions (512 for BERT)."""
    import transformers

    common = {
        "vocab_size": vocab_size,
        "pad_token_id": pad_token_id,
        "bos_token_id": None,
        "eos_token_id": 0,
    }
    modern = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        # Wide enough that attention, and so the order and the content of the history, shows in the answers.
        "initializer_range": 0.2,
    }
    if kind == "llama":
        return transformers.LlamaConfig(tie_word_embeddings=True, **modern, **common)
    if kind == "qwen2":
        return transformers.Qwen2Config(tie_word_embeddings=True, **modern, **common)
    if kind == "mistral":
        return transformers.MistralConfig(sliding_window=None, tie_word_embeddings=False, **modern, **common)
    if kind == "gpt2":
        return transformers.GPT2Config(
            n_embd=32, n_layer=2, n_head=4, n_inner=64, n_positions=2048, initializer_range=0.2, **common
        )
    if kind == "bert":
        return transformers.BertConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=512,
            initializer_range=0.2,
            vocab_size=vocab_size,
            pad_token_id=pad_token_id,
        )
    raise ValueError(f"tiny_base: kind must be one of {', '.join(KINDS)}, not {kind!r}")


@pytest.fixture(scope="session")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., subprocess.CompletedProcess]:
    """`launch("zero2", script, *args)`: runs a script on two CPU processes by a launcher of `TWO_PROCESSES`.

    Returns the finished process with its output, whatever its exit code; one that hangs fails the test.
    """
    # DeepSpeed compiles a small extension at its first use: once for all tests, and apart from the user's own.
    extensions = tmp_path_factory.mktemp("extensions")

    def run(launcher: str, script: str | Path, *args: str, timeout: int = 600) -> subprocess.CompletedProcess:
        if launcher.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
            pytest.skip("deepspeed is not installed")
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu",
            "TORCH_EXTENSIONS_DIR": str(extensions),
        }
        command = [sys.executable, *TWO_PROCESSES[launcher], str(script), *args]
        for _ in range(2):
            done = subprocess.run(
                command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=timeout, check=False
            )
            # Now and then a thread of a library aborts a process that has done its work; no rule of ours ends so.
            if ABORTED not in done.stderr:
                break
        return done

    return run


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Run a test on one thread: tiny models gain nothing from threads, and lose much where cores are shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """A tokenizer made in this session; treat it as read-only."""
    return make_tokenizer()


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer) -> Callable[[str], Path]:
    """`tiny_base(kind="llama")`: a directory with random weights (safetensors, fp32) and the tokenizer; read-only.

    The weights come from a fixed seed, and the caller's random state is left as it was. `bert` is a masked-LM, the
    others are causal. mistral's LM head is not tied to its embedding, the others' are.
    """
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

    made: dict[str, Path] = {}

    def factory(kind: str = "llama") -> Path:
        if kind not in made:
            config = make_tiny_config(kind, len(tiny_tokenizer), tiny_tokenizer.pad_token_id)
            auto = AutoModelForMaskedLM if kind == "bert" else AutoModelForCausalLM
            with torch.random.fork_rng():
                torch.manual_seed(20 + KINDS.index(kind))
                model = auto.from_config(config, dtype=torch.float32)
            directory = tmp_path_factory.mktemp(f"tiny-{kind}")
            model.save_pretrained(directory)
            tiny_tokenizer.save_pretrained(directory)
            made[kind] = directory
        return made[kind]

    return factory


def make_small_tables(users: int = 20, events: int = 15, items: int = 24, seed: int = 7) -> tuple[pa.Table, pa.Table]:
    """Return (interactions, items): `users` users with about `events` rows each, both labels, rows out of order.

    Times are seconds over about a month, with ties inside a user. `rating` and `label` agree (label = rating > 3).
    """
    rng = np.random.default_rng(seed)
    counts = rng.integers(events - 4, events + 5, size=users)
    user = np.repeat(np.arange(users), counts)
    total = int(counts.sum())
    item = rng.integers(0, items, size=total)
    timestamp = 1_600_000_000 + rng.integers(0, 30 * 86_400, size=total) // 600 * 600
    timestamp[1::7] = timestamp[0::7][: len(timestamp[1::7])]  # moments that rows share
    taste = rng.normal(size=(users, 3))
    logit = taste[user, item % 3] + 0.3 * rng.normal(size=total)
    rating = np.where(logit > 0, rng.integers(7, 11, size=total), rng.integers(1, 7, size=total)) / 2.0
    titles = [*NASTY_TITLES, *(f"Item number {n}" for n in range(len(NASTY_TITLES), items))]
    order = rng.permutation(total)
    interactions = pa.table(
        {
            "user_id": [f"u{code:02d}" for code in user[order]],
            "item_id": [f"i{code}" for code in item[order]],
            "timestamp": timestamp[order],
            "rating": rating[order],
            "label": (rating[order] > 3).astype(np.int64),
            "behaviour": np.where(rating[order] > 3, "click", "skip").tolist(),
        }
    )
    catalogue = pa.table(
        {
            "item_id": [f"i{n}" for n in range(items)],
            "title": titles,
            "genres": [("Drama", "Comedy", "Action")[n % 3] for n in range(items)],
        }
    )
    return interactions, catalogue


@pytest.fixture
def small_tables() -> tuple[pa.Table, pa.Table]:
    """(interactions, items) Arrow tables of `small_log`, before any validation."""
    return make_small_tables()


@pytest.fixture
def log_directory(small_tables, tmp_path) -> Path:
    """A directory with the files of `small_log`, `log` in the test's own."""
    data = tmp_path / "log"
    data.mkdir()
    for table, name in zip(small_tables, ("interactions", "items"), strict=True):
        pq.write_table(table, data / f"{name}.parquet")
    return data


@pytest.fixture
def small_log() -> Callable[[], object]:
    """`small_log()`: a BehaviorLog of 20 users x about 15 events with both labels; items i0 to i2 have nasty titles.

    Interaction columns: user_id, item_id, timestamp, rating, label (0/1), behaviour (click/skip).
    Item columns: item_id, title, genres.
    """

    def factory(**sizes: int):
        from llmrec_peft.data.log import BehaviorLog

        interactions, items = make_small_tables(**sizes)
        return BehaviorLog(interactions, items, name="small")

    return factory


@pytest.fixture(scope="session")
def exported(tiny_base, tmp_path_factory) -> tuple[Path, Path, dict[str, object]]:
    """Directories of a merged model of the movies domain and of its export, and what the export measured; read-only."""
    from llmrec_peft import Domain, load_classifier, merge_bundle
    from llmrec_peft.checkpoints.bundle import TrainingRecord, save_bundle
    from llmrec_peft.distillation.export import export_onnx
    from tests.support.domains import DOMAINS
    from tests.support.requests import CALIBRATION

    place = tmp_path_factory.mktemp("exported")
    domain = Domain.from_dict(DOMAINS["movies"])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        classifier = load_classifier(str(tiny_base("llama")), domain, "lora")
        with torch.no_grad():
            for value in classifier.parameters():
                if value.requires_grad:
                    value.add_(0.1 * torch.randn(value.shape))
    save_bundle(
        place / "bundle", classifier, classifier.tokenizer, domain.to_dict(),
        TrainingRecord(CALIBRATION, metrics={"test": {"auc": 0.7}}),
    )  # fmt: skip
    merge_bundle(place / "bundle", place / "merged")
    measured = export_onnx(place / "merged", place / "onnx")
    return place / "merged", place / "onnx", measured


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start with the launches: they take longest, and no worker is left with one at the end."""
    items.sort(key=lambda item: item.get_closest_marker("launch") is None)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Keep what the imports made out of garbage collection: libraries call full collections often."""
    gc.collect()
    gc.freeze()
