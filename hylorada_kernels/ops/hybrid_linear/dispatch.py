"""Which kernels and tiles hybrid_linear takes on a GPU: the rule, its table, and what was measured instead of it.

    tokens <= 16                                  one pass: a single launch that streams the weight once
    norm not known, tokens <= 256, rank <= 32     one pass, which makes the norm on the way
    in-features <= fused_up_to                    fused: h = x A^T, then one product that ends in the blend
    else                                          library: h = x A^T, cuBLAS for x W^T, then the blend in place

The library's product is faster, but the blend then reads and writes y once more: that is 2 F / (K BW) of the product's
time, and it costs a second rounding of y in 16 bits. `fused_up_to` is where the two meet; `hylorada_kernels tune`
measures it.
"""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

from .._tl import next_power_of_two, target_architecture

logger = logging.getLogger(__name__)

ROUTES = ("one_pass", "fused", "library")
DECODE_TOKENS = 16
ONE_PASS_TOKENS = 256
# up to this rank the low-rank products fit into the registers of a kernel that does something else too
FUSED_RANK = 32


class Tile(NamedTuple):
    """Edges of a program's tile (rows, columns, depth) and how it is compiled."""

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int


class Machine(NamedTuple):
    """What one architecture gets. The in-features are modelled from published efficiencies, none was measured here."""

    fused_up_to: int
    # tiles of the large products in 16 bits, and of those with A and B
    gemm: Tile
    low_rank: Tile
    # whether blocks are fetched by the copy engine, through tensor descriptors
    has_descriptors: bool = False


_GEMM = Tile(128, 128, 64, 8, 3)
_LOW_RANK = Tile(128, 64, 64, 8, 3)
MACHINES: dict[int | str, Machine] = {
    80: Machine(2250, _GEMM, _LOW_RANK),
    86: Machine(2950, Tile(128, 128, 32, 8, 3), _LOW_RANK),
    89: Machine(2950, Tile(128, 128, 32, 8, 3), _LOW_RANK),
    90: Machine(7900, _GEMM, _LOW_RANK, has_descriptors=True),
    100: Machine(7900, Tile(64, 128, 64, 4, 3), _LOW_RANK, has_descriptors=True),
    120: Machine(2950, Tile(64, 128, 32, 8, 3), _LOW_RANK),
    "gfx942": Machine(2250, Tile(128, 128, 64, 8, 2), Tile(128, 64, 64, 8, 2)),
}
# for a GPU that is not in the table
UNKNOWN = Machine(2250, Tile(64, 64, 32, 4, 2), Tile(64, 64, 32, 4, 2))
# without a driver, that is in the interpreter: small tiles, and nothing that only speed asks for
INTERPRETED = Machine(2**31, Tile(32, 32, 32, 4, 1), Tile(32, 32, 32, 4, 1))
# an fp32 product runs on plain multipliers, whose operands all stand in registers: small tiles, and the library's is
# better whenever it has more than a few tokens to work on
_FP32 = Machine(0, Tile(64, 64, 16, 4, 2), Tile(64, 16, 16, 4, 2))

# rows that do not begin at multiples of 16 bytes are loaded element by element, with a 64-bit address each
_UNALIGNED_GEMM, _UNALIGNED_LOW_RANK = Tile(64, 64, 32, 4, 3), Tile(32, 32, 32, 4, 3)

_forced: ContextVar[str | None] = ContextVar("hylorada_route", default=None)


def machine(dtype: torch.dtype, *, is_aligned: bool = True) -> Machine:
    """What the next launch for activations of this dtype is tuned for. is_aligned: whether rows have 16-byte steps."""
    architecture = target_architecture()
    if architecture is None:
        return INTERPRETED
    if dtype == torch.float32:
        return _FP32
    known = MACHINES.get(architecture, UNKNOWN)
    if not is_aligned:
        known = known._replace(gemm=_UNALIGNED_GEMM, low_rank=_UNALIGNED_LOW_RANK, has_descriptors=False)
    measured = _measured_switch_over()
    return known if measured is None else known._replace(fused_up_to=measured)


def forward_route(
    tokens: int, columns: int, rank: int, dtype: torch.dtype, *, knows_norm: bool, has_dropout: bool
) -> str:
    """One of ROUTES for x (tokens, columns). `knows_norm`: given, or not needed."""
    fits_one_pass = rank <= FUSED_RANK and not has_dropout
    forced = _forced.get()
    if forced == "one_pass" and not fits_one_pass:
        raise ValueError(
            f"one pass takes ranks up to {FUSED_RANK} and no dropout, got rank {rank}"
            + (" with dropout" if has_dropout else "")
        )
    if forced is not None:
        return forced
    if fits_one_pass and (tokens <= DECODE_TOKENS or (not knows_norm and tokens <= ONE_PASS_TOKENS)):
        return "one_pass"
    return "fused" if columns <= machine(dtype).fused_up_to else "library"


@contextmanager
def taking(route: str) -> Iterator[None]:
    """Run a block with one route whatever the rule says: for tests, and to measure where the rule should switch."""
    if route not in ROUTES:
        raise ValueError(f"taking({route!r}): the routes are {', '.join(ROUTES)}")
    token = _forced.set(route)
    try:
        yield
    finally:
        _forced.reset(token)


def one_pass_tile(tokens: int, rank: int, dtype: torch.dtype, *, is_aligned: bool = True) -> Tile:
    """Few columns a program: the weight's rows are shared out among many programs, each of which streams its own."""
    rows = next_power_of_two(tokens, at_least=16, at_most=64 if rank <= 16 else 32)
    if target_architecture() is None:
        return Tile(min(rows, 32), 32, 32, 4, 1)
    if dtype == torch.float32:
        return Tile(min(rows, 32), 32, 16, 4, 2)
    return Tile(rows, 32, 64, 4, 3) if is_aligned else Tile(min(rows, 32), 32, 32, 4, 2)


def rank_block(rank: int, thin: Tile) -> int:
    """How many ranks a tile holds."""
    return next_power_of_two(rank, at_least=16, at_most=thin.columns)


def tuning_file(gpu: str) -> Path | None:
    """Where `hylorada_kernels tune` keeps what it measured on a GPU of this name; None without a home directory."""
    name = "".join(character if character.isalnum() else "-" for character in gpu)
    try:
        return Path.home() / ".cache" / "hylorada_kernels" / f"{name}.json"
    except RuntimeError:
        return None


@cache
def _measured_switch_over() -> int | None:
    if not torch.cuda.is_available():
        return None
    return read_tuning(tuning_file(torch.cuda.get_device_name()))


def read_tuning(path: Path | None) -> int | None:
    """`fused_up_to` from a tuning file; None without one. A damaged file is reported and left aside."""
    if path is None:
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))["fused_up_to"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("cannot read %s (%s): using the defaults; run `hylorada_kernels tune` again", path, error)
        return None
    if not isinstance(value, int) or value < 0:
        logger.warning("%s says fused_up_to=%r, not a number of in-features: using the defaults", path, value)
        return None
    return value
