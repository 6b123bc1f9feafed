"""The wheel and the source distribution, built without a network, and the command from another folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml

import llmrec_peft
from llmrec_peft.config.shipped import shipped_files
from tests.conftest import ROOT

pytestmark = pytest.mark.slow
LEFT_OUT = shutil.ignore_patterns(
    ".git", ".venv", "out", "build", "dist", "*.egg-info", ".*_cache", "__pycache__", "results"
)


def run(args: list[str], cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        args, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A copy of the tree, which a build may write into."""
    return shutil.copytree(ROOT, tmp_path_factory.mktemp("source") / "tree", symlinks=True, ignore=LEFT_OUT)


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(out), "."], source)
    (path,) = out.glob("*.whl")
    return path


def names_in(wheel: Path) -> set[str]:
    return set(zipfile.ZipFile(wheel).namelist())


def test_the_wheel_holds_package_and_configurations(wheel):
    names = names_in(wheel)
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "llmrec_peft").rglob("*.py")}
    shipped = {f"llmrec_peft/recipes/{name.removeprefix('recipes/')}" for name in shipped_files()}
    meta = {name for name in names if ".dist-info/" in name}
    assert names - meta == modules | shipped | {"llmrec_peft/py.typed"}
    assert f"llmrec_peft-{llmrec_peft.__version__}-py3-none-any.whl" == wheel.name


def test_a_source_distribution_builds_the_same_wheel(source, wheel, tmp_path):
    build = "import sys; from setuptools import build_meta; print(build_meta.build_sdist(sys.argv[1]))"
    name = run([sys.executable, "-c", build, str(tmp_path)], source).splitlines()[-1]
    with tarfile.open(tmp_path / name) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (tree,) = (tmp_path / "unpacked").iterdir()
    run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), "."],
        tree,
    )
    (again,) = tmp_path.glob("*.whl")
    assert names_in(again) == names_in(wheel)


def test_the_command_runs_from_another_folder(wheel, tmp_path):
    place, work = tmp_path / "site", tmp_path / "work"
    work.mkdir()
    run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(place), str(wheel)], work)

    def llmrec(*args: str) -> str:
        return run([str(place / "bin" / "llmrec"), *args], work, PYTHONPATH=str(place))

    assert llmrec("--version") == f"llmrec {llmrec_peft.__version__}\n"
    assert "usage: llmrec COMMAND" in llmrec("--help")
    assert llmrec("configs").splitlines() == shipped_files()
    config = yaml.safe_load(llmrec("train", "lora", "--config", "shop/lora.yaml", "--print_config"))
    assert (config["domain"]["name"], config["data"]["path"]) == ("shop", "simulated:shop")
    found = run([sys.executable, "-c", "import llmrec_peft; print(llmrec_peft.__file__)"], work, PYTHONPATH=str(place))
    assert found.startswith(str(place))
