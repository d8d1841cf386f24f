"""How a kernel is launched under the harness: on CPU tensors it is interpreted, on meta tensors compiled, else run.

`install()` replaces three methods of Triton's launch path, once and for the life of the process. What triton.language
means is changed only while an interpreted launch runs.
"""

import functools
import inspect
import itertools
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice
from triton.language.extra.cuda import libdevice as cuda_libdevice
from triton.runtime import interpreter as triton_interpreter
from triton.runtime.autotuner import Autotuner
from triton.runtime.interpreter import TensorHandle
from triton.runtime.jit import JITFunction, TensorWrapper, mangle_type
from triton.tools.tensor_descriptor import TensorDescriptor

from ._builder import BUILDER, NO_MEMORY, SEMANTIC, is_bf16, narrow, poisoned, spoil, widen
from ._memory import Bytes, Memory

_TRITON_FOLDER = str(Path(triton.__file__).parent)
_ABSENT = object()


@dataclass(frozen=True)
class Launch:
    """One interpreted launch: kernel name, grid, and the distinct bytes of each tensor argument."""

    kernel: str
    grid: tuple[int, int, int]
    arguments: dict[str, Bytes]

    @property
    def read(self) -> int:
        return sum(argument.read for argument in self.arguments.values())

    @property
    def written(self) -> int:
        return sum(argument.written for argument in self.arguments.values())


@dataclass
class Session:
    """What the patched methods consult; one for the process."""

    check_races: bool = True
    interpreting: bool = False
    names: list[list[str]] = field(default_factory=list)
    traffic: list[list[Launch]] = field(default_factory=list)
    # tensors that kernels find in tables of pointers
    reachable: list[list[torch.Tensor]] = field(default_factory=list)
    # aot() sets it; called instead of a launch on meta tensors, with Triton's own run, the kernel and what it was given
    compile: Callable[..., Any] | None = None


SESSION = Session()


@functools.cache
def install() -> None:
    """Route every launch by the device of its tensors; once is enough."""
    JITFunction.run = _routed_run(JITFunction.run)
    JITFunction.__call__ = _routed_call(JITFunction.__call__)
    Autotuner.run = _untimed_run(Autotuner.run)


def _routed_run(run):
    @functools.wraps(run)
    def routed(self, *args, grid, warmup, **kwargs):
        devices = _devices((*args, *kwargs.values()))
        if warmup:
            return run(self, *args, grid=grid, warmup=True, **kwargs)
        if "meta" in devices:
            if SESSION.compile is None:
                raise RuntimeError(
                    f"kernel {self.fn.__name__} was launched on meta tensors: do so inside aot(target), to compile it"
                )
            return SESSION.compile(run, self, args, kwargs, grid)
        for names in SESSION.names:
            names.append(self.fn.__name__)
        if devices == {"cpu"}:
            return _interpret(self, args, kwargs, grid)
        return run(self, *args, grid=grid, warmup=False, **kwargs)

    return routed


def _routed_call(call):
    """Let interpreted kernels call the helpers that Triton would compile into them."""

    @functools.wraps(call)
    def routed(self, *args, **kwargs):
        return _rewritten(self.fn)(*args, **kwargs) if SESSION.interpreting else call(self, *args, **kwargs)

    return routed


def _untimed_run(run):
    """Timing needs a GPU: interpret the first configuration that pruning leaves, compile all of them."""

    @functools.wraps(run)
    def untimed(self, *args, **kwargs):
        devices = _devices((*args, *kwargs.values()))
        if "meta" not in devices and devices != {"cpu"}:
            return run(self, *args, **kwargs)
        self.nargs = dict(zip(self.arg_names, args, strict=False))
        configs = self.prune_configs(kwargs)
        result = None
        for config in configs if "meta" in devices else configs[:1]:
            options = config.all_kwargs()
            if config.pre_hook:
                config.pre_hook({**self.nargs, **kwargs, **options})
            self.best_config = config
            result = self.fn.run(*args, **kwargs, **options)
        self.nargs = None
        return result

    return untimed


def _devices(values: Iterable) -> set[str]:
    found = set()
    for value in values:
        if isinstance(value, tuple | list):
            found |= _devices(value)
        elif isinstance(tensor := _unwrapped(value), torch.Tensor):
            found.add(tensor.device.type)
    return found


def _unwrapped(value):
    return value.base if isinstance(value, TensorWrapper | TensorDescriptor) else value


def _interpret(kernel: JITFunction, args: tuple, kwargs: dict, grid) -> None:
    """Run every program of the grid, one after the other, on checked memory."""
    for hook in kernel.pre_run_hooks:
        hook(*args, **kwargs)
    arguments = bind(kernel, args, kwargs)
    grid = full_grid(grid, arguments)
    memory = Memory(SESSION.check_races, bool(SESSION.traffic))
    with _interpreted_language(memory):
        function, values = _rewritten(kernel.fn), _device_values(kernel, arguments, memory)
        BUILDER.set_grid_dim(*grid)
        for program, index in enumerate(itertools.product(*map(range, grid)), start=1):
            BUILDER.set_grid_idx(*index)
            memory.enter(program, index)
            function(**values)
    for log in SESSION.traffic:
        log.append(Launch(kernel.fn.__name__, grid, memory.bytes_by_argument()))


def bind(kernel: JITFunction, args: tuple, kwargs: dict) -> dict[str, Any]:
    """The kernel's arguments by name, without launch options such as num_warps."""
    named = {name: value for name, value in kwargs.items() if name in kernel.signature.parameters}
    bound = kernel.signature.bind(*args, **named)
    bound.apply_defaults()
    return bound.arguments


def full_grid(grid, arguments: dict[str, Any]) -> tuple[int, int, int]:
    x, y, z = (*(grid(arguments) if callable(grid) else grid), 1, 1)[:3]
    return x, y, z


@contextmanager
def _interpreted_language(memory: Memory) -> Iterator[None]:
    if SESSION.interpreting:
        raise RuntimeError("a kernel was launched from within a kernel that is being interpreted")
    SESSION.interpreting, BUILDER.memory = True, memory
    try:
        # a GPU computes inf and NaN without a word
        with _language_patches().applied(), np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            yield
    finally:
        SESSION.interpreting, BUILDER.memory = False, NO_MEMORY


def _device_values(kernel: JITFunction, arguments: dict[str, Any], memory: Memory) -> dict[str, Any]:
    """The arguments as the kernel sees them; every tensor becomes known to the memory."""
    constexprs = {parameter.name for parameter in kernel.params if parameter.is_constexpr}
    values = {
        name: value if name in constexprs else _device_value(memory, name, value) for name, value in arguments.items()
    }
    for number, tensor in enumerate(itertools.chain.from_iterable(SESSION.reachable)):
        memory.reach(f"reachable[{number}]", tensor)
    memory.seal()
    return values


def _device_value(memory: Memory, name: str, value):
    if isinstance(value, tl.constexpr):
        return value.value
    if isinstance(value, bool):
        return _scalar(value, np.bool_, tl.int1)
    if isinstance(value, float):
        # float32 on the device, whatever it meets: a Python float would adopt the type of the other operand
        return _scalar(value, np.float32, tl.float32)
    if isinstance(value, tuple):
        items = [_device_value(memory, f"{name}[{number}]", item) for number, item in enumerate(value)]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    if isinstance(value, TensorDescriptor):
        return _descriptor(memory, name, value)
    if hasattr(value, "data_ptr"):
        return _scalar(memory.add(name, _unwrapped(value)), np.uint64, tl.str_to_ty(mangle_type(value), None))
    return triton_interpreter._implicit_cvt(value)


def _scalar(value, numpy_type, triton_type) -> tl.tensor:
    return tl.tensor(TensorHandle(np.array([value], numpy_type), triton_type), triton_type)


def _descriptor(memory: Memory, name: str, value: TensorDescriptor):
    descriptor = SEMANTIC.make_tensor_descriptor(
        base=_device_value(memory, name, value.base),
        shape=[triton_interpreter._implicit_cvt(size) for size in value.shape],
        strides=[*map(triton_interpreter._implicit_cvt, value.strides[:-1]), tl.constexpr(1)],
        block_shape=[tl.constexpr(size) for size in value.block_shape],
        padding_option=value.padding,
    )
    # an option since Triton 3.7
    descriptor.handle.round_f32_to_tf32 = getattr(value, "round_f32_to_tf32", False)
    return descriptor


class _Rewriter(triton_interpreter.FunctionRewriter):
    """Triton's rewriting of a kernel for the interpreter, without its habit of filling the kernel's module."""

    def _compile_and_exec(self, transformed_ast):
        # Triton would add all names of its own module, and a missing import would go unnoticed
        kernel_globals = self.fn.__globals__
        kernel_globals["interpreter_semantic"] = SEMANTIC
        # what chained comparisons become since Triton 3.9
        if hasattr(triton_interpreter, "_InterpreterComparison"):
            kernel_globals["_InterpreterComparison"] = triton_interpreter._InterpreterComparison
        namespace: dict[str, Any] = {}
        exec(compile(transformed_ast, self.filename, "exec"), kernel_globals, namespace)
        return namespace[self.fn.__name__]


@functools.cache
def _rewritten(function: Callable) -> Callable:
    return _Rewriter(function).rewrite_ast()


class _Patches:
    """Attributes to replace and to put back; recorded once, because looking for them is slow."""

    def __init__(self) -> None:
        self._changes: list[tuple[Any, str, Any]] = []

    def set_attr(self, owner: Any, name: str, value: Any) -> None:
        """Triton's own patching functions record through this method too."""
        self._changes.append((owner, name, value))

    @contextmanager
    def applied(self) -> Iterator[None]:
        before = []
        try:
            for owner, name, value in self._changes:
                before.append((owner, name, vars(owner).get(name, _ABSENT)))
                setattr(owner, name, value)
            yield
        finally:
            for owner, name, value in reversed(before):
                if value is _ABSENT:
                    delattr(owner, name)
                else:
                    setattr(owner, name, value)


@functools.cache
def _language_patches() -> _Patches:
    """What turns triton.language into operations of the checked builder."""
    patches = _Patches()
    for owner in (tl, tl.core, tl.math, tl.tensor, tl.core.tensor_descriptor_base):
        _patch_builtins(patches, owner)
    triton_interpreter._patch_lang_tensor(tl.tensor, patches)
    for language in (tl, tl.core):
        triton_interpreter._patch_lang_core(language, patches)
        patches.set_attr(language, "reduce", _reduce)
        patches.set_attr(language, "associative_scan", _scan)
    patches.set_attr(tl.tensor, "__bool__", _truth_of)
    # Triton 3.6 asks numpy for what newer numpy refuses
    patches.set_attr(tl.tensor, "__index__", lambda tensor: int(tensor.handle.data.item()))
    _patch_libdevice(patches)
    return patches


def _patch_builtins(patches: _Patches, owner: Any) -> None:
    for name, member in inspect.getmembers(owner, tl.core.is_builtin):
        patches.set_attr(owner, name, _with_semantic(member))


def _patch_libdevice(patches: _Patches) -> None:
    """Kernels name the stubs in triton.language.extra.libdevice; a compiler backend supplies the functions."""
    _patch_builtins(patches, cuda_libdevice)
    for name, stub in inspect.getmembers(libdevice, inspect.isfunction):
        if stub.__module__ == libdevice.__name__ and hasattr(cuda_libdevice, name):
            patches.set_attr(libdevice, name, _with_semantic(getattr(cuda_libdevice, name)))


def _with_semantic(builtin: Callable) -> Callable:
    @functools.wraps(builtin)
    def bound(*args, **kwargs):
        return builtin(*args, **{**kwargs, "_semantic": SEMANTIC})

    return bound


def _truth_of(tensor: tl.tensor) -> bool:
    data = tensor.handle.data
    if data.size == 1:
        return bool(data)
    # Triton's frontend asks whether an optional argument was given
    if sys._getframe(1).f_code.co_filename.startswith(_TRITON_FOLDER):
        return True
    raise ValueError(
        f"truth value of a block tensor of shape {data.shape}: `and`, `or`, `not` and `if` take scalars; use & | ~"
    )


def _reduce(input, axis, combine_fn, keep_dims=False, **_):
    """tl.reduce: bfloat16 in float32 and rounded once, and poison wherever it went in."""
    inputs = input if isinstance(input, tuple) else (input,)
    outputs = _in_f32(triton_interpreter.ReduceOps(axis, combine_fn, keep_dims), inputs)
    spoilt = (poisoned(source.handle).any(axis, keepdims=keep_dims) for source in inputs)
    outputs = tuple(itertools.starmap(_spoiled, zip(outputs, spoilt, strict=True)))
    return outputs if isinstance(input, tuple) else outputs[0]


def _scan(input, axis, combine_fn, reverse=False, **_):
    """tl.associative_scan: bfloat16 in float32 and rounded once."""
    inputs = input if isinstance(input, tuple) else (input,)
    outputs = _in_f32(triton_interpreter.ScanOps(axis, combine_fn, reverse), inputs)
    return outputs if isinstance(input, tuple) else outputs[0]


def _in_f32(operation, inputs: tuple) -> tuple:
    outputs = operation.apply(tuple(_retyped(source, widen(source.handle)) for source in inputs))
    return tuple(
        _retyped(output, narrow(output.handle))
        if is_bf16(source.handle) and output.handle.dtype.scalar == tl.float32
        else output
        for output, source in zip(outputs, inputs, strict=True)
    )


def _spoiled(output: tl.tensor, lanes: np.ndarray) -> tl.tensor:
    return _retyped(output, spoil(output.handle, np.reshape(lanes, output.handle.data.shape)))


def _retyped(tensor: tl.tensor, handle: TensorHandle) -> tl.tensor:
    block = tensor.type.is_block()
    return tl.tensor(handle, tl.block_type(handle.dtype, list(handle.data.shape)) if block else handle.dtype)
