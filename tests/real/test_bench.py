"""Every benchmark that runs servers works, with real processes, at its smallest size."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).resolve().parents[2] / "tools" / "bench"

pytestmark = pytest.mark.slow(240)


def bench(directory: Path, *arguments: str) -> tuple[dict[str, Any], str]:
    """The result as an object, and what was printed."""
    file = directory / "result.json"
    command = [sys.executable, str(BENCH), *arguments, "--quick", "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(file.read_text())
    return result, done.stdout


def test_load_reports_streams_baselines_disturbance_and_memory(tmp_path: Path) -> None:
    result, printed = bench(tmp_path, "load", "--disturb-prompt", "200", "--disturb-every", "1")

    (row,) = result["load"]
    assert row["requests"] >= 2
    assert "failed" not in row
    assert row["in_all_to_transformers"] > 0
    assert row["in_all_to_plain"] > 0
    assert row["bytes_per_token_hop"] == 2 * 576 * 2  # there and back, of a bfloat16 state
    assert result["disturbed"][0]["prompts"] == 1
    assert [server["processes"] for server in result["memory"]] == [1, 1]
    assert json.loads(printed) == result


def test_hop_reports_overhead_and_compares_it_with_real_blocks(tmp_path: Path) -> None:
    result, printed = bench(tmp_path, "hop", "--markdown")

    (row,), (check,) = result["overhead"], result["beside_real_blocks"]
    assert 0 < row["ms_per_hop"] < row["ms_per_token"]
    assert row["server_cpu_ms_per_token"] > 0
    assert check["blocks_alone_ms"] > 0
    assert printed.startswith("## `tools/bench hop")
    assert "### beside real blocks" in printed


def test_prefill_reports_time_to_first_token_beside_what_the_hops_computed(tmp_path: Path) -> None:
    result, _ = bench(tmp_path, "prefill")

    (row,) = result["prefill"]
    assert 0 < row["slowest_hop_ms"] < row["all_hops_ms"] < row["ttft_p50_ms"]
    assert row["transformers_ms"] > 0


def test_wire_reports_bytes_and_errors_of_every_codec(tmp_path: Path) -> None:
    result, _ = bench(tmp_path, "wire")

    rows = {(row["states"], row["codec"]): row for row in result["codecs"]}
    assert rows["1 token", "raw"]["error_at_10"] == 0
    assert rows["1 token", "raw"]["bytes_per_token"] == 1152
    assert 0 < rows["prompt of 256", "int8"]["error_at_10"] < 0.02
    assert rows["prompt of 256", "int8"]["bytes_per_token"] == 594


def test_forward_reports_tokens_per_second_beside_one_process(tmp_path: Path) -> None:
    result, _ = bench(tmp_path, "forward")

    (row,) = result["forward"]
    assert row["tokens_per_s"] > 0
    assert row["ratio_to_blocks_alone"] > 0
    assert row["ratio_to_transformers"] > 0


def test_soak_reports_memory_and_that_all_pages_are_free_again(tmp_path: Path) -> None:
    result, _ = bench(tmp_path, "soak")

    (row,) = result["soak"]
    assert row["finished"] > 0
    assert (row["failed"], row["most_pages_not_free"]) == (0, 0)
    assert all(reading["sessions"] == 0 for reading in result["readings"])
