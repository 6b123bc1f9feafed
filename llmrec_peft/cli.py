"""The command `llmrec`, and what the launchers in recipes/ call.

    llmrec train lora --config shop/lora.yaml --output_dir OUT
    llmrec train lora --launch zero3 --launch.num_processes 4 --config movies/lora.yaml --data.path DIR

Nothing heavy is imported before the options are read, so that `--help` and a mistyped option take under a second.
A recipe's steps are in `llmrec_peft/recipes/<recipe>.py`.
"""

from __future__ import annotations

import difflib
import importlib
import logging
import os
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn

from llmrec_peft.boundary import exit_on_error
from llmrec_peft.errors import ConfigError

METHODS = ("lora", "qlora", "adapter", "head", "full")
"""Tuning methods of `llmrec train`; each has a launcher `recipes/<method>.py`."""

EXTRAS = {"bitsandbytes": "qlora", "deepspeed": "deepspeed", "onnx": "export", "onnxscript": "export"}
"""From a package to the extra that installs it; all others come with `train`."""

LAUNCH_HELP = (
    "--launch FILE.yaml runs the recipe by `accelerate launch --config_file FILE.yaml`; a shipped configuration is "
    "found by its name, such as --launch zero3. --launch.KEY VALUE passes --KEY VALUE to `accelerate launch`."
)


def main(args: Sequence[str] | None = None) -> None:
    """Run `llmrec` with `args` (the command line if None).

    Ends the program with exit code 2 and one line on standard error for options that cannot be used.
    """
    words = list(sys.argv[1:] if args is None else args)
    if not words or words[0] in ("-h", "--help"):
        print(_usage(), file=sys.stdout if words else sys.stderr)
        raise SystemExit(0 if words else 2)
    if words[0] == "--version":
        from llmrec_peft import __version__

        print(f"llmrec {__version__}")
        return
    command, rest = words[0], words[1:]
    with exit_on_error():
        _check_name(command, COMMANDS, "command")
    COMMANDS[command][0](command, rest)


def launcher(recipe: str) -> Callable[[Sequence[str] | None], None]:
    """The `main` of `recipes/<recipe>.py`: `llmrec` with this recipe."""

    def launch(args: Sequence[str] | None = None) -> None:
        _run_recipe(recipe, list(sys.argv[1:] if args is None else args), f"recipes/{recipe}.py")

    return launch


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = "\n".join(f"  {name:<{width}}  {summary}" for name, (_, summary) in COMMANDS.items())
    return (
        f"usage: llmrec COMMAND [options]\n       llmrec --version\n\ncommands:\n{lines}\n\n"
        "`llmrec COMMAND --help` lists the options of a command."
    )


def _check_name(name: str, known: Collection[str], what: str) -> None:
    if name not in known:
        close = difflib.get_close_matches(name, list(known), n=1)
        advice = f"did you mean {close[0]}?" if close else f"use one of {', '.join(known)}"
        raise ConfigError(f"llmrec: unknown {what} {name!r}; {advice}")


# -- commands --------------------------------------------------------------------------------------


def _train(command: str, args: list[str]) -> None:
    if not args or args[0] in ("-h", "--help"):
        usage = f"usage: llmrec train {'|'.join(METHODS)} [options]\n\n`llmrec train METHOD --help` lists the options."
        print(usage, file=sys.stdout if args else sys.stderr)
        raise SystemExit(0 if args else 2)
    with exit_on_error():
        if args[0].startswith("-"):
            raise ConfigError(
                f"llmrec train: the tuning method comes first, before {args[0]}; write llmrec train METHOD {args[0]} "
                f"..., with METHOD one of {', '.join(METHODS)}"
            )
        _check_name(args[0], METHODS, "tuning method")
    _run_recipe(args[0], args[1:], f"llmrec train {args[0]}")


def _recipe(command: str, args: list[str]) -> None:
    _run_recipe(command, args, f"llmrec {command}")


def _memory(command: str, args: list[str]) -> None:
    with exit_on_error(), _imports():
        from llmrec_peft.memory.__main__ import main as memory
    memory(args, prog="llmrec memory")


def _download(command: str, args: list[str]) -> None:
    with exit_on_error(), _imports():
        from llmrec_peft.data.download import main as download
    code = download(args)
    if code:
        raise SystemExit(code)


def _configs(command: str, args: list[str]) -> None:
    import argparse

    from llmrec_peft.config.shipped import copy_shipped, shipped_files

    summary = COMMANDS["configs"][1]
    parser = argparse.ArgumentParser(prog="llmrec configs", description=f"{summary[0].upper()}{summary[1:]}.")
    parser.add_argument("--copy", metavar="DIR", help="copy the files below this directory")
    options = parser.parse_args(args)
    with exit_on_error():
        for path in shipped_files() if options.copy is None else copy_shipped(options.copy):
            print(path)


COMMANDS: dict[str, tuple[Callable[[str, list[str]], None], str]] = {
    "train": (_train, f"fine-tune a base on a log: train {'|'.join(METHODS)}"),
    "evaluate": (_recipe, "evaluate a bundle or a merged model"),
    "merge": (_recipe, "merge a bundle, or several with weights, into a stock checkpoint"),
    "distill": (_recipe, "train a small student on the predictions of a teacher"),
    "index": (_recipe, "fit a retrieval index and stack collaborative models with a bundle"),
    "recommend": (_recipe, "rank items for many users"),
    "score": (_recipe, "score requests of many domains on one base"),
    "memory": (_memory, "estimate the peak memory of training"),
    "download": (_download, "download a MovieLens data set"),
    "configs": (_configs, "list the shipped configurations, or copy them to a directory"),
}
"""From a command to its function and summary."""


# -- recipes ---------------------------------------------------------------------------------------


def _run_recipe(recipe: str, args: list[str], prog: str) -> None:
    """Read the options, then run the recipe here or hand over to `accelerate launch`."""
    if logging.lastResort is not None:  # the handler of warnings in a program that configures no logging
        logging.lastResort.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    with exit_on_error():
        launch, args = _take_launch(args)
        with _imports():
            from llmrec_peft.config.parsing import parse_config
            from llmrec_peft.config.schema import CONFIGS
    config: object = parse_config(CONFIGS[recipe], args, prog=prog, epilog=LAUNCH_HELP)
    with exit_on_error():
        if launch:
            _hand_over(recipe, launch, args)
        name = "train" if recipe in METHODS else recipe
        with _imports():
            run = getattr(importlib.import_module(f"llmrec_peft.recipes.{name}"), name)
        run(config)


def _take_launch(args: list[str]) -> tuple[list[tuple[str, str]], list[str]]:
    """Split off --launch and --launch.KEY, as pairs of option and value."""
    taken: list[tuple[str, str]] = []
    rest: list[str] = []
    words = iter(args)
    for word in words:
        name, equals, value = word.partition("=")
        if name != "--launch" and not name.startswith("--launch."):
            rest.append(word)
            continue
        value = value if equals else next(words, "")
        if not value or value.startswith("--"):
            raise ConfigError(f"{name} must be followed by a value, not {value!r}; give one")
        taken.append((name, value))
    if taken and not any(name == "--launch" for name, _ in taken):
        raise ConfigError(f"{taken[0][0]} needs --launch FILE.yaml; give an accelerate configuration")
    return taken, rest


def _hand_over(recipe: str, launch: list[tuple[str, str]], args: list[str]) -> NoReturn:
    """Replace this process by `accelerate launch`, whose processes run the same command."""
    from llmrec_peft.config.shipped import deepspeed_config, launch_config

    file = launch_config(next(value for name, value in reversed(launch) if name == "--launch"))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", file]
    deepspeed = deepspeed_config(file)
    if deepspeed is not None:
        command += ["--deepspeed_config_file", deepspeed]
    for name, value in launch:
        if name != "--launch":
            command += [f"--{name.removeprefix('--launch.')}", value]
    command += ["-m", "llmrec_peft.cli", *(["train"] if recipe in METHODS else []), recipe, *args]
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, command)


@contextmanager
def _imports() -> Iterator[None]:
    """Name the extra to install where the block imports a package that is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").split(".")[0]
        if package in ("", "llmrec_peft"):
            raise
        extra = EXTRAS.get(package, "train")
        raise ConfigError(
            f"this command needs the package {package}; install it with: pip install 'llmrec-peft[{extra}]'"
        ) from error


if __name__ == "__main__":
    main()
