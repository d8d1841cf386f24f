"""Shifted attention beside full attention, the published roll, plain PyTorch, and FlexAttention.

    pytest benchmarks/bench_shifted_attention.py --results benchmarks/results

8 heads of 64, groups of 2048, half of the heads shifted by 1024. "split" is the same mathematics in plain PyTorch: cut,
attend, join. "rolled" is the published form, which lets tokens see the future; "flex" has no backward on the CPU. On a
GPU "ours" is the Triton kernels, and flash-attn's full attention stands beside it in bf16 where that is installed.
Outputs and gradients are compared before anything is timed. One thread: the work counts, not the wait of threads for
one another on a machine that others share.
"""

import importlib.util
import itertools
import statistics
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from benchmarks.memory import MIB
from benchmarks.paired import median_ratio, ratio_spread
from benchmarks.roofline import attention_work, measured_limits
from benchmarks.shapes import DEVICE, DTYPES
from hylorada.estimate import count_attended_pairs
from hylorada.peak_memory import peak_memory
from hylorada_kernels.ops.shifted_attention import shifted_attention
from hylorada_kernels.testing import relative_error

HEADS, HEAD_DIM, GROUP, SHIFT = 8, 64, 2048, 1024
# that attend among 8192 tokens, of all heads together
PAIRS = HEADS // 2 * (count_attended_pairs(8192, GROUP) + count_attended_pairs(8192, GROUP, SHIFT))
# norm-wise, of results that two implementations round in their own ways
AGREEMENT = {"fp32": 1e-5, "bf16": 1e-2}
SECONDS_PER_CASE = 40.0
# so many rounds at least
FEWEST = 5


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def inputs(length: int, dtype: str) -> list[Tensor]:
    """q, k, v as a model's projections give them, and the gradient of the output."""
    torch.manual_seed(0)
    shape = (1, length, HEADS, HEAD_DIM)
    tensors = [torch.randn(shape, dtype=DTYPES[dtype]).to(DEVICE).transpose(1, 2) for _ in range(4)]
    return [*(x.requires_grad_() for x in tensors[:3]), tensors[3]]


def full(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return shifted_attention(q, k, v, group_size=GROUP, shift=SHIFT, shifted_heads="half")


def ours_with_sinks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return shifted_attention(q, k, v, group_size=GROUP, shift=SHIFT, shifted_heads="half", sink_tokens=4)


def ours_unshifted(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return shifted_attention(q, k, v, group_size=GROUP)


def split(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    length, halves = q.shape[2], []
    for heads, offset in ((slice(0, HEADS // 2), 0), (slice(HEADS // 2, HEADS), SHIFT)):
        edges = [0, *range(offset or GROUP, length, GROUP), length]
        sizes = [end - start for start, end in itertools.pairwise(edges)]
        groups = zip(*(x[:, heads].split(sizes, dim=2) for x in (q, k, v)), strict=True)
        halves.append(torch.cat([full(*group) for group in groups], dim=2))
    return torch.cat(halves, dim=1)


def rolled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    def grouped(x: Tensor, shift: int) -> Tensor:
        first, second = x.chunk(2, dim=1)
        x = torch.cat((first, second.roll(shift, 2)), dim=1)
        return x.unflatten(2, (-1, GROUP)).transpose(1, 2).flatten(0, 1)

    out = full(*(grouped(x, -SHIFT) for x in (q, k, v))).unflatten(0, (1, -1)).transpose(1, 2).flatten(2, 3)
    first, second = out.chunk(2, dim=1)
    return torch.cat((first, second.roll(SHIFT, 2)), dim=1)


def flex(length: int):
    def attends(batch, head, query, key):
        offset = torch.where(head < HEADS // 2, 0, SHIFT)
        same = (query + GROUP - offset) // GROUP == (key + GROUP - offset) // GROUP
        return same & (key <= query)

    mask = create_block_mask(attends, None, HEADS, length, length, device=DEVICE)
    compiled = torch.compile(flex_attention)
    if DEVICE == "cuda":
        return lambda *tensors: compiled(*tensors, block_mask=mask)
    return lambda *tensors: compiled(*(x.detach() for x in tensors), block_mask=mask)


def flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Full attention by the package flash-attn."""
    from flash_attn import flash_attn_func

    return flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)), causal=True).transpose(1, 2)


def has_flash(dtype: str) -> bool:
    return DEVICE == "cuda" and dtype == "bf16" and importlib.util.find_spec("flash_attn") is not None


def assert_agreement(functions, tensors: list[Tensor], dtype: str) -> None:
    """Output and gradients of all functions are those of `split` in fp64."""
    wide = [x.detach().double().requires_grad_() for x in tensors[:3]]
    truth = split(*wide)
    truths = [truth, *torch.autograd.grad(truth, wide, tensors[3].double())]
    for function in functions:
        y = function(*tensors[:3])
        for result, true in zip([y, *torch.autograd.grad(y, tensors[:3], tensors[3])], truths, strict=True):
            error = relative_error(result, true)
            assert error <= AGREEMENT[dtype], f"{function.__name__} is off by {error:.1e}"


def forward(function, tensors: list[Tensor]):
    def step() -> None:
        with torch.no_grad():
            function(*tensors[:3])

    return step


def forward_and_backward(function, tensors: list[Tensor]):
    def step() -> None:
        torch.autograd.grad(function(*tensors[:3]), tensors[:3], tensors[3])

    return step


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("step", [forward, forward_and_backward])
def test_beside_others(one_thread, benchmark, record, paired, step, dtype):
    tensors = inputs(8192, dtype)
    assert_agreement([ours, split], tensors, dtype)
    functions = {
        "full": full,
        "split": split,
        "rolled": rolled,
        "ours": ours,
        "ours with sinks": ours_with_sinks,
        "ours unshifted": ours_unshifted,
    }
    if has_flash(dtype):
        functions["flash"] = flash
    if step is forward or DEVICE == "cuda":
        functions["flex"] = flex(8192)
        with torch.no_grad():
            error = relative_error(functions["flex"](*tensors[:3]), ours(*tensors[:3]))
        assert error <= AGREEMENT[dtype], f"flex is off by {error:.1e}"
    steps = {name: step(function, tensors) for name, function in functions.items()}
    times = paired(steps, SECONDS_PER_CASE, fewest=FEWEST)
    values = {"ours, ms": 1e3 * statistics.median(times["ours"])}
    values |= {f"{name} / ours": median_ratio(times, name, "ours") for name in times if name != "ours"}
    values["±"] = ratio_spread(times, "full", "ours")
    if DEVICE == "cuda" and step is forward:
        work = attention_work(PAIRS, 8192, HEADS, HEADS, HEAD_DIM, DTYPES[dtype].itemsize)
        values["of the roofline"] = work.achieved(statistics.median(times["ours"]), measured_limits(DTYPES[dtype]))
    record("shifted attention", {"step": step.__name__.replace("_", " "), "dtype": dtype}, values)
    if not benchmark.disabled and DEVICE == "cpu":
        assert min(values["full / ours"], median_ratio(times, "full", "ours unshifted")) >= 2.5
    benchmark.pedantic(steps["ours"], rounds=3)


def test_cost_is_linear_in_length(one_thread, benchmark, record, paired):
    lengths = (8192, 16384, 32768)
    steps = {str(length): forward_and_backward(ours, inputs(length, "fp32")) for length in lengths}
    times = paired(steps, SECONDS_PER_CASE, fewest=FEWEST)
    values = {f"{b} / {a}": median_ratio(times, str(b), str(a)) for a, b in itertools.pairwise(lengths)}
    record("shifted attention by length", {"step": "forward and backward", "dtype": "fp32"}, values)
    if not benchmark.disabled:
        assert max(values.values()) <= 2 * 1.15
    benchmark.pedantic(steps["8192"], rounds=1)


@pytest.mark.parametrize("length", [2048, 4096, 8192, 16384])
def test_cost_by_length(one_thread, benchmark, record, paired, length):
    """Full attention's cost grows with the square of the length."""
    tensors = inputs(length, "fp32")
    assert_agreement([ours], tensors, "fp32")
    steps = {"ours": forward_and_backward(ours, tensors)}
    if length <= 8192:
        steps["full"] = forward_and_backward(full, tensors)
    times = paired(steps, SECONDS_PER_CASE, fewest=FEWEST)
    values = {f"{name}, ms": 1e3 * statistics.median(seconds) for name, seconds in times.items()}
    if "full" in times:
        values |= {"full / ours": median_ratio(times, "full", "ours"), "±": ratio_spread(times, "full", "ours")}
    record("shifted attention cost by length", {"dtype": "fp32", "length": length}, values, over="length")
    benchmark.pedantic(steps["ours"], rounds=1)


def peak_over_least(length: int, shifted: bool) -> dict[str, float]:
    """Peak resident memory of a forward over that of its inputs and outputs, which nothing can do without."""
    function = ours if shifted else ours_unshifted
    # the first call loads libraries and starts threads
    forward_and_backward(function, inputs(2 * GROUP, "fp32"))()
    q, k, v, _ = inputs(length, "fp32")
    least = 4 * q.nbytes + 4 * HEADS * length
    with peak_memory() as before:
        pass
    with torch.no_grad(), peak_memory() as during:
        function(q, k, v)
    used = 3 * q.nbytes + (during.mib - before.mib) * MIB
    return {"inputs and outputs, MiB": least / MIB, "peak / inputs and outputs": used / least}


@pytest.mark.skipif(DEVICE == "cuda", reason="it measures the process, whose memory a GPU's tensors are not in")
@pytest.mark.parametrize("shifted", [False, True], ids=["unshifted", "half shifted"])
def test_memory_at_32k(benchmark, record, shifted):
    """In a process of its own, whose resident memory nothing else has raised."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
        values = fresh.submit(peak_over_least, 32768, shifted).result()
    record("shifted attention memory", {"shifted": str(shifted), "dtype": "fp32"}, values)
    # a few pages that the first call left are used again
    assert 0.95 < values["peak / inputs and outputs"] < 1.3
    benchmark.pedantic(forward(ours, inputs(GROUP, "fp32")), rounds=1)
