"""What `pip install llmrec-peft[serve]` takes on the disk: a new environment, installed as a user would.

    python benchmarks/serve_size.py

Counted are the disk blocks of site-packages, with the bytecode that pip compiles, without pip and setuptools, which
were there before. MB are 10^6 bytes.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

from measuring import header, stop, write_result

ROOT = Path(__file__).resolve().parent.parent
LIMIT_MB = 150
BEFORE = ("pip", "setuptools", "pkg_resources", "_distutils_hack", "distutils-precedence.pth")
FORBIDDEN = ("torch", "transformers", "pyarrow")


def main(arguments: list[str]) -> None:
    """Install each extra and write what it took."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--extras", nargs="+", default=["serve", "serve-text"])
    parser.add_argument("--output", default=str(ROOT / "benchmarks" / "results" / "serve_size.json"))
    options = parser.parse_args(arguments)
    result = {**header(__file__, arguments, 0), "limit_mb": LIMIT_MB, "extras": {}}
    for extra in options.extras:
        result["extras"][extra] = found = measure(extra)
        print(f"{extra}: {found['mb']:.1f} MB; largest: {dict(list(found['packages'].items())[:4])}")
    write_result(options.output, result)
    if result["extras"].get("serve", {"mb": 0})["mb"] >= LIMIT_MB:
        stop(f"serve takes {result['extras']['serve']['mb']:.1f} MB, and {LIMIT_MB} are its limit")


def measure(extra: str) -> dict:
    """Megabytes of an extra in an environment of its own, in all and by directory, the largest first."""
    with tempfile.TemporaryDirectory(prefix="serve-size-") as scratch:
        # A build leaves its files beside the source.
        source = Path(scratch) / "source"
        shutil.copytree(ROOT / "llmrec_peft", source / "llmrec_peft", ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, source)
        venv.create(scratch, with_pip=True)
        python = Path(scratch) / "bin" / "python"
        command = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*command, "-c", ROOT / "constraints.txt", f"{source}[{extra}]"], check=True)
        subprocess.run([python, "-c", "import llmrec_peft.serving"], check=True, cwd=scratch)
        (site,) = Path(scratch).glob("lib/python*/site-packages")
        sizes = {path.name: blocks(path) / 1e6 for path in site.iterdir() if not path.name.startswith(BEFORE)}
        heavy = sorted(set(sizes) & set(FORBIDDEN))
        if heavy:
            stop(f"{extra} installs {', '.join(heavy)}, which serving must not need")
        largest = sorted(sizes, key=sizes.get, reverse=True)
        return {
            "mb": round(sum(sizes.values()), 1),
            "packages": {name: round(sizes[name], 1) for name in largest if sizes[name] >= 1},
        }


def blocks(path: Path) -> int:
    """Bytes of disk blocks of a file or of all files under a directory."""
    files = [path] if path.is_file() else path.rglob("*")
    return sum(file.lstat().st_blocks * 512 for file in files)


if __name__ == "__main__":
    main(sys.argv[1:])
