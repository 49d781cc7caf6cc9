"""The package as a whole: cheap to import, and the same on every machine."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ["p2pllm", "tests", "tools", "docs", ".ci"]


def files() -> Iterator[Path]:
    """What is written by people: no build output, no caches."""
    yield from (path for path in ROOT.iterdir() if path.is_file())
    for folder in SOURCES:
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                yield path


@pytest.mark.parametrize("module", ["torch", "numpy", "aiortc", "cryptography", "asyncio"])
def test_importing_the_package_imports_nothing_large(module: str) -> None:
    check = f"import p2pllm, sys; sys.exit({module!r} in sys.modules)"

    assert subprocess.run([sys.executable, "-c", check], cwd=ROOT, check=False).returncode == 0


def test_all_public_names_exist() -> None:
    check = "import p2pllm; [getattr(p2pllm, name) for name in p2pllm.__all__]"

    subprocess.run([sys.executable, "-c", check], cwd=ROOT, check=True)


def test_no_file_names_a_place_on_the_machine_it_was_written_on() -> None:
    places = [f"{place}/".encode() for place in (ROOT, Path.home()) if len(place.parts) > 1]

    found = [path for path in files() if any(place in path.read_bytes() for place in places)]

    assert found == []
