"""Triton helpers that several kernels share."""

from typing import Any

import triton
import triton.language as tl
from triton.runtime.driver import driver


@triton.jit
def tile_of(pid, rows, columns, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, GROUP: tl.constexpr):
    """(row tile, column tile) of a program: GROUP row tiles share their column tiles in the second-level cache."""
    row_tiles = tl.cdiv(rows, BLOCK_ROWS)
    column_tiles = tl.cdiv(columns, BLOCK_COLUMNS)
    group = pid // (GROUP * column_tiles)
    first = group * GROUP
    size = tl.minimum(row_tiles - first, GROUP)
    within = pid % (GROUP * column_tiles)
    return first + within % size, within // size


def target_architecture() -> int | str | None:
    """What the next launch is compiled for: 80, 90, ..., "gfx942"; None where there is no driver (the interpreter)."""
    try:
        return driver.active.get_current_target().arch
    except RuntimeError:
        return None


def launch_options(tile: Any) -> dict[str, int | bool]:
    """How a tile is compiled. Fused multiply-add is pinned, as its default differs between releases of Triton."""
    return {"num_warps": tile.num_warps, "num_stages": tile.num_stages, "enable_fp_fusion": True}


def next_power_of_two(value: int, *, at_least: int, at_most: int) -> int:
    """The tile edge that holds `value`, within bounds."""
    return max(at_least, min(at_most, triton.next_power_of_2(max(value, 1))))
