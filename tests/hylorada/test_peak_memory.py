"""Peak memory of a block, and of nothing before it."""

import pytest
import torch

from hylorada.peak_memory import peak_memory

MIB = 2**20


def touch(mib: int) -> torch.Tensor:
    return torch.ones(mib * MIB, dtype=torch.uint8)


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, its allocator is what is measured")
def test_freed_memory_inside_the_block_counts():
    with peak_memory() as nothing:
        pass
    with peak_memory() as peak:
        del_me = touch(300)
        del del_me
    assert 290 < peak.mib - nothing.mib < 400


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, its allocator is what is measured")
def test_memory_freed_before_the_block_does_not_count():
    with peak_memory() as before:
        big = touch(300)
    del big
    with peak_memory() as peak:
        pass
    if peak.source == "process lifetime":
        pytest.skip("this system cannot reset a process's peak")
    assert before.mib - peak.mib > 250
