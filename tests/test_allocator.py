"""Freed memory stays with the process, in threads too: else each step would fault its blocks in again."""

import platform
import subprocess
import sys

import pytest

STEPS = """
import resource, sys, threading, torch
from medusa_ray.medusa import allocator
if sys.argv[1] == "keeps":
    allocator.keep_freed_memory()

def step():
    blocks = [torch.ones(10_000_000) for _ in range(2)]  # of 40 MB, more than glibc keeps by itself

def faults_of_later_steps():
    for _ in range(20):  # until blocks have found their places
        step()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        step()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

if sys.argv[2] == "thread":
    thread = threading.Thread(target=faults_of_later_steps)
    thread.start()
    thread.join()
else:
    faults_of_later_steps()
"""


def num_faults(*arguments: str) -> int:
    done = subprocess.run(
        [sys.executable, "-c", STEPS, *arguments], capture_output=True, text=True, check=True
    )
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another libc, another allocator")
@pytest.mark.parametrize("where", ["main", "thread"])
def test_later_steps_get_the_memory_of_earlier_ones(where: str):
    """Five steps touch 400 MB, or 100,000 pages of 4 KiB. Fewer than 1,000 faults are Python's own."""
    assert num_faults("keeps", where) < 1000
    assert num_faults("as it was", where) > 10 * 1000
