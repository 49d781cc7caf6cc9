"""Free memory, as the system and its containers tell it."""

from pathlib import Path

import pytest
import torch

from p2pllm.model import memory
from p2pllm.model.memory import free_memories, free_memory

CPU = torch.device("cpu")


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A computer with 8 GiB available and no container."""
    (tmp_path / "meminfo").write_text("MemTotal: 16777216 kB\nMemAvailable:    8388608 kB\n")
    monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "_CGROUP", tmp_path / "cgroup")
    return tmp_path


def limit(system: Path, max_bytes: str, used: int, cached: int) -> None:
    (system / "cgroup").mkdir()
    (system / "cgroup" / "memory.max").write_text(f"{max_bytes}\n")
    (system / "cgroup" / "memory.current").write_text(f"{used}\n")
    (system / "cgroup" / "memory.stat").write_text(f"anon 5\ninactive_file {cached}\n")


def test_this_computer_has_some() -> None:
    assert free_memory(CPU) > 2**20


def test_it_is_what_the_system_says_is_available(system: Path) -> None:
    assert free_memory(CPU) == 8 * 2**30


def test_a_container_may_have_less(system: Path) -> None:
    limit(system, str(4 * 2**30), used=3 * 2**30, cached=2**30)
    assert free_memory(CPU) == 2 * 2**30


def test_a_container_without_a_limit_has_it_all(system: Path) -> None:
    limit(system, "max", used=3 * 2**30, cached=0)
    assert free_memory(CPU) == 8 * 2**30


def test_a_container_that_is_over_its_limit_has_none(system: Path) -> None:
    limit(system, str(2**30), used=2 * 2**30, cached=0)
    assert free_memory(CPU) == 0


def test_half_of_what_is_built_in_where_the_system_does_not_say(system: Path) -> None:
    (system / "meminfo").unlink()
    assert 0 < free_memory(CPU) < 2**50


def test_a_device_that_is_there_twice_has_half_for_each(system: Path) -> None:
    assert free_memories((CPU, CPU)) == (4 * 2**30, 4 * 2**30)
