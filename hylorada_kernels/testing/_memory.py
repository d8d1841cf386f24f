"""The memory one interpreted launch may touch: every access is checked for bounds and races, and counted.

Each tensor argument gets a range of virtual addresses of its own, so that a pointer always tells which argument it came
from, however far it strays, and never reaches real memory unless it is in bounds.
"""

from dataclasses import dataclass

import numpy as np
import torch

# a pointer is (argument number + 1) << 48 plus an offset around the middle of that range
_SPAN_BITS = 48
_MIDDLE = 1 << (_SPAN_BITS - 1)
# virtual addresses keep the alignment of the real ones up to a page
_PAGE = 4096

# in the maps of which program last touched an element; programs count from 1
_NOBODY = 0
_MANY = -1


class OutOfBounds(IndexError):
    """A kernel touched memory outside the tensor it addressed."""


class Race(RuntimeError):
    """Two programs of one launch, or two lanes of one store, touch the same element and at least one writes it."""


@dataclass(frozen=True)
class Bytes:
    """Distinct bytes of one kernel argument: `read` by loads, `written` by stores, both by atomics."""

    read: int
    written: int


class _Region:
    """Real memory shared by arguments that overlap, with the last programs to touch each element."""

    def __init__(self, start: int, end: int, granule: int):
        self.start, self.end, self.granule = start, end, granule
        self.writers = self.readers = self.updaters = np.zeros(0, np.int32)

    def watch(self) -> None:
        cells = -(-(self.end - self.start) // self.granule)
        # zeros cost nothing until they are touched
        self.writers, self.readers, self.updaters = (np.zeros(cells, np.int32) for _ in range(3))

    def cells(self, real: np.ndarray, width: int) -> np.ndarray:
        """Cells that elements of `width` bytes at the addresses `real` cover."""
        first = (real - self.start) // self.granule
        count = max(1, width // self.granule)
        return first if count == 1 else (first[:, None] + np.arange(count)).reshape(-1)

    def conflicts(self, kind: str, cells: np.ndarray, program: int) -> np.ndarray:
        """Mask of the cells another program touches in a way that clashes with this access, which is noted."""
        touched_by_others = {
            "load": (self.writers, self.updaters),
            "store": (self.writers, self.readers, self.updaters),
            "atomic": (self.writers, self.readers),
        }[kind]
        clash = np.zeros(cells.shape, bool)
        for owners in touched_by_others:
            owner = owners[cells]
            clash |= (owner != _NOBODY) & (owner != program)
        if kind == "store":
            self.writers[cells] = program
        else:
            owners = self.readers if kind == "load" else self.updaters
            owner = owners[cells]
            owners[cells] = np.where((owner == _NOBODY) | (owner == program), program, _MANY)
        return clash


class _Argument:
    """One tensor argument: where it lies and which of the elements in its span belong to it."""

    def __init__(self, name: str, tensor: torch.Tensor, number: int, count_traffic: bool):
        self.name = name
        self.shape, self.strides = tuple(tensor.shape), tuple(tensor.stride())
        self.itemsize = tensor.element_size()
        self.real = tensor.data_ptr()
        self.base = ((number + 1) << _SPAN_BITS) + _MIDDLE + self.real % _PAGE
        self.region: _Region | None = None
        inside = _elements_of(self.shape, self.strides)
        self.nbytes = inside.size * self.itemsize
        # None: the tensor fills its span
        self.inside = None if inside.all() else inside
        self.read, self.written = (np.zeros(inside.size if count_traffic else 0, bool) for _ in range(2))

    def elements(self, offsets: np.ndarray, width: int) -> np.ndarray:
        """Element numbers that accesses of `width` bytes at byte `offsets` cover; one row for each, if several."""
        steps = np.arange(0, width, self.itemsize)
        return (offsets // self.itemsize) if steps.size == 1 else (offsets[:, None] + steps) // self.itemsize

    def outside(self, offsets: np.ndarray, width: int) -> np.ndarray:
        """Mask of the accesses that leave the tensor, past its ends or between the rows of a strided view."""
        beyond = (offsets < 0) | (offsets + width > self.nbytes)
        if self.inside is None or beyond.any():
            return beyond
        covered = self.inside[self.elements(offsets, width)]
        return ~covered if covered.ndim == 1 else ~covered.all(1)

    def note(self, kind: str, offsets: np.ndarray, width: int) -> None:
        """Count an access towards the traffic."""
        elements = self.elements(offsets, width)
        if kind != "store":
            self.read[elements] = True
        if kind != "load":
            self.written[elements] = True

    def moved(self) -> Bytes:
        return Bytes(int(self.read.sum()) * self.itemsize, int(self.written.sum()) * self.itemsize)

    def __str__(self) -> str:
        return f"argument {self.name!r} (shape {self.shape}, strides {self.strides})"


class Memory:
    """Bounds, race and traffic checks for the pointers of one launch."""

    def __init__(self, check_races: bool, count_traffic: bool):
        self._check_races = check_races
        self._count_traffic = count_traffic
        self._program = 1
        self._grid_index = (0, 0, 0)
        self._arguments: list[_Argument] = []
        self._reachable: list[_Argument] = []

    def add(self, name: str, tensor: torch.Tensor) -> int:
        """Admit a tensor argument and return the virtual address of its first element."""
        argument = _Argument(name, tensor, len(self._arguments), self._count_traffic)
        self._arguments.append(argument)
        return argument.base

    def reach(self, name: str, tensor: torch.Tensor) -> None:
        """Admit a tensor that the kernel finds by its real address, in a table of pointers."""
        self.add(name, tensor)
        self._reachable.append(self._arguments[-1])

    def seal(self) -> None:
        """All arguments are known: find the ones that overlap and prepare to watch them."""
        regions: list[_Region] = []
        for argument in sorted((a for a in self._arguments if a.nbytes), key=lambda a: a.real):
            end = argument.real + argument.nbytes
            if regions and argument.real < regions[-1].end:
                region = regions[-1]
                region.end = max(region.end, end)
                region.granule = min(region.granule, argument.itemsize)
            else:
                region = _Region(argument.real, end, argument.itemsize)
                regions.append(region)
            argument.region = region
        if self._check_races:
            for region in regions:
                region.watch()

    def enter(self, program: int, grid_index: tuple) -> None:
        """The program that runs from now on: its number, from 1, and its place in the grid."""
        self._program, self._grid_index = program, grid_index

    def resolve(self, kind: str, pointers: np.ndarray, mask: np.ndarray, width: int) -> np.ndarray:
        """Real addresses of a "load", "store" or "atomic" of `width` bytes a lane, 0 where masked off."""
        real = np.zeros(pointers.shape, np.uint64)
        addresses = pointers[mask].astype(np.int64)
        if not addresses.size:
            return real
        for argument in self._reachable:
            by_address = (addresses >= argument.real) & (addresses < argument.real + argument.nbytes)
            addresses[by_address] += argument.base - argument.real
        owners = (addresses >> _SPAN_BITS) - 1
        if (owners == owners[0]).all():
            resolved = self._touch(kind, int(owners[0]), addresses, width)
        else:
            resolved = np.empty_like(addresses)
            for owner in np.unique(owners):
                lanes = owners == owner
                resolved[lanes] = self._touch(kind, int(owner), addresses[lanes], width)
        real[mask] = resolved.astype(np.uint64)
        return real

    def check_lanes(self, pointers: np.ndarray, mask: np.ndarray, values: np.ndarray) -> None:
        """Raise Race when two lanes of one store put different values into the same element."""
        addresses, values = pointers[mask], values[mask]
        if not self._check_races or (addresses[1:] > addresses[:-1]).all():
            return
        order = np.argsort(addresses, kind="stable")
        addresses, bits = addresses[order], values[order].view(f"u{values.itemsize}")
        if ((addresses[1:] == addresses[:-1]) & (bits[1:] != bits[:-1])).any():
            raise Race(
                f"two lanes of one store by program {self._grid_index} put different values into the same element; "
                "which one stays is undefined"
            )

    def bytes_by_argument(self) -> dict[str, Bytes]:
        """Traffic of every argument, by name; nothing but zeros without count_traffic."""
        return {argument.name: argument.moved() for argument in self._arguments}

    def _touch(self, kind: str, number: int, addresses: np.ndarray, width: int) -> np.ndarray:
        if not 0 <= number < len(self._arguments):
            raise OutOfBounds(
                f"{kind} by program {self._grid_index} at address {int(addresses[0]):#x}, which belongs to no tensor "
                "argument of this launch"
            )
        argument = self._arguments[number]
        offsets = addresses - argument.base
        self._look_for_bounds(kind, argument, offsets, width)
        if self._check_races:
            self._look_for_races(kind, argument, offsets, width)
        if self._count_traffic:
            argument.note(kind, offsets, width)
        return offsets + argument.real

    def _look_for_bounds(self, kind: str, argument: _Argument, offsets: np.ndarray, width: int) -> None:
        outside = argument.outside(offsets, width)
        if outside.any():
            raise OutOfBounds(
                f"{kind} of {int(outside.sum())} element(s) outside {argument} by program {self._grid_index}: the "
                f"first is at element offset {int(offsets[outside][0]) // argument.itemsize}"
            )

    def _look_for_races(self, kind: str, argument: _Argument, offsets: np.ndarray, width: int) -> None:
        region = argument.region
        assert region is not None, "seal() comes before the first access"
        cells = region.cells(offsets + argument.real, width)
        clash = region.conflicts(kind, cells, self._program)
        if clash.any():
            first = int(cells[clash][0]) * region.granule + region.start - argument.real
            raise Race(
                f"{kind} of {int(clash.sum())} element(s) of {argument} by program {self._grid_index}, which another "
                f"program of the same launch also touches: the first is at element offset {first // argument.itemsize}"
            )


def _elements_of(shape: tuple, strides: tuple) -> np.ndarray:
    """Mask over the span of a strided tensor: True where an element of the tensor lies."""
    if 0 in shape:
        return np.zeros(0, bool)
    inside = np.zeros(1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)), bool)
    np.lib.stride_tricks.as_strided(inside, shape, strides)[...] = True
    return inside
