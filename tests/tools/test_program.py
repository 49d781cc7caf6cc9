"""Programs that a benchmark asks by lines."""

import sys
from pathlib import Path

import pytest

from tools.benchmarks import _program
from tools.benchmarks._program import running

ECHO = """
import json, sys
from benchmarks._program import answer
settings = json.loads(sys.argv[1])
answer({"settings": settings}, {"double": lambda number: 2 * number})
"""


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory in which `python -m benchmarks.NAME` finds modules of the test's own."""
    directory = tmp_path / "benchmarks"
    directory.mkdir()
    (directory / "__init__.py").touch()
    source = Path(_program.__file__).read_text()
    (directory / "_program.py").write_text(source)
    monkeypatch.setattr(_program, "TOOLS", tmp_path)
    return directory


def test_a_program_gets_its_settings_and_answers_what_it_is_asked(programs: Path) -> None:
    (programs / "echo.py").write_text(ECHO)

    with running("echo", {"a": [1, 2]}) as program:
        answers = [program.ask("double", number=n) for n in (3, 4)]

    assert program.greeting == {"settings": {"a": [1, 2]}}
    assert answers == [6, 8]


def test_a_program_that_ends_before_it_is_ready_ends_the_benchmark(programs: Path) -> None:
    (programs / "broken.py").write_text("raise SystemExit(3)")

    with pytest.raises(SystemExit, match="ended early"), running("broken", None):
        pass


def test_a_program_ends_with_its_standard_input(programs: Path) -> None:
    (programs / "echo.py").write_text(ECHO)

    with running("echo", None) as program:
        popen = program._popen

    assert popen.returncode == 0
    assert popen.args == [sys.executable, "-m", "benchmarks.echo", "null"]
