"""One adapted layer, forward and backward on the CPU, beside the installed PEFT's LoRA and DoRA and the frozen layer.

A and B are edited before every round, as an optimizer would, so a norm from an earlier round cannot be used. The
outputs are compared before anything is timed. Ratios are medians over rounds in which every contender ran once.
"""

import peft
import pytest
import torch
from peft import LoraConfig
from torch import nn

from benchmarks.paired import median_ratio, paired_times
from benchmarks.shapes import FIRST_LIGHT
from hylorada_kernels import HybridLinear

RANK, ALPHA = 8, 16.0


def peft_layer(linear: nn.Linear, *, use_dora: bool) -> nn.Module:
    """PEFT's own adapted layer around a copy of `linear`'s weight, with a B that is not 0."""
    holder = nn.ModuleDict({"layer": nn.Linear(linear.in_features, linear.out_features, bias=False)})
    holder["layer"].weight = nn.Parameter(linear.weight.detach().clone())
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["layer"], use_dora=use_dora, lora_dropout=0.0)
    layer = peft.inject_adapter_in_model(config, holder)["layer"]
    nn.init.normal_(layer.lora_B["default"].weight, std=0.01)
    return layer


def our_layer(linear: nn.Linear, peft_dora: nn.Module, *, use_blend: bool) -> HybridLinear:
    """Our layer with the factors and the magnitude of PEFT's."""
    layer = HybridLinear.from_linear(linear, RANK, ALPHA, use_rslora=False, use_blend=use_blend)
    with torch.no_grad():
        layer.lora_a.copy_(peft_dora.lora_A["default"].weight)
        layer.lora_b.copy_(peft_dora.lora_B["default"].weight)
        layer.magnitude.copy_(peft_dora.lora_magnitude_vector["default"].weight)
    return layer


def factors(layer: nn.Module) -> list[nn.Parameter]:
    if isinstance(layer, HybridLinear):
        return [layer.lora_a, layer.lora_b]
    if hasattr(layer, "lora_A"):
        return [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    return []


def training_step(layer: nn.Module, x: torch.Tensor, dy: torch.Tensor):
    """Edit A and B, run forward and backward."""
    edited = factors(layer)
    parameters = [parameter for parameter in layer.parameters() if parameter.requires_grad]

    nudge = [1.001]

    def step() -> None:
        # their contents change, there and back
        with torch.no_grad():
            for factor in edited:
                factor.mul_(nudge[0])
        nudge[0] = 1 / nudge[0]
        for leaf in (x, *parameters):
            leaf.grad = None
        layer(x).backward(dy)

    return step


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", FIRST_LIGHT, ids=str)
def test_layer_beside_peft(benchmark, record_ratio, shape, dtype):
    tokens, columns, rows = shape
    torch.manual_seed(0)
    linear = nn.Linear(columns, rows, bias=False)
    x, dy = torch.randn(tokens, columns, dtype=dtype, requires_grad=True), torch.randn(tokens, rows, dtype=dtype)
    peft_dora = peft_layer(linear, use_dora=True)
    layers = {
        "frozen": nn.Linear(columns, rows, bias=False).requires_grad_(False),
        "peft lora": peft_layer(linear, use_dora=False),
        "peft dora": peft_dora,
        "hylorada": our_layer(linear, peft_dora, use_blend=True),
    }
    if dtype == torch.float32:
        expected = peft_dora(x.detach())
        torch.testing.assert_close(our_layer(linear, peft_dora, use_blend=False)(x.detach()), expected)
    for layer in layers.values():
        base = getattr(layer, "base_layer", layer)
        base.weight.data = base.weight.data.to(dtype)

    steps = {name: training_step(layer, x, dy) for name, layer in layers.items()}
    rounds = 3 if benchmark.disabled else min(60, max(12, int(2e10 / (tokens * columns * rows))))
    times = paired_times(steps, rounds=rounds)
    group = str(dtype).removeprefix("torch.")
    record_ratio(group, "hylorada / peft lora", median_ratio(times, "hylorada", "peft lora"))
    record_ratio(group, "peft dora / hylorada", median_ratio(times, "peft dora", "hylorada"))
    record_ratio(group, "hylorada / frozen", median_ratio(times, "hylorada", "frozen"))
    benchmark.pedantic(steps["hylorada"], rounds=5, warmup_rounds=1)
