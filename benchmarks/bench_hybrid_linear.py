"""One adapted layer, forward and backward on the CPU, beside the installed PEFT's LoRA and DoRA and the frozen layer.

    pytest benchmarks/bench_hybrid_linear.py -k kept_norm --results benchmarks/results

(likewise new_norm, where A and B change before every round; memory; compiled).
"scaled weight" is our layer with keep_scaled_weight; "products" are those that any LoRA layer makes, and nothing else:
PEFT DoRA's time over theirs is the most that a layer made of them could reach.
Outputs and gradients are compared with PEFT DoRA's before anything is timed. Ratios are medians over rounds in which
every contender ran once. Adapters are fp32, as PEFT makes them, beside a base of either precision; bf16 tables also
show PEFT LoRA with its adapters cast down, which is faster and less accurate.
"""

import statistics

import peft
import pytest
import torch
from peft import LoraConfig
from torch import nn

from benchmarks.memory import MIB, peak_bytes, saved_bytes
from benchmarks.paired import median_ratio
from benchmarks.shapes import DTYPES, LAYERS
from hylorada_kernels import HybridLinear
from hylorada_kernels.ops._products import add_low_rank, outer_sum, project_down
from hylorada_kernels.testing import relative_error

ALPHA = 16.0
# norm-wise, of results that two implementations round in their own ways
AGREEMENT = {"fp32": 1e-5, "bf16": 1e-2}
SECONDS_PER_CASE = 7.0
SCALED, PRODUCTS = "scaled weight", "products"


def peft_layer(linear: nn.Linear, rank: int, *, use_dora: bool) -> nn.Module:
    """PEFT's own adapted layer around a copy of `linear`'s weight, with a B that is not 0."""
    holder = nn.ModuleDict({"layer": nn.Linear(linear.in_features, linear.out_features, bias=False)})
    holder["layer"].weight = nn.Parameter(linear.weight.detach().clone())
    config = LoraConfig(r=rank, lora_alpha=ALPHA, target_modules=["layer"], use_dora=use_dora, lora_dropout=0.0)
    layer = peft.inject_adapter_in_model(config, holder)["layer"]
    nn.init.normal_(layer.lora_B["default"].weight, std=0.01)
    return layer


def our_layer(peft_dora: nn.Module, rank: int, **options: bool) -> HybridLinear:
    """Our layer with the weight, the factors and the magnitude of PEFT's; its blend is there, and shut."""
    base = peft_dora.base_layer
    linear = nn.Linear(base.in_features, base.out_features, bias=False)
    linear.weight = nn.Parameter(base.weight.detach().clone())
    layer = HybridLinear.from_linear(linear, rank, ALPHA, use_rslora=False, **options)
    with torch.no_grad():
        layer.lora_a.copy_(peft_dora.lora_A["default"].weight)
        layer.lora_b.copy_(peft_dora.lora_B["default"].weight)
        layer.magnitude.copy_(peft_dora.lora_magnitude_vector["default"].weight)
        layer.residual_weight.fill_(-40.0)
    return layer


def contenders(shape: tuple[int, int, int], dtype: str, rank: int) -> dict[str, nn.Module]:
    _, columns, rows = shape
    torch.manual_seed(0)
    linear = nn.Linear(columns, rows, bias=False)
    peft_dora = peft_layer(linear, rank, use_dora=True)
    layers = {
        "frozen": nn.Linear(columns, rows, bias=False).requires_grad_(False),
        "peft lora": peft_layer(linear, rank, use_dora=False),
        "peft dora": peft_dora,
        "hylorada": our_layer(peft_dora, rank),
        SCALED: our_layer(peft_dora, rank, keep_scaled_weight=True),
    }
    for layer in layers.values():
        base = getattr(layer, "base_layer", layer)
        base.weight.data = base.weight.data.to(DTYPES[dtype])
    if dtype == "bf16":
        layers["peft lora in bf16"] = peft_layer(linear, rank, use_dora=False).to(torch.bfloat16)
    return layers


def inputs(shape: tuple[int, int, int], dtype: str) -> tuple[torch.Tensor, torch.Tensor]:
    tokens, columns, rows = shape
    x = torch.randn(tokens, columns, dtype=DTYPES[dtype], requires_grad=True)
    return x, torch.randn(tokens, rows, dtype=DTYPES[dtype])


def factors(layer: nn.Module) -> list[nn.Parameter]:
    if hasattr(layer, "lora_a"):
        return [layer.lora_a, layer.lora_b]
    if hasattr(layer, "lora_A"):
        return [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    return []


def magnitudes(layer: nn.Module) -> list[nn.Parameter]:
    if isinstance(layer, HybridLinear):
        return [layer.magnitude]
    return [part.weight for part in getattr(layer, "lora_magnitude_vector", {}).values()]


def assert_agreement(layer: nn.Module, other: nn.Module, x: torch.Tensor, dy: torch.Tensor, dtype: str) -> None:
    """A layer's output and gradients are another one's."""
    results = []
    for module in (layer, other):
        y = module(x)
        results.append([y, *torch.autograd.grad(y, [x, *factors(module), *magnitudes(module)], dy)])
    names = ("y", "dx", "dA", "dB", "dm")[: len(results[0])]
    for name, ours, theirs in zip(names, *results, strict=True):
        error = relative_error(ours, theirs.double())
        assert error <= AGREEMENT[dtype], f"{name} differs from PEFT's by {error:.1e}"


def assert_ours_agree(layers: dict[str, nn.Module], x: torch.Tensor, dy: torch.Tensor, dtype: str) -> None:
    """With PEFT DoRA."""
    for name in ("hylorada", SCALED):
        if name in layers:
            assert_agreement(layers[name], layers["peft dora"], x, dy, dtype)


def training_step(layer: nn.Module, x: torch.Tensor, dy: torch.Tensor, *, edit: bool, run=None):
    """Forward and backward; `edit` changes A and B before, there and back, as an optimizer would."""
    edited = factors(layer) if edit else []
    leaves = [x, *(parameter for parameter in layer.parameters() if parameter.requires_grad)]
    nudge = [1.001]
    run = layer if run is None else run

    def step() -> None:
        with torch.no_grad():
            for factor in edited:
                factor.mul_(nudge[0])
        nudge[0] = 1 / nudge[0]
        for leaf in leaves:
            leaf.grad = None
        run(x).backward(dy)

    return step


def products_alone(layer: HybridLinear, x: torch.Tensor, dy: torch.Tensor):
    """Forward and backward of LoRA without autograd, its factors and their gradients in x's dtype."""
    x, weight, down = x.detach(), layer.weight.detach(), layer.lora_a.detach().to(x.dtype)
    up = (layer.scale * layer.lora_b.detach().T).to(x.dtype).contiguous()

    def step() -> None:
        h = project_down(x, down)
        add_low_rank(x, weight, h, up)
        dh = project_down(dy, up)
        add_low_rank(dy, weight.T, dh, down)
        outer_sum(dh, x)
        outer_sum(h, dy, is_transposed=True)

    return step


def ratios(times: dict[str, list[float]]) -> dict[str, float]:
    values = {
        "hylorada, ms": 1e3 * statistics.median(times["hylorada"]),
        "hylorada / peft lora": median_ratio(times, "hylorada", "peft lora"),
        "peft dora / hylorada": median_ratio(times, "peft dora", "hylorada"),
        "hylorada / frozen": median_ratio(times, "hylorada", "frozen"),
    }
    if PRODUCTS in times:
        values[f"hylorada / {PRODUCTS}"] = median_ratio(times, "hylorada", PRODUCTS)
        values[f"peft dora / {PRODUCTS}"] = median_ratio(times, "peft dora", PRODUCTS)
    if SCALED in times:
        values[f"{SCALED} / peft lora"] = median_ratio(times, SCALED, "peft lora")
    if "peft lora in bf16" in times:
        values["hylorada / peft lora in bf16"] = median_ratio(times, "hylorada", "peft lora in bf16")
    return values


@pytest.mark.parametrize("shape", LAYERS, ids=str)
@pytest.mark.parametrize("rank", [8, 64])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", ["kept_norm", "new_norm"])
def test_layer(benchmark, record, paired, norm, dtype, rank, shape):
    layers = contenders(shape, dtype, rank)
    x, dy = inputs(shape, dtype)
    assert_ours_agree(layers, x, dy, dtype)
    steps = {name: training_step(layer, x, dy, edit=norm == "new_norm") for name, layer in layers.items()}
    steps[PRODUCTS] = products_alone(layers["hylorada"], x, dy)
    values = ratios(paired(steps, SECONDS_PER_CASE))
    record(f"layer {norm}", {"dtype": dtype, "rank": rank, "tokens, in, out": str(shape)}, values)
    benchmark.pedantic(steps["hylorada"], rounds=3)


@pytest.mark.parametrize("shape", LAYERS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_layer_memory(benchmark, record, dtype, shape):
    layers = contenders(shape, dtype, 8)
    x, dy = inputs(shape, dtype)
    values = {}
    for name, layer in layers.items():
        # the norm cache is filled once per optimizer step
        layer(x)
        own, with_output = saved_bytes(lambda layer=layer: layer(x), [x, *layer.parameters()])
        peak = peak_bytes(lambda layer=layer: layer(x).backward(dy))
        values |= {f"{name}: saved": own / MIB, f"{name}: with y": with_output / MIB, f"{name}: peak": peak / MIB}
        x.grad = None
    record("layer memory in MiB", {"dtype": dtype, "tokens, in, out": str(shape)}, values)
    benchmark.pedantic(layers["hylorada"], (x,))


@pytest.mark.parametrize("shape", [(512, 576, 1536), (512, 2048, 2048)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_layer_compiled(benchmark, record, paired, dtype, shape):
    layers = contenders(shape, dtype, 8)
    x, dy = inputs(shape, dtype)
    assert_ours_agree(layers, x, dy, dtype)
    names = ["frozen", "peft lora", "peft dora", "hylorada"]
    steps = {name: training_step(layers[name], x, dy, edit=False, run=torch.compile(layers[name])) for name in names}
    steps["hylorada, not compiled"] = training_step(layers["hylorada"], x, dy, edit=False)
    times = paired(steps, SECONDS_PER_CASE)
    values = ratios(times) | {"hylorada / not compiled": median_ratio(times, "hylorada", "hylorada, not compiled")}
    record("layer compiled", {"dtype": dtype, "tokens, in, out": str(shape)}, values)
    benchmark.pedantic(steps["hylorada"], rounds=3)
