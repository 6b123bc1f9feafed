"""The command `llmrec`: its help without heavy imports, what it refuses, and how it hands over to accelerate."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands import launch

import llmrec_peft
from llmrec_peft.cli import COMMANDS, METHODS, launcher, main
from llmrec_peft.config.schema import CONFIGS
from llmrec_peft.config.shipped import FOLDERS, copy_shipped, locate, shipped_files
from llmrec_peft.errors import ConfigError
from tests.conftest import ROOT

LIGHT = """
import contextlib, io, json, pkgutil, sys
import llmrec_peft.config
from llmrec_peft.cli import main
heavy, found = set(json.loads(sys.argv[1])), {}
def note(name):
    found[name] = sorted(heavy & sys.modules.keys())
for command in json.loads(sys.argv[2]):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
        main([*command, "--help"])
    note(" ".join(command))
for module in pkgutil.iter_modules(llmrec_peft.config.__path__):
    __import__(f"llmrec_peft.config.{module.name}")
    note(module.name)
print(json.dumps(found))
"""
HEAVY = (
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "datasets",
    "pyarrow",
    "pandas",
    "scipy",
    "sklearn",
    "matplotlib",
)


@pytest.fixture
def handed_over(monkeypatch) -> list[list[str]]:
    """The commands that take the place of this process."""
    commands: list[list[str]] = []

    def execv(path: str, command: list[str]) -> None:
        assert path == sys.executable == command[0]
        commands.append(command)
        raise SystemExit(0)

    monkeypatch.setattr(os, "execv", execv)
    return commands


def refused(args: list[str], capsys) -> str:
    with pytest.raises(SystemExit) as caught:
        main(args)
    out, err = capsys.readouterr()
    assert (caught.value.code, out, err.count("\n")) == (2, "", 1)
    return err


def test_help_and_configurations_import_nothing_heavy():
    commands = [
        [],
        ["train"],
        *(["train", name] for name in METHODS),
        *([name] for name in COMMANDS if name != "train"),
    ]
    args = [sys.executable, "-c", LIGHT, json.dumps(HEAVY), json.dumps(commands)]
    done = subprocess.run(args, cwd=ROOT, capture_output=True, text=True, timeout=100, check=True)
    found = json.loads(done.stdout)
    assert len(found) > len(commands) + 5
    assert not {name: modules for name, modules in found.items() if modules}


def test_every_recipe_is_a_command():
    assert {*METHODS, *(name for name, (run, _) in COMMANDS.items() if run.__name__ == "_recipe")} == set(CONFIGS)


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.py")), ids=lambda path: path.stem)
def test_a_launcher_names_the_file_of_its_steps(path):
    text = path.read_text("utf-8")
    name = re.search(r"^The steps are in (llmrec_peft/recipes/(\w+)\.py):$", text, flags=re.M)
    steps = ast.parse((ROOT / name[1]).read_text("utf-8"))
    assert name[2] in {node.name for node in steps.body if isinstance(node, ast.FunctionDef)}
    assert f'launcher("{path.stem}")' in text and name[2] == ("train" if path.stem in METHODS else path.stem)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["trian"], "error: llmrec: unknown command 'trian'; did you mean train?\n"),
        (["xyzzy"], f"error: llmrec: unknown command 'xyzzy'; use one of {', '.join(COMMANDS)}\n"),
        (["train", "lroa"], "error: llmrec: unknown tuning method 'lroa'; did you mean lora?\n"),
        (["merge", "--bundel", "b"], "error: the command line: unknown key --bundel; did you mean --bundle?\n"),
        (["train", "lora", "--launch"], "error: --launch must be followed by a value, not ''; give one\n"),
        (
            ["train", "lora", "--launch.num_processes", "2"],
            "error: --launch.num_processes needs --launch FILE.yaml; give an accelerate configuration\n",
        ),
    ],
)
def test_what_cannot_be_run_is_one_line(args, message, capsys):
    assert refused(args, capsys) == message


def test_usage_and_version(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert all(re.search(rf"^  {name} +\S", text, flags=re.M) for name in COMMANDS)
    main(["--version"])
    assert capsys.readouterr().out == f"llmrec {llmrec_peft.__version__}\n"
    with pytest.raises(SystemExit) as caught:
        main([])
    assert caught.value.code == 2


def test_a_recipe_runs_with_its_configuration(monkeypatch):
    seen = []
    monkeypatch.setattr("llmrec_peft.recipes.merge.merge", seen.append)
    main(["merge", "--bundle", "b", "--output_dir", "o"])
    launcher("merge")(["--bundle", "c", "--output_dir", "o"])
    assert [type(config) for config in seen] == [CONFIGS["merge"]] * 2
    assert [config.bundle for config in seen] == ["b", "c"]


@pytest.mark.parametrize("package", ["llmrec_peft.recipes.merge", "torch"])
def test_a_missing_package_names_its_extra(package, monkeypatch, capsys):
    def fail(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {package!r}", name=package)

    monkeypatch.setattr("llmrec_peft.cli.importlib.import_module", fail)
    arguments = ["merge", "--bundle", "b", "--output_dir", "o"]
    if package != "torch":  # a fault of ours, and no package to install
        with pytest.raises(ModuleNotFoundError):
            main(arguments)
        return
    line = refused(arguments, capsys)
    assert line == "error: this command needs the package torch; install it with: pip install 'llmrec-peft[train]'\n"


# -- accelerate ------------------------------------------------------------------------------------

LORA = ["train", "lora", "--config", "shop/lora.yaml", "--train.max_steps", "2"]


@pytest.mark.parametrize("name", ["zero3", "accelerate_configs/zero3.yaml", "zero3.yaml"])
def test_launch_hands_over_to_accelerate(name, handed_over, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main([*LORA, "--launch", name, "--launch.num_processes=4"])
    command = handed_over.pop()
    assert command[1:3] == ["-m", "accelerate.commands.launch"]
    args = launch.launch_command_parser().parse_args(command[3:])
    assert (args.module, args.training_script, args.training_script_args) == (True, "llmrec_peft.cli", LORA)
    args = launch._validate_launch_command(args)[0]
    assert args.use_deepspeed and args.num_processes == 4
    # The file names DeepSpeed's by a path below the repository, which is not the working directory.
    assert Path(args.deepspeed_config_file).read_text("utf-8") == (ROOT / "ds_configs/zero3.json").read_text("utf-8")


def test_launch_takes_a_local_file_first(handed_over, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit):
        launcher("lora")(["--config", "shop/lora.yaml", "--launch=accelerate_configs/zero2.yaml"])
    command = handed_over.pop()
    assert (
        command[3:5] == ["--config_file", "accelerate_configs/zero2.yaml"] and "--deepspeed_config_file" not in command
    )


def test_options_are_refused_before_a_launch(handed_over, capsys):
    assert "unknown key --train.max_step;" in refused([*LORA, "--launch", "zero3", "--train.max_step", "3"], capsys)
    assert "--launch zero9 is not a file; give an accelerate configuration, or one of ddp," in refused(
        [*LORA, "--launch", "zero9"], capsys
    )
    assert not handed_over


# -- shipped configurations ------------------------------------------------------------------------


def test_all_configurations_are_shipped():
    files = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.*")]
    assert shipped_files() and set(shipped_files()) == {path.relative_to(ROOT).as_posix() for path in files}


def test_a_local_file_goes_before_a_shipped_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shipped = str(FOLDERS["recipes/configs"] / "shop" / "lora.yaml")
    assert locate("shop/lora.yaml", "recipes/configs") == locate("recipes/configs/shop/lora.yaml", "recipes/configs")
    assert locate("shop/lora.yaml", "recipes/configs") == shipped
    for name in ("shop/none.yaml", "../configs/shop/lora.yaml", "/shop/lora.yaml", "shop", "a\0b", "x" * 5000):
        assert locate(name, "recipes/configs") == name
    (tmp_path / "shop").mkdir()
    (tmp_path / "shop" / "lora.yaml").write_text("{}")
    assert locate("shop/lora.yaml", "recipes/configs") == "shop/lora.yaml"


def test_configurations_are_listed_and_copied(tmp_path, capsys):
    main(["configs"])
    assert capsys.readouterr().out.splitlines() == shipped_files()
    main(["configs", "--copy", str(tmp_path)])
    printed = capsys.readouterr().out.splitlines()
    assert printed == [str(tmp_path / name) for name in shipped_files()]
    assert all((tmp_path / name).read_bytes() == (ROOT / name).read_bytes() for name in shipped_files())
    with pytest.raises(ConfigError, match="already holds recipes/configs/content/domain.yaml"):
        copy_shipped(str(tmp_path))


# -- the README ------------------------------------------------------------------------------------


def test_the_readme_lists_every_command_and_its_configurations():
    rows = re.findall(
        r"^\| `llmrec ([\w ]+)` \| (?:`recipes/(\w+)\.py`)? ?\| .* \| ?([\w, ]*?) ?\|$",
        (ROOT / "README.md").read_text("utf-8"),
        flags=re.M,
    )
    commands = [name for name in COMMANDS if name != "train"]
    assert {command for command, _, _ in rows} == {*(f"train {name}" for name in METHODS), *commands}
    for command, recipe, domains in rows:
        assert recipe == (command.split()[-1] if command.split()[-1] in CONFIGS else "")
        files = (ROOT / "recipes" / "configs").glob(f"*/{recipe}.yaml")
        assert {name for name in domains.split(", ") if name} == {path.parent.name for path in files if recipe}


@pytest.mark.parametrize("line", re.findall(r"^llmrec .*$", (ROOT / "README.md").read_text("utf-8"), flags=re.M))
def test_the_readmes_commands_are_accepted(line, handed_over, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        main([*line.split()[1:], "--print_config"])
    assert caught.value.code == 0 and capsys.readouterr().out.startswith(("data:", "base:", "teacher:"))
