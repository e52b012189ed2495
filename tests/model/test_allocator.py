"""Memory that is freed stays with the process, unless the user has set up the allocator."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

PROBE = """
import ctypes, resource
from coderl.model.allocator import keep_freed_memory

print(keep_freed_memory())
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
size = 64 << 20

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = libc.malloc(size)
    ctypes.memset(block, 1, size)
    libc.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

first = faults()
print(faults() < first / 10)
"""


@pytest.mark.parametrize(
    ("environment", "expected"),
    [({}, ["True", "True"]), ({"MALLOC_TRIM_THRESHOLD_": "131072"}, ["False", "False"])],
)
def test_a_large_block_is_not_taken_from_the_system_twice(
    environment: dict[str, str], expected: list[str]
) -> None:
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("this machine's C library is not glibc")
    done = subprocess.run(
        [sys.executable, "-c", PROBE],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == expected
