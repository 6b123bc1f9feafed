"""Recipes given what cannot be used: one line, exit code 2, and everything is left as it was.

Other inputs fail the same way: any other path that a file system does not take, in any option; any other damage to any
file of a checkpoint; any other fault of the disk while something is written.
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from llmrec_peft.config import CONFIGS
from tests.conftest import ROOT

PATHS = {
    "lora": ("config", "domain", "data.path", "model.base", "output_dir"),
    "distill": ("teacher", "data.path", "output_dir"),
    "evaluate": ("config", "bundle", "output_dir"),
    "fuse": ("bundle", "retrieval", "output_dir"),
    "merge": ("bundle", "data.path", "output_dir"),
    "recommend": ("bundle", "users", "candidates", "output_dir"),
    "swap": ("bundles", "items", "requests", "output"),
}
"""Options of each recipe that name a file or directory."""
BAD = ("x" * 300, "a\0b", "LOOP", "/dev/null", "FILE/below", "/".join(["d" * 200] * 30))


def refused(main, args: list[str], capfd) -> str:
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(args)
    lines = capfd.readouterr().err.splitlines()
    assert stop.value.code == 2 and lines[-1].startswith("error: "), lines
    assert not any("Traceback" in line for line in lines)
    return lines[-1]


@pytest.mark.parametrize("name", PATHS)
def test_paths_that_no_file_system_takes(name, data, recipe, tiny_base, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FILE").write_text("")
    (tmp_path / "LOOP").symlink_to("LOOP")
    shop = ROOT / "recipes" / "configs" / "shop"
    good = {
        "config": shop / "lora.yaml", "domain": shop / "domain.yaml", "data.path": data,
        "model.base": tiny_base("llama"), "requests": "FILE", "items": "{a: none}", "bundles": "{a: none}",
    }  # fmt: skip
    given = {key: good.get(key, "none") for key in dict.fromkeys((*PATHS[name], *_needed(name)))}
    if name == "evaluate":
        given.pop("config")
    for key in PATHS[name]:
        for value in BAD:
            bad = f"{{a: {json.dumps(value)}}}" if key in ("bundles", "items") else value
            refused(recipe(name), [f"--{option}={part}" for option, part in {**given, key: bad}.items()], capfd)
    assert sorted(os.listdir(tmp_path)) == ["FILE", "LOOP"]


def _needed(name: str) -> list[str]:
    return {"swap": [], "lora": []}.get(name, ["data.path"])


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_every_recipe_refuses_hostile_files(name, recipe, tmp_path, capfd):
    path = tmp_path / "c.yaml"
    for text in ("[" * 3000, "a: &a [*a, *a]", "output_dir: [9]\noutput_dir: x", "data: {path: " + "9" * 5000 + "}"):
        path.write_text(text)
        assert "c.yaml" in refused(recipe(name), ["--config", str(path)], capfd)


def digests(out: Path) -> dict[str, str]:
    return {str(p.relative_to(out)): hashlib.sha256(p.read_bytes()).hexdigest() for p in out.rglob("*") if p.is_file()}


LAST = "checkpoints/checkpoint-4/"
DAMAGES = {
    "config cut": ("config.yaml", lambda old: old[:40] + b"\0"),
    "config no mapping": ("config.yaml", lambda old: b"- 1"),
    "config empty": ("config.yaml", lambda old: b""),
    "streams cut": ("checkpoints/streams.json", lambda old: old[:9]),
    "streams deep": ("checkpoints/streams.json", lambda old: b"[" * 3000),
    "streams of other types": ("checkpoints/streams.json", lambda old: b'{"streams": [1], "launch": {}}'),
    "state cut": (LAST + "trainer_state.json", lambda old: old[:100]),
    "state a list": (LAST + "trainer_state.json", lambda old: b"[1]"),
    "state without end": (LAST + "trainer_state.json", lambda old: b'{"global_step": ' + b"9" * 5000 + b"}"),
    "state of other keys": (LAST + "trainer_state.json", lambda old: b'{"steps": 4}'),
    "state of other types": (LAST + "trainer_state.json", lambda old: b'{"global_step": "four"}'),
    "weights cut": (LAST + "model.safetensors", lambda old: old[: len(old) // 2]),
    "weights empty": (LAST + "model.safetensors", lambda old: b""),
    "weights of a huge header": (LAST + "model.safetensors", lambda old: b"\xff" * 7 + old[7:]),
    "optimizer cut": (LAST + "optimizer.pt", lambda old: old[: len(old) // 2]),
    "optimizer a pickle": (LAST + "optimizer.pt", lambda old: b"cos\nsystem\n(S'true'\ntR."),
    "scheduler empty": (LAST + "scheduler.pt", lambda old: b""),
    "random state cut": (LAST + "rng_state.pth", lambda old: old[:50]),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_run_is_not_resumed_and_not_touched(name, trained, recipe, arguments, tmp_path, capfd):
    out = tmp_path / "out"
    shutil.copytree(trained("lora"), out)
    file, damage = DAMAGES[name]
    (out / file).write_bytes(damage((out / file).read_bytes()))
    before = digests(out)
    line = refused(recipe("lora"), [*arguments("lora", out), "--train.resume=true"], capfd)
    assert "train.resume" in line and str(out) in line
    assert digests(out) == before


def test_a_checkpoint_of_another_model_is_one_line(trained, recipe, arguments, tmp_path, capfd):
    """It can be read, and does not fit: seen once the model is there."""
    out = tmp_path / "out"
    shutil.copytree(trained("lora"), out)
    import torch

    place = out / LAST / "optimizer.pt"
    state = torch.load(place, weights_only=True)
    state["param_groups"][0]["params"] = [0]
    torch.save(state, place)
    assert "checkpoint-4 cannot be used" in refused(
        recipe("lora"), [*arguments("lora", out), "--train.resume=true"], capfd
    )


def test_a_directory_by_the_name_of_a_checkpoint_is_passed_over(tmp_path):
    from llmrec_peft.training.checkpoints import last_checkpoint

    for name in ("checkpoint-9", "checkpoint-best", "checkpoint-\u0663", "checkpoint-"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "complete").write_text("")
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-9")


WRITE = """
import resource, sys
from tests.recipes.conftest import load_recipe
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
load_recipe(sys.argv[2]).main(sys.argv[3:])
"""


@pytest.mark.slow
@pytest.mark.parametrize("limit", [1 << 10, 8 << 10, 40 << 10])
def test_files_that_cannot_be_written_are_one_line(limit, arguments, tmp_path):
    """A limit on a file's size stands for a full disk: any file of the run may be the one that does not fit."""
    out = tmp_path / "out"
    command = [sys.executable, "-c", WRITE, str(limit), "lora", *arguments("lora", out), "--train.report_to=[]"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != limit
    if done.returncode:
        assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr[-3000:]
        assert "error: " in done.stderr, done.stderr[-3000:]  # behind a progress bar, on its line
        assert not (out / "bundle").exists() or (out / "bundle" / "behavior.json").is_file()
        assert not (out / "metrics.json").exists()
