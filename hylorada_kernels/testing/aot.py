"""Compile kernels ahead of time for real GPUs, through their own host wrappers, and read what came of it.

    with aot("sm90") as compiled:
        hybrid_linear(*meta_tensors, scale=0.5)
    for name, constexprs, kernel in compiled:
        report = inspect(kernel, "sm90")
        assert report.spill_stores == 0 and report.shared_bytes <= report.shared_limit, (name, constexprs)

Nothing runs and no driver is needed. Triton caches compiles in its own folder, so a second run is fast; every figure is
read from the compiled artefact, so it is there after a cache hit too.
"""

import functools
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

from .interpreter import install


@dataclass(frozen=True)
class Target:
    """A GPU to compile for: `shared_limit` is shared memory a block may use, in bytes; `sms` a usual number of SMs."""

    name: str
    backend: str
    arch: int | str
    warp_size: int
    shared_limit: int
    sms: int


TARGETS = {
    target.name: target
    for target in (
        Target("sm80", "cuda", 80, 32, 163 * 1024, 108),
        Target("sm86", "cuda", 86, 32, 99 * 1024, 84),
        Target("sm89", "cuda", 89, 32, 99 * 1024, 128),
        Target("sm90", "cuda", 90, 32, 227 * 1024, 132),
        Target("sm100", "cuda", 100, 32, 227 * 1024, 148),
        Target("sm120", "cuda", 120, 32, 99 * 1024, 170),
        Target("gfx942", "hip", "gfx942", 64, 64 * 1024, 304),
    )
}


class Compiled(NamedTuple):
    """A compiled launch: kernel name, constexpr arguments and launch options, and Triton's CompiledKernel."""

    name: str
    constexprs: dict[str, Any]
    kernel: Any


@dataclass(frozen=True)
class Report:
    """What a compiled kernel costs and uses; spills and stack in bytes a thread, counted over the program text."""

    target: str
    registers: int
    spill_stores: int
    spill_loads: int
    stack_bytes: int
    shared_bytes: int
    shared_limit: int
    matrix_instructions: tuple[str, ...]
    async_copies: tuple[str, ...]
    global_atomics: tuple[str, ...]


# what a launch may ask for in x, y and z
_GRID_LIMITS = (2**31 - 1, 65535, 65535)


def target_named(name: str) -> Target:
    if name not in TARGETS:
        raise ValueError(f"unknown target {name!r}; known: {', '.join(TARGETS)}")
    return TARGETS[name]


@contextmanager
def aot(target: str) -> Iterator[list[Compiled]]:
    """Compile every launch on meta tensors inside for the named target, into a list of Compiled.

    An autotuned kernel is compiled once for each configuration that pruning leaves. Floating-point fusion is on unless
    the launch says otherwise, because Triton's default changes between versions.
    """
    session, machine = install().SESSION, target_named(target)
    from triton.runtime.driver import driver

    compiled: list[Compiled] = []
    before = driver._active, session.compile
    driver.set_active(_Driver(machine))
    session.compile = functools.partial(_compile, compiled)
    try:
        yield compiled
    finally:
        driver._active, session.compile = before


def _compile(compiled: list[Compiled], run: Callable, kernel: Any, args: tuple, kwargs: dict, grid: Any) -> Any:
    """Stands in for a launch: `run` is Triton's own, which with warmup stops short of the device."""
    from ._launch import bind, full_grid

    arguments = bind(kernel, args, kwargs)
    _check_grid(kernel.fn.__name__, full_grid(grid, arguments))
    options = {"enable_fp_fusion": True, **kwargs}
    result = run(kernel, *args, grid=grid, warmup=True, **options)
    variable = {parameter.name for parameter in kernel.params if not parameter.is_constexpr}
    constexprs = {name: value for name, value in {**arguments, **options}.items() if name not in variable}
    compiled.append(Compiled(kernel.fn.__name__, constexprs, result))
    return result


def _check_grid(name: str, grid: tuple[int, int, int]) -> None:
    if not all(0 <= size <= limit for size, limit in zip(grid, _GRID_LIMITS, strict=True)):
        raise ValueError(f"{name} was launched on the grid {grid}; a GPU takes at most {_GRID_LIMITS}")


class _Driver:
    """Stands for the driver of a GPU that is not there; host wrappers may ask it for target and properties."""

    def __init__(self, target: Target):
        from triton.backends.compiler import GPUTarget

        self._target = GPUTarget(target.backend, target.arch, target.warp_size)
        self._name = target.name
        properties = {
            "max_shared_mem": target.shared_limit,
            "multiprocessor_count": target.sms,
            "warpSize": target.warp_size,
        }
        self.utils = SimpleNamespace(get_device_properties=lambda device: properties)

    def get_current_target(self):
        return self._target

    def get_current_device(self):
        # Triton keeps compiled kernels by device: one set for each target
        return self._name

    def get_current_stream(self, device=None):
        return 0

    def get_active_torch_device(self):
        return torch.device("meta")

    def map_python_to_cpp_type(self, ty):
        return ty


def inspect(kernel: Any, target: str) -> Report:
    """Report on a CompiledKernel that was compiled for the target named."""
    machine = target_named(target)
    if kernel.metadata.target.arch != machine.arch:
        raise ValueError(f"the kernel was compiled for {kernel.metadata.target}, not for {target}")
    return _inspect_amd(kernel, machine) if machine.backend == "hip" else _inspect_nvidia(kernel, machine)


def _inspect_nvidia(kernel: Any, target: Target) -> Report:
    usage = _nvidia_tool("cuobjdump", kernel.asm["cubin"], "--dump-resource-usage")
    code = _nvidia_tool("nvdisasm", kernel.asm["cubin"], "-c")
    return Report(
        target=target.name,
        registers=_figure(r"REG:(\d+)", usage),
        spill_stores=_sass_bytes("STL", code),
        spill_loads=_sass_bytes("LDL", code),
        stack_bytes=_figure(r"STACK:(\d+)", usage),
        shared_bytes=kernel.metadata.shared,
        shared_limit=target.shared_limit,
        matrix_instructions=_names(r"\b(?:HMMA|IMMA|QMMA|DMMA|HGMMA|QGMMA|IGMMA|UTC\w*MMA)\b", code),
        async_copies=_names(r"\b(?:LDGSTS|UTMALDG|UBLKCP)\b", code),
        # the assembler renames and splits these: the text it was given is plainer
        global_atomics=_names(
            r"\b(?:atom|red)(?:\.\w+)*\.global\b[\w.]*|\bcp\.reduce\.async\.bulk\b", kernel.asm["ptx"]
        ),
    )


def _nvidia_tool(name: str, cubin: bytes, flag: str) -> str:
    """Output of one of the binaries that ship with Triton, run on a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [_path_of(name), flag, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@functools.cache
def _path_of(name: str) -> str:
    # asking for the path starts the binary, for its version
    from triton import knobs

    return getattr(knobs.nvidia, name).path


def _figure(pattern: str, text: str) -> int:
    """The number that `pattern` captures; the largest, where the kernel and functions it calls each have one."""
    figures = re.findall(pattern, text)
    if not figures:
        raise RuntimeError(f"no {pattern!r} in what the compiler wrote: its format has changed")
    return max(map(int, figures))


def _sass_bytes(instruction: str, code: str) -> int:
    """Bytes a thread moves by the given local-memory instruction, each place in the program counted once."""
    return sum(map(_sass_width, re.findall(rf"\b{instruction}((?:\.\w+)*)\s", code)))


def _sass_width(modifiers: str) -> int:
    bits = re.search(r"\.[US]?(8|16|64|128)\b", modifiers)
    return int(bits[1]) // 8 if bits else 4


def _inspect_amd(kernel: Any, target: Target) -> Report:
    code = kernel.asm["amdgcn"]
    return Report(
        target=target.name,
        registers=_figure(r"\.vgpr_count:\s+(\d+)", code),
        spill_stores=_scratch_bytes("store", code),
        spill_loads=_scratch_bytes("load", code),
        stack_bytes=_figure(r"\.private_segment_fixed_size:\s+(\d+)", code),
        shared_bytes=kernel.metadata.shared,
        shared_limit=target.shared_limit,
        matrix_instructions=_names(r"\bv_s?mfma\w+", code),
        async_copies=_names(r"\bglobal_load_lds\w+|\bbuffer_load_\w+(?=.*\blds\b)", code),
        global_atomics=_names(r"\b(?:global|buffer|flat)_atomic\w+", code),
    )


def _scratch_bytes(direction: str, code: str) -> int:
    """Bytes a thread moves to or from scratch memory, each place in the program counted once."""
    bits = {"byte": 8, "ubyte": 8, "sbyte": 8, "short": 16, "dword": 32, "dwordx2": 64, "dwordx3": 96, "dwordx4": 128}
    return sum(bits.get(width, 32) // 8 for width in re.findall(rf"\bscratch_{direction}_([a-z]+(?:x\d)?)", code))


def _names(pattern: str, code: str) -> tuple[str, ...]:
    return tuple(sorted(set(re.findall(pattern, code))))
