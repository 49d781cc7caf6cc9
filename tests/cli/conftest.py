"""A home for the tests' commands in which no file of the user's counts, and their runner."""

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from p2pllm.cli.app import program

VARIABLES = ("XDG_CONFIG_HOME", "XDG_DATA_HOME", "XDG_CACHE_HOME")


class Terminal:
    """Types commands."""

    def __init__(self) -> None:
        self._runner = CliRunner()

    def type(self, *arguments: str, **settings: Any) -> Result:
        """Run `p2pllm ARGUMENTS` in this process."""
        return self._runner.invoke(program, arguments, prog_name="p2pllm", **settings)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home directory."""
    for variable in VARIABLES:
        monkeypatch.setenv(variable, str(tmp_path / variable.lower()))
    return tmp_path


@pytest.fixture
def terminal() -> Terminal:
    """Where commands are typed."""
    return Terminal()
