"""One adapted layer of real models: forward, backward and a whole training step apart, beside PEFT's LoRA and DoRA.

    pytest benchmarks/bench_layer_steps.py -n 0 --results benchmarks/results

Ratios are over PEFT's LoRA, from rounds in which every contender ran once; "±" is half of the range that nine in
ten of the rounds' ratios have. The forward saves what its backward needs; a step is forward, backward and AdamW, after
which norms are made anew. "frozen" is the base layer alone, the floor; "fused lora" is LoRA with a backward written by
hand over the library's products, as axolotl and unsloth have it, without their packages. Outputs and gradients are
compared with PEFT's before anything is timed. On a GPU "hylorada" is the Triton kernels, and the eager path stands
beside it.
"""

import statistics

import pytest
import torch
from torch import nn

from benchmarks.bench_hybrid_linear import SCALED, assert_agreement, assert_ours_agree, contenders, factors, inputs
from benchmarks.memory import MIB, peak_bytes, saved_bytes
from benchmarks.paired import median_ratio, ratio_spread
from benchmarks.roofline import linear_backward_work, linear_forward_work, measured_limits
from benchmarks.shapes import DEVICE, DTYPES, MODEL_LAYERS
from hylorada_kernels import using
from hylorada_kernels.testing import relative_error

SECONDS_PER_CASE = 6.0
BASE = "peft lora"
PHASES = ("forward", "backward", "step")


class _FusedLora(torch.autograd.Function):
    """On x (T, I), W (O, I), A (R, I), B (O, R)."""

    @staticmethod
    def forward(ctx, x, weight, lora_a, lora_b, scale):
        a, b = lora_a.to(x.dtype), lora_b.to(x.dtype)
        ctx.save_for_backward(x, weight, a, b)
        ctx.scale, ctx.dtype = scale, lora_a.dtype
        return (x @ weight.T).addmm_(x @ a.T, b.T, alpha=scale)

    @staticmethod
    def backward(ctx, dy):
        x, weight, a, b = ctx.saved_tensors
        low = dy @ b
        da, db = ctx.scale * (low.T @ x), ctx.scale * (dy.T @ (x @ a.T))
        return (dy @ weight).addmm_(low, a, alpha=ctx.scale), None, da.to(ctx.dtype), db.to(ctx.dtype), None


class FusedLora(nn.Module):
    """With the weight and the factors of PEFT's layer."""

    def __init__(self, peft_lora: nn.Module):
        super().__init__()
        self.weight = peft_lora.base_layer.weight
        self.lora_a, self.lora_b = (nn.Parameter(factor.detach().clone()) for factor in factors(peft_lora))
        self.scale = peft_lora.scaling["default"]

    def forward(self, x):
        return _FusedLora.apply(x, self.weight, self.lora_a, self.lora_b, self.scale)


def layers_and_inputs(layer: str, dtype: str, rank: int):
    shape = MODEL_LAYERS[layer]
    layers = {name: module.to(DEVICE) for name, module in contenders(shape, dtype, rank).items() if name != SCALED}
    x, dy = (tensor.detach().to(DEVICE) for tensor in inputs(shape, dtype))
    x.requires_grad_()
    layers["fused lora"] = FusedLora(layers[BASE])
    assert_ours_agree(layers, x, dy, dtype)
    assert_agreement(layers["fused lora"], layers[BASE], x, dy, dtype)
    return layers, x, dy


def runs_of(layers, x, dy):
    """What is run for each contender in place of its module."""

    def eager(given):
        with using("eager"):
            return layers["hylorada"](given)

    runs = dict(layers)
    if DEVICE == "cuda":
        runs["hylorada eager"] = eager
    runs["hylorada compiled"] = torch.compile(layers["hylorada"], dynamic=False)
    own = layers["hylorada"](x)
    assert relative_error(runs["hylorada compiled"](x), own.double()) <= 1e-2
    return runs


def steps_of(phase, layers, runs, x, dy):
    def module(name):
        return layers.get(name, layers["hylorada"])

    def leaves(name):
        return [x, *(parameter for parameter in module(name).parameters() if parameter.requires_grad)]

    if phase == "forward":
        return {name: (lambda run=run: run(x)) for name, run in runs.items()}
    if phase == "backward":
        # a compiled graph does not keep what a second backward would need
        graphs = {name: run(x) for name, run in runs.items() if name != "hylorada compiled"}
        return {
            name: (lambda name=name, y=y: torch.autograd.grad(y, leaves(name), dy, retain_graph=True))
            for name, y in graphs.items()
        }

    def whole(name, run):
        trained = leaves(name)[1:]
        optimizer = torch.optim.AdamW(trained, lr=1e-5) if trained else None

        def step():
            x.grad = None
            run(x).backward(dy)
            if optimizer is not None:
                optimizer.step()
                optimizer.zero_grad()

        return step

    return {name: whole(name, run) for name, run in runs.items()}


def measured(paired, steps, seconds):
    processor: dict[str, list[float]] = {}
    times = paired(steps, seconds, processor=processor)
    values = {
        "hylorada, ms": 1e3 * statistics.median(times["hylorada"]),
        "hylorada, processor ms": 1e3 * statistics.fmean(processor["hylorada"]),
        f"hylorada / {BASE}": median_ratio(times, "hylorada", BASE),
        "±": ratio_spread(times, "hylorada", BASE),
    }
    others = [name for name in times if name not in ("hylorada", BASE)]
    return times, values | {f"{name} / {BASE}": median_ratio(times, name, BASE) for name in others}


@pytest.mark.parametrize("layer", MODEL_LAYERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_phases(benchmark, record, paired, dtype, layer):
    layers, x, dy = layers_and_inputs(layer, dtype, 8)
    runs = runs_of(layers, x, dy)
    for phase in PHASES:
        steps = steps_of(phase, layers, runs, x, dy)
        times, values = measured(paired, steps, SECONDS_PER_CASE)
        if DEVICE == "cuda" and phase != "step":
            work = (linear_forward_work if phase == "forward" else linear_backward_work)(
                *MODEL_LAYERS[layer], 8, x.element_size()
            )
            limits = measured_limits(DTYPES[dtype])
            values["of the roofline"] = work.achieved(statistics.median(times["hylorada"]), limits)
        record("layer steps", {"phase": phase, "dtype": dtype, "layer": layer}, values)
    benchmark.pedantic(steps["hylorada"], rounds=3)


@pytest.mark.parametrize("layer", MODEL_LAYERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_memory(benchmark, record, dtype, layer):
    layers, x, dy = layers_and_inputs(layer, dtype, 8)
    values = {}
    for name in ("frozen", BASE, "peft dora", "hylorada"):
        # the norm is known from the comparison
        module = layers[name]
        given = [x, *module.parameters()]
        values[f"{name}, saved MiB"] = saved_bytes(lambda module=module: module(x), given)[0] / MIB
        if DEVICE == "cpu":
            values[f"{name}, peak MiB"] = peak_bytes(lambda module=module: module(x).backward(dy)) / MIB
        else:
            torch.cuda.reset_peak_memory_stats()
            held = torch.cuda.memory_allocated()
            module(x).backward(dy)
            values[f"{name}, peak MiB"] = (torch.cuda.max_memory_allocated() - held) / MIB
        x.grad = None
    record("layer steps memory", {"dtype": dtype, "layer": layer}, values)
    benchmark.pedantic(layers["hylorada"], (x,))


@pytest.mark.parametrize("rank", [4, 8, 16, 32, 64, 128])
def test_cost_by_rank(benchmark, record, paired, rank):
    layers, x, dy = layers_and_inputs("llama-3-8b q_proj", "fp32", rank)
    steps = steps_of("step", layers, layers, x, dy)
    times, values = measured(paired, steps, SECONDS_PER_CASE)
    values |= {f"{name}, ms": 1e3 * statistics.median(times[name]) for name in ("frozen", BASE, "peft dora")}
    record("layer cost by rank", {"layer": "llama-3-8b q_proj", "dtype": "fp32", "rank": rank}, values, over="rank")
    benchmark.pedantic(steps["hylorada"], rounds=3)
