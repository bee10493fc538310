"""What the extension does besides kernels."""

import mmap
import re
from pathlib import Path

import pytest
import torch

from vlcore import native

SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
SIZE = 64 * 2**20


def fresh() -> torch.Tensor:
    """Memory that the system has just given: an allocator could hand out what another tensor asked for and left."""
    return torch.frombuffer(mmap.mmap(-1, SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), dtype=torch.uint8)


def flags(tensor: torch.Tensor) -> list[str]:
    """What the system was told of the memory that the middle of a tensor lies in."""
    address, inside = tensor.data_ptr() + tensor.nbytes // 2, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if match := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(match[1], 16) <= address < int(match[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return line.split()[1:]
    raise AssertionError(f"{address:x} is not in /proc/self/smaps")


@pytest.mark.skipif(native.cpp is None, reason="vlcore was built without its C++ extension")
@pytest.mark.skipif(not SETTING.exists(), reason="this system has no transparent huge pages")
def test_the_system_is_asked_for_huge_pages():
    """Whether it has any to give depends on what else is in its memory."""
    plain, wanted = fresh(), fresh()
    native.prefer_huge_pages(wanted)
    assert "hg" in flags(wanted) and "hg" not in flags(plain)


@pytest.mark.parametrize("size", [0, 1, 5000])
def test_memory_too_small_for_a_page_is_left_alone(size):
    tensor = torch.arange(size, dtype=torch.uint8)
    assert native.prefer_huge_pages(tensor) is tensor
    assert torch.equal(tensor, torch.arange(size, dtype=torch.uint8))
