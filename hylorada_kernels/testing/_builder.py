"""What an interpreted kernel computes: Triton's numpy builder with exact low-precision arithmetic and checked memory.

Triton's own builder computes bfloat16 on raw bit patterns, truncates casts to it, multiplies tf32 in full float32 and
reads and writes wherever a pointer leads. Everything else is inherited.
"""

from collections.abc import Callable

import numpy as np
import torch
import triton.language as tl
from triton.backends.nvidia.compiler import min_dot_size
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter as triton_interpreter
from triton.runtime.interpreter import TensorHandle

from ._memory import Memory
from ._rounding import bf16_from_f32, f32_from_bf16, tf32_from_f32

# a NaN that stays recognisable when it is cast between float formats; marks lanes that were masked off in a load
_POISON_BITS = {"fp16": 0x7EA8, "bf16": 0x7FD5, "fp32": 0x7FD50000, "fp64": 0x7FFAA00000000000}
# between launches
NO_MEMORY = Memory(check_races=False, count_traffic=False)


def is_bf16(handle: TensorHandle) -> bool:
    return not isinstance(handle.dtype, tl.pointer_type) and handle.dtype.scalar == tl.bfloat16


def widen(handle: TensorHandle) -> TensorHandle:
    """A bfloat16 handle as float32, any other as it is."""
    return TensorHandle(f32_from_bf16(handle.data), tl.float32) if is_bf16(handle) else handle


def narrow(handle: TensorHandle) -> TensorHandle:
    """A float32 handle rounded to bfloat16."""
    return TensorHandle(bf16_from_f32(handle.data), tl.bfloat16)


class CheckedBuilder(triton_interpreter.InterpreterBuilder):
    """The interpreter's builder; `memory` is that of the launch that runs."""

    def __init__(self):
        super().__init__()
        self.memory = NO_MEMORY
        # device_assert is live; the int64 shadow of every integer operation, which finds overflow, is too slow to keep
        self.options = triton_interpreter.InterpreterOptions(
            debug=True,
            sanitize_overflow=False,
            allowed_dot_input_precisions=("tf32", "tf32x3", "ieee", "bf16x3", "bf16x6"),
        )
        # as the compiler, so that a dot too small for the matrix instructions fails here too
        self.codegen_fns["min_dot_size"] = min_dot_size(None)

    # arithmetic

    def get_bf16(self, value):
        return narrow(self.get_fp32(value))

    def cast_impl(self, src, dst_type):
        src, target = widen(src), dst_type.scalar
        if target == tl.bfloat16:
            return narrow(TensorHandle(src.data.astype(np.float32), tl.float32))
        return TensorHandle(src.data, target) if src.dtype == target else super().cast_impl(src, dst_type)

    def create_fp_to_fp(self, src, dst_type, rounding_mode):
        source, target = src.dtype.scalar, dst_type.scalar
        toward_zero = rounding_mode == triton_interpreter._ir.ROUNDING_MODE.RTZ
        if source.is_fp8() or target.is_fp8() or toward_zero:
            return super().create_fp_to_fp(src, dst_type, rounding_mode)
        return self.cast_impl(src, dst_type)

    def binary_op(self, lhs, rhs, op):
        result = super().binary_op(widen(lhs), widen(rhs), op)
        if result.data.dtype == np.bool_:
            # a comparison; left to itself the handle would keep its operands' type and later casts would go wrong
            return TensorHandle(result.data, tl.int1)
        return narrow(result) if is_bf16(lhs) else result

    def unary_op(self, arg, op):
        result = super().unary_op(widen(arg), op)
        return narrow(result) if is_bf16(arg) else result

    def create_maxnumf(self, lhs, rhs):
        return keep_poison(self.binary_op(lhs, rhs, np.fmax), lhs, rhs)

    def create_minnumf(self, lhs, rhs):
        return keep_poison(self.binary_op(lhs, rhs, np.fmin), lhs, rhs)

    def create_clampf(self, arg, low, high, propagate_nans):
        if propagate_nans == triton_interpreter._ir.PROPAGATE_NAN.NONE:
            return self.create_minnumf(self.create_maxnumf(arg, low), high)
        result = self.ternary_op(widen(arg), widen(low), widen(high), np.clip)
        return narrow(result) if is_bf16(arg) else result

    def create_fma(self, x, y, z):
        result = super().create_fma(widen(x), widen(y), widen(z))
        return narrow(result) if is_bf16(z) else result

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        if is_bf16(a):
            a, b = widen(a), widen(b)
        elif a.data.dtype == np.float32 and input_precision == triton_interpreter._ir.INPUT_PRECISION.TF32:
            a, b = (TensorHandle(tf32_from_f32(operand.data), operand.dtype) for operand in (a, b))
        return super().create_dot(a, b, d, input_precision, max_num_imprecise_acc)

    def create_extern_elementwise(self, lib_name, lib_path, symbol, args, ret_type, is_pure):
        function = _device_function(symbol)
        result = function(*(torch.tensor(np.asarray(arg.data)) for arg in args)).numpy()
        target = ret_type.scalar
        return TensorHandle(result.astype(triton_interpreter._get_np_dtype(target)), target)

    # memory; the last parameters, cache policies, differ between Triton's versions and mean nothing here

    def create_masked_load(self, ptrs, mask, other, *policy, **named_policy):
        lanes = _lanes(mask, ptrs)
        element = ptrs.get_element_ty()
        real = self.memory.resolve("load", ptrs.data, lanes, _width(element))
        if other is None and not lanes.all():
            other = _poison(element, lanes.shape)
        return super().create_masked_load(
            TensorHandle(real, ptrs.dtype), TensorHandle(lanes, tl.int1), other, *policy, **named_policy
        )

    def create_masked_store(self, ptrs, value, mask, *policy, **named_policy):
        lanes = _lanes(mask, ptrs)
        real = self.memory.resolve("store", ptrs.data, lanes, _width(ptrs.get_element_ty()))
        self.memory.check_lanes(ptrs.data, lanes, np.broadcast_to(value.data, lanes.shape))
        return super().create_masked_store(
            TensorHandle(real, ptrs.dtype), value, TensorHandle(lanes, tl.int1), *policy, **named_policy
        )

    def create_atomic_rmw(self, op, ptr, val, mask, sem, scope):
        if is_bf16(val):
            raise NotImplementedError("atomics on bfloat16 are not interpreted: accumulate in float32")
        lanes = _lanes(mask, ptr)
        real = self.memory.resolve("atomic", ptr.data, lanes, _width(ptr.get_element_ty()))
        mask = TensorHandle(lanes, tl.int1)
        return super().create_atomic_rmw(op, TensorHandle(real, ptr.dtype), val, mask, sem, scope)

    def create_atomic_cas(self, ptr, cmp, val, sem, scope):
        lanes = np.ones(ptr.data.shape, bool)
        real = self.memory.resolve("atomic", ptr.data, lanes, _width(ptr.get_element_ty()))
        return super().create_atomic_cas(TensorHandle(real, ptr.dtype), cmp, val, sem, scope)


def _lanes(mask, ptrs: TensorHandle) -> np.ndarray:
    # descriptor accesses of older versions hand over a bare array
    data = mask.data if isinstance(mask, TensorHandle) else mask
    return np.broadcast_to(np.asarray(data, bool), ptrs.data.shape)


def _width(element: tl.dtype) -> int:
    return max(1, element.primitive_bitwidth // 8)


def _poison(element: tl.dtype, shape: tuple) -> TensorHandle:
    """What a lane without `other` holds: undefined on a GPU, here recognisably wrong."""
    dtype = triton_interpreter._get_np_dtype(element)
    if dtype == np.bool_:
        return TensorHandle(np.ones(shape, bool), element)
    if element.is_floating() and dtype.itemsize > 1:
        return TensorHandle(np.full(shape, _POISON_BITS[element.name], f"u{dtype.itemsize}").view(dtype), element)
    largest = np.iinfo(dtype).max
    return TensorHandle(np.full(shape, largest, dtype), element)


def poisoned(handle: TensorHandle) -> np.ndarray:
    """Mask of the lanes that hold poison."""
    element, size = handle.dtype.scalar, handle.data.itemsize
    if not element.is_floating() or size == 1:
        return np.zeros(handle.data.shape, bool)
    without_sign = np.ascontiguousarray(handle.data).view(f"u{size}") & ((1 << (8 * size - 1)) - 1)
    return without_sign == _POISON_BITS[element.name]


def keep_poison(result: TensorHandle, *operands: TensorHandle) -> TensorHandle:
    """`result` with poison wherever an operand has it; min and max would otherwise swallow it like any NaN."""
    spoilt = np.logical_or.reduce([np.broadcast_to(poisoned(operand), result.data.shape) for operand in operands])
    return spoil(result, spoilt)


def spoil(result: TensorHandle, lanes: np.ndarray) -> TensorHandle:
    """`result` with poison in the given lanes."""
    if not lanes.any() or not result.dtype.scalar.is_floating():
        return result
    return TensorHandle(np.where(lanes, _poison(result.dtype.scalar, lanes.shape).data, result.data), result.dtype)


# libdevice functions by the name of their device symbol, without the prefix and the f or d that tells the type
_DEVICE_FUNCTIONS: dict[str, Callable[..., torch.Tensor]] = {
    "fabs": torch.abs,
    "acos": torch.acos,
    "acosh": torch.acosh,
    "asin": torch.asin,
    "asinh": torch.asinh,
    "atan": torch.atan,
    "atan2": torch.atan2,
    "atanh": torch.atanh,
    "ceil": torch.ceil,
    "copysign": torch.copysign,
    "cos": torch.cos,
    "cosh": torch.cosh,
    "erf": torch.erf,
    "erfc": torch.erfc,
    "erfinv": torch.erfinv,
    "exp": torch.exp,
    "exp2": torch.exp2,
    "expm1": torch.expm1,
    "fast_cosf": torch.cos,
    "fast_expf": torch.exp,
    "fast_fdividef": torch.div,
    "fast_logf": torch.log,
    "fast_powf": torch.pow,
    "fast_sinf": torch.sin,
    "fdiv_rn": torch.div,
    "floor": torch.floor,
    "fmod": torch.fmod,
    "fsqrt_rn": torch.sqrt,
    "hypot": torch.hypot,
    "isinf": torch.isinf,
    "isnan": torch.isnan,
    "lgamma": torch.lgamma,
    "log": torch.log,
    "log10": torch.log10,
    "log1p": torch.log1p,
    "log2": torch.log2,
    "nearbyint": torch.round,
    "pow": torch.pow,
    "rint": torch.round,
    "rsqrt": torch.rsqrt,
    "sin": torch.sin,
    "sinh": torch.sinh,
    "sqrt": torch.sqrt,
    "tan": torch.tan,
    "tanh": torch.tanh,
    "trunc": torch.trunc,
}


def _device_function(symbol: str) -> Callable[..., torch.Tensor]:
    name = symbol.removeprefix("__nv_")
    if name not in _DEVICE_FUNCTIONS:
        name = name[:-1]
    if name not in _DEVICE_FUNCTIONS:
        raise NotImplementedError(
            f"the libdevice function {symbol} is not interpreted; those that are: {', '.join(_DEVICE_FUNCTIONS)}"
        )
    return _DEVICE_FUNCTIONS[name]


BUILDER = CheckedBuilder()
SEMANTIC = TritonSemantic(BUILDER)
