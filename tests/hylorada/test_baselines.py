"""Every method is the formula that its name promises."""

import math

import pytest
import torch

from hylorada.baselines import METHODS, baseline_config
from hylorada.lora import adapted_layers
from hylorada.model import HyLoRADAModel

RANK, ALPHA = 4, 6.0


@pytest.fixture
def layer_of(make_base):
    """The first adapted linear of a method's model, with random adapters, in fp64."""

    def make(method):
        config = baseline_config(method, lora_rank=RANK, lora_alpha=ALPHA, lora_dropout=0.0)
        layer = next(iter(adapted_layers(HyLoRADAModel(make_base(dtype=torch.float64), config)).values()))
        generator = torch.Generator().manual_seed(4)
        with torch.no_grad():
            for parameter in (layer.lora_b, layer.magnitude, layer.residual_weight):
                if parameter is not None:
                    parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
        return layer

    return make


def expected_weight(layer, scale, beta):
    """W + s B A, its rows scaled to the learned magnitude, blended with itself by beta."""
    adapted = layer.weight + scale * layer.lora_b @ layer.lora_a
    if layer.magnitude is None:
        return adapted
    gain = (1 - beta) * layer.magnitude / adapted.norm(dim=1) + beta
    return gain[:, None] * adapted


@pytest.mark.parametrize(
    ("method", "scale", "has_magnitude", "has_blend"),
    [
        ("lora", ALPHA / RANK, False, False),
        ("rslora", ALPHA / math.sqrt(RANK), False, False),
        ("dora", ALPHA / RANK, True, False),
        ("lorada", ALPHA / RANK, False, False),
        ("hylorada", ALPHA / math.sqrt(RANK), True, True),
    ],
)
def test_method_is_its_formula(layer_of, method, scale, has_magnitude, has_blend):
    layer = layer_of(method)
    assert (layer.magnitude is not None, layer.residual_weight is not None) == (has_magnitude, has_blend)
    beta = torch.sigmoid(layer.residual_weight) if has_blend else 0.0
    torch.testing.assert_close(layer.merged_weight(), expected_weight(layer, scale, beta))


@pytest.mark.parametrize("method", [name for name in METHODS if name != "baseline"])
def test_method_starts_as_the_base_model(make_base, token_ids, method):
    base = make_base()
    with torch.no_grad():
        expected = base(token_ids).logits
        actual = HyLoRADAModel(base, baseline_config(method, lora_dropout=0.0))(token_ids).logits
    torch.testing.assert_close(actual, expected)


def test_only_hylorada_has_a_position_bias():
    configs = {name: baseline_config(name) for name in METHODS}
    assert [name for name, config in configs.items() if config and config.position_bias_enabled] == ["hylorada"]


def test_only_lorada_adapts_the_attention():
    configs = {name: baseline_config(name) for name in METHODS}
    assert [name for name, config in configs.items() if config and config.daa_enabled] == ["lorada"]


def test_baseline_adapts_nothing():
    assert baseline_config("baseline", lora_rank=64) is None


def test_shared_fields_reach_every_method():
    for name in set(METHODS) - {"baseline"}:
        config = baseline_config(name, lora_rank=3, lora_target_modules=("c_attn",))
        assert (config.lora_rank, config.lora_target_modules) == (3, ("c_attn",))


@pytest.mark.parametrize("method", ["full", "longlora", "sparse"])
def test_planned_method_says_that_it_is_not_built(method):
    with pytest.raises(NotImplementedError, match=f"'{method}' is not built yet"):
        baseline_config(method)


def test_unknown_method_is_named_with_the_known_ones():
    known = "baseline, lora, rslora, dora, lorada, hylorada"
    with pytest.raises(ValueError, match=f"unknown method 'qlora': use one of {known}"):
        baseline_config("qlora")


def test_method_cannot_be_turned_into_another():
    with pytest.raises(ValueError, match="'dora' decides use_rslora itself"):
        baseline_config("dora", use_rslora=True)
