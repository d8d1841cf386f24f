"""The count of a training step against what the allocator hands out when the same step really runs."""

import pytest
import torch
from torch import nn

from benchmarks.memory import peak_bytes, saved_bytes
from hylorada import footprint
from hylorada.baselines import get_baseline_model
from hylorada.evaluation import batch_loss_sum
from hylorada.footprint import training_footprint
from hylorada_kernels import HybridLinear, norm_cache

LENGTH = 96


def batch_of(batch_size=2):
    return {"input_ids": torch.randint(3, 97, (batch_size, LENGTH), generator=torch.Generator().manual_seed(0))}


def counted(model, **options):
    adapter = model.adapter_parameters().values() if hasattr(model, "adapter_parameters") else []
    return training_footprint(model, adapter, LENGTH, 2, **options)


def own_peak(found):
    """The peak beyond what is there before a step."""
    before = ("weights", "buffers", "adapter", "kept norms", "optimizer")
    return found.peak - sum(found.lasting[name] for name in before)


def measured_peak(model, precision=None):
    """Of forward and backward, the norms known: the largest of three, as the allocator's log is read from a profile."""
    batch = batch_of()
    model.train()

    def step():
        with torch.autocast("cpu", dtype=precision, enabled=precision is not None):
            loss, _ = batch_loss_sum(model, batch)
        loss.backward()

    step()
    model.zero_grad()
    return peak_bytes(step)


# reading the allocator's log takes seconds: the others are for `make test-all`
QUICK = {
    "checkpointed": {"gradient_checkpointing": True},
    "sparse attention": {"s2_attn_enabled": True, "s2_group_size": 32, "s2_sink_tokens": 2},
}
VARIANTS = {
    "direct attention": {"daa_enabled": True},
    "landmarks": {"landmark_enabled": True, "train_norms": True},
    "plain lora": {"use_dora_magnitude": False, "position_bias_enabled": False},
    "dropout": {"lora_dropout": 0.1},
}


@pytest.mark.parametrize("variant", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in VARIANTS)])
def test_the_peak_is_the_measured_one(make_model, variant):
    model = make_model("llama", **(QUICK | VARIANTS)[variant])
    assert own_peak(counted(model)) == pytest.approx(measured_peak(model), rel=0.03)


@pytest.mark.slow
def test_the_peak_of_every_family_is_the_measured_one(make_model, family):
    model = make_model(family)
    assert own_peak(counted(model)) == pytest.approx(measured_peak(model), rel=0.03)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "precision"), [(torch.bfloat16, "fp32"), (torch.float32, "bf16")])
def test_the_peak_in_half_precision_is_the_measured_one(make_model, dtype, precision):
    model = make_model("llama", dtype)
    measured = measured_peak(model, torch.bfloat16 if precision == "bf16" else None)
    assert own_peak(counted(model, mixed_precision=precision)) == pytest.approx(measured, rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "sparse", "longlora"])
def test_the_peak_of_other_methods_is_the_measured_one(make_base, method):
    model = get_baseline_model(method, make_base("llama"), gradient_checkpointing=False)
    if method != "full":
        assert own_peak(counted(model)) == pytest.approx(measured_peak(model), rel=0.03)
    else:
        # the optimizer's step is the fullest moment of so small a model: all but its passing tensors are known
        weights = sum(parameter.nbytes for parameter in model.parameters())
        found = counted(model)
        assert found.lasting["gradients"] == weights and found.lasting["optimizer"] == pytest.approx(
            2 * weights, rel=0.01
        )


def test_what_is_kept_is_what_autograd_saves(make_model):
    model = make_model("llama").train()
    batch = batch_of()
    batch_loss_sum(model, batch)
    given = [*model.parameters(), *model.buffers(), *batch.values()]
    saved = saved_bytes(lambda: batch_loss_sum(model, batch)[0], given)[0]
    found = counted(model)
    assert sum(found.kept.values()) == pytest.approx(saved, rel=0.02)
    assert {"UnifiedLayer", "LlamaAttention", "LlamaMLP", "logits and loss"} <= found.kept.keys()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, {"use_blend": False}, {"keep_scaled_weight": True}], ids=str)
def test_what_a_layer_keeps_between_steps_is_what_it_holds(dtype, options):
    layer = HybridLinear.from_linear(nn.Linear(600, 800, bias=False).to(dtype), 8, **options)
    for _ in range(2):
        layer(torch.randn(4, 600, dtype=dtype))
    kept = layer._cache._kept
    held = [*layer._cache.norms._state[0], layer._cache.norms._given[1], kept.norm, *kept.copies]
    held += [kept.gain.gain, kept.gain.by_magnitude, kept.gain.by_blend, *(kept.gain.scaled or ())]
    held += kept.gain.factors[:2]
    storages = [tensor.untyped_storage() for tensor in held if tensor is not None]
    found = sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
    # the samples of the weight, and their key
    assert 0 <= found - footprint._kept_bytes(layer) <= 3 * norm_cache.WEIGHT_SAMPLES * layer.weight.element_size()


def test_the_model_is_left_as_it_was(make_model):
    model = make_model("llama", gradient_checkpointing=True).eval()
    model.base_model.model.layers[0].train()
    modes = [module.training for module in model.modules()]
    values = {name: (id(tensor), tensor.clone()) for name, tensor in model.state_dict(keep_vars=True).items()}
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    counted(model)
    assert [module.training for module in model.modules()] == modes
    assert [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()] == hooks
    for name, tensor in model.state_dict(keep_vars=True).items():
        assert id(tensor) == values[name][0] and torch.equal(tensor, values[name][1])
        assert tensor.grad is None


def test_nothing_trainable_is_a_forward_pass(make_base):
    model: nn.Module = make_base("llama").requires_grad_(False)
    found = counted(model)
    assert found.stage == "forward" and found.lasting["optimizer"] == found.lasting["gradients"] == 0
