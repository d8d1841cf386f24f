"""Measures the peak memory of a block of code, on the GPU or of the process."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

_MIB = 2**20


@dataclass
class PeakMemory:
    """What `peak_memory` saw, once its block has ended.

    mib: the peak, in MiB
    source: "cuda" (the allocator's peak), "process" (largest resident size inside the block) or "process lifetime"
        (the same since the process started, where the system cannot reset it)
    """

    mib: float | None = None
    source: str = ""


@contextmanager
def peak_memory() -> Iterator[PeakMemory]:
    """Measure the peak memory of a block: of the GPU's allocator where there is a GPU, else of the whole process."""
    peak = PeakMemory()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        yield peak
        peak.mib, peak.source = torch.cuda.max_memory_allocated() / _MIB, "cuda"
        return
    peak.source = "process" if _reset_resident_peak() else "process lifetime"
    yield peak
    peak.mib = _resident_peak_mib()


def _reset_resident_peak() -> bool:
    try:
        # the kernel's documented way: 5 sets the peak resident size back to the present one
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _resident_peak_mib() -> float:
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        import resource

        # macOS counts in bytes, the other systems in KiB
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / _MIB
    peak_kib = next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(peak_kib) / 1024
