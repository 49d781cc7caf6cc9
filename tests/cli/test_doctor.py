"""The doctor's findings."""

import json
import socket
import time
from pathlib import Path

import pytest

from p2pllm.cli import doctor
from p2pllm.cli.doctor import Finding, Verdict
from tests.cli.conftest import Terminal


@pytest.fixture
def findings(monkeypatch: pytest.MonkeyPatch) -> list[Finding]:
    found: list[Finding] = []
    monkeypatch.setattr(doctor, "_all", lambda *_: iter(found))
    return found


def test_a_failure_is_told_with_advice_and_exit_code_1(
    terminal: Terminal, findings: list[Finding]
) -> None:
    findings += [
        Finding("clock", Verdict.OK, "fine"),
        Finding("ports", Verdict.FAIL, "none", "do this"),
    ]
    result = terminal.type("doctor")
    assert result.exit_code == 1
    assert result.stdout.splitlines() == [
        "ok    clock      fine",
        "fail  ports      none",
        "                 → do this",
    ]


def test_a_warning_is_no_failure(terminal: Terminal, findings: list[Finding]) -> None:
    findings.append(Finding("loop", Verdict.WARN, "asyncio", "install uvloop"))
    result = terminal.type("doctor", "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["findings"][0]["verdict"] == "warn"


def test_a_cache_that_cannot_be_written_fails_and_says_how_to_move_it(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (home / "file").write_text("")
    monkeypatch.setenv("P2PLLM_CACHE", str(home / "file" / "cache"))
    (finding,) = doctor._cache()
    assert finding.verdict is Verdict.FAIL
    assert "P2PLLM_CACHE" in finding.advice


def test_a_port_in_use_is_noticed() -> None:
    with socket.create_server(("0.0.0.0", 0)) as server:
        assert doctor._cannot_bind(server.getsockname()[1]) == "in use"
    assert doctor._cannot_bind(0) == ""


@pytest.mark.parametrize(
    ("age_s", "verdict"),
    [
        (0, Verdict.OK),
        (60, Verdict.OK),
        (-30, Verdict.OK),
        (-90, Verdict.FAIL),
        (300, Verdict.FAIL),
    ],
)
def test_clocks_are_compared_with_the_newest_record(age_s: float, verdict: Verdict) -> None:
    assert doctor._skew(time.time() - age_s).verdict is verdict
