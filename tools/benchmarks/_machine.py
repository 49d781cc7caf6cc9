"""Which machine this is, and what a process takes of it (Linux's /proc).

Every result names the machine, because figures of different ones must not be compared.
"""

import ctypes
import mmap
import os
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PROC = Path("/proc")
OPENMP = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


def describe(given: Mapping[str, str], used: Mapping[str, str]) -> dict[str, Any]:
    """The machine as it is now, and OpenMP's settings: as they were given and, where p2pllm has
    set what was not set, as the programs use them."""
    return {
        "cpu": cpu_model(_read(PROC / "cpuinfo")) or platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": _version("torch"),
        "transformers": _version("transformers"),
        "uvloop": _version("uvloop"),
        **{name: _setting(name, given, used) for name in OPENMP},
    }


def _setting(name: str, given: Mapping[str, str], used: Mapping[str, str]) -> str:
    if name in given:
        return given[name]
    return f"not set; p2pllm: {used[name]}" if name in used else "not set"


def cpu_model(cpuinfo: str) -> str:
    """The first model name in /proc/cpuinfo."""
    for line in cpuinfo.splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return ""


def memory_of(status: str) -> dict[str, int]:
    """Bytes from /proc/PID/status: `rss` now, `peak` so far, `files` is rss's part that is mapped
    from files (the libraries' code)."""
    names = {"VmRSS": "rss", "VmHWM": "peak", "RssFile": "files"}
    found = dict.fromkeys(names.values(), 0)
    for line in status.splitlines():
        name, _, value = line.partition(":")
        if name in names:
            found[names[name]] = int(value.split()[0]) * 1024
    return found


def own_memory() -> dict[str, int]:
    """`memory_of` this process."""
    return memory_of(_read(PROC / "self" / "status"))


def num_children(parent: int) -> int:
    """How many processes it has started that still run."""
    stats = (_read(path) for path in PROC.glob("[0-9]*/stat"))
    return sum(parent_of(stat) == parent for stat in stats if stat)


def parent_of(stat: str) -> int:
    """The parent's id in /proc/PID/stat, whose second field may hold anything in brackets."""
    return int(stat.rpartition(")")[2].split()[1])


def resident_bytes(address: int, num_bytes: int) -> int:
    """How much of a piece of our memory there really is: pages that nobody has touched are not."""
    start = address - address % mmap.PAGESIZE
    length = address + num_bytes - start
    present = (ctypes.c_ubyte * -(-length // mmap.PAGESIZE))()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mincore(ctypes.c_void_p(start), ctypes.c_size_t(length), present):
        raise OSError(ctypes.get_errno(), "mincore")
    return min(num_bytes, sum(flag & 1 for flag in present) * mmap.PAGESIZE)


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:  # no such system, or the process has ended
        return ""


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"
