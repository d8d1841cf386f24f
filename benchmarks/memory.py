"""Bytes that a forward pass keeps for its backward, and the most that a piece of code holds at one time, on the CPU."""

import json
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

MIB = 2**20


def saved_bytes(forward: Callable[[], Tensor], given: Iterable[Tensor]) -> tuple[int, int]:
    """Bytes of the distinct storages that autograd keeps for the backward of forward(), those of `given` left out.

    Returns them without, and with, the storage of the result itself.
    """
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = forward()
    for tensor in given:
        kept.pop(tensor.untyped_storage().data_ptr(), None)
    with_result = sum(storage.nbytes() for storage in kept.values())
    kept.pop(result.untyped_storage().data_ptr(), None)
    return sum(storage.nbytes() for storage in kept.values()), with_result


def peak_bytes(function: Callable[[], None]) -> int:
    """The most bytes that PyTorch's CPU allocator handed out at one time during function(), beyond those before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    held = peak = 0
    for event in sorted((event for event in events if event.get("name") == "[memory]"), key=lambda event: event["ts"]):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak
