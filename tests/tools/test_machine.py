"""What /proc says."""

import ctypes
import mmap
import os
import subprocess
import sys

from tools.benchmarks._machine import (
    cpu_model,
    describe,
    memory_of,
    num_children,
    own_memory,
    parent_of,
    resident_bytes,
)

STATUS = """Name:\tpython
VmPeak:\t 9000000 kB
VmHWM:\t  620000 kB
VmRSS:\t  606208 kB
RssAnon:\t  462848 kB
RssFile:\t  143360 kB
Threads:\t12
"""


def test_memory_is_read_in_bytes() -> None:
    assert memory_of(STATUS) == {
        "rss": 606208 * 1024,
        "peak": 620000 * 1024,
        "files": 143360 * 1024,
    }


def test_a_system_that_says_nothing_of_memory_gives_zeros() -> None:
    assert memory_of("Name:\tpython\n") == {"rss": 0, "peak": 0, "files": 0}


def test_our_own_memory_is_that_of_a_python() -> None:
    memory = own_memory()

    assert 2**20 < memory["files"] < memory["rss"] <= memory["peak"]


def test_the_cpu_is_named_by_the_first_of_its_cores() -> None:
    text = "processor\t: 0\nmodel name\t: AMD EPYC 9B14\n\nprocessor\t: 1\nmodel name\t: other\n"

    assert cpu_model(text) == "AMD EPYC 9B14"
    assert cpu_model("processor\t: 0\n") == ""


def test_a_parent_is_found_behind_any_name() -> None:
    assert parent_of("42 (a ) b (c) S 7 42 42 0 -1") == 7


def test_children_are_counted_while_they_run() -> None:
    before = num_children(os.getpid())
    command = [sys.executable, "-c", "input()"]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as child:
        during = num_children(os.getpid())
        child.kill()

    assert (during - before, num_children(os.getpid())) == (1, before)


def test_pages_that_nobody_has_touched_are_not_resident() -> None:
    pages = mmap.mmap(-1, 64 * mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        pages.madvise(mmap.MADV_NOHUGEPAGE)  # or one touch may bring in many
    address = ctypes.addressof(ctypes.c_char.from_buffer(pages))
    for number in range(16):
        pages[number * mmap.PAGESIZE] = 1

    assert resident_bytes(address, len(pages)) == 16 * mmap.PAGESIZE
    assert resident_bytes(address + 100, 10) == 10


def test_settings_of_openmp_are_told_as_given_and_as_used() -> None:
    used = {"GOMP_SPINCOUNT": "5000", "OMP_NUM_THREADS": "1"}

    machine = describe({"OMP_NUM_THREADS": "1"}, used)

    assert machine["OMP_NUM_THREADS"] == "1"
    assert machine["GOMP_SPINCOUNT"] == "not set; p2pllm: 5000"
    assert describe({}, {})["GOMP_SPINCOUNT"] == "not set"
