"""What the extension does besides kernels."""

from pathlib import Path

import pytest
import torch

from vlcore import native

SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def on_huge_pages() -> int:
    """Bytes of this process's memory."""
    lines = Path("/proc/self/smaps").read_text().splitlines()
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("AnonHugePages"))


@pytest.mark.skipif(native.cpp is None, reason="vlcore was built without its C++ extension")
@pytest.mark.skipif(
    not SETTING.exists() or "[never]" in SETTING.read_text(), reason="this system has no transparent huge pages"
)
def test_memory_that_is_wanted_on_huge_pages_is_there():
    before = on_huge_pages()
    kept = native.prefer_huge_pages(torch.empty(64 * 2**20, dtype=torch.uint8)).zero_()
    assert on_huge_pages() - before > kept.nbytes // 2


@pytest.mark.parametrize("size", [0, 1, 5000])
def test_memory_too_small_for_a_page_is_left_alone(size):
    tensor = torch.arange(size, dtype=torch.uint8)
    assert native.prefer_huge_pages(tensor) is tensor
    assert torch.equal(tensor, torch.arange(size, dtype=torch.uint8))
