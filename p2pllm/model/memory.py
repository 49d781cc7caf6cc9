"""How much memory a device has free, and giving back what we no longer use.

On a GPU the driver says. For the CPU it is what the system would give to a new program without
swapping, and no more than what its container allows (cgroup v2): free pages alone would not count
the file cache, which is given up when somebody needs it.
"""

import ctypes
import os
from collections.abc import Sequence
from pathlib import Path

import torch

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")
# Systems without /proc/meminfo do not say what they could free: half of what is built in.
_SHARE_WHERE_UNKNOWN = 0.5


def free_memory(device: torch.device) -> int:
    """Bytes that could be allocated on a device now."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free)
    return int(min(_system_free(_MEMINFO), _cgroup_free(_CGROUP)))


def free_memories(devices: Sequence[torch.device]) -> tuple[int, ...]:
    """What each may have of it now: a device that is there twice has half for each."""
    return tuple(free_memory(device) // devices.count(device) for device in devices)


def return_freed(device: torch.device | None = None) -> None:
    """Give memory that was freed back to the system, where the C library can be asked to.

    glibc keeps pieces of up to 32 MiB for later. After the blocks of the default model are loaded
    in int4 that is 120 MiB of conversions which nobody needs again, twice what the weights take.
    On a GPU torch keeps everything, and other processes may want it.
    """
    if device is not None and device.type == "cuda":
        torch.cuda.empty_cache()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _system_free(meminfo: Path) -> int:
    try:
        lines = meminfo.read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) * 1024
    built_in = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return int(built_in * _SHARE_WHERE_UNKNOWN)


def _cgroup_free(cgroup: Path) -> float:
    """What the limit of our cgroup leaves; infinity if there is none."""
    try:
        limit = (cgroup / "memory.max").read_text().strip()
        used = int((cgroup / "memory.current").read_text())
        statistics = (cgroup / "memory.stat").read_text().split()
    except (OSError, ValueError):
        return float("inf")
    if not limit.isdecimal():  # "max"
        return float("inf")
    cached = dict(zip(statistics[::2], statistics[1::2], strict=False)).get("inactive_file", "0")
    return max(0, int(limit) - used + int(cached))
