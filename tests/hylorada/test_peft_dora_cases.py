"""What PEFT's own suite checks of its DoRA layers, checked of accelerated ones. Each check has a test:

- a new adapter leaves the outputs as they are, for linear layers with and without bias, and beside embeddings and
  convolutions; the magnitude starts at the weight's norm
- training changes the parameters of the active adapter and no others; with gradient checkpointing the gradients are
  the same
- saving and loading restore the outputs, on the meta device first too, and an adapter's files of the old format
- merging, with the check for nan too, leaves the outputs as they are, with one adapter and several; unmerging restores
- unloading restores the base model; merging and unloading gives plain layers
- disabling, before and while merged, restores the base model's outputs
- several adapters: which is active, which requires gradients, deleting an active, an inactive and an unknown one
- weighted combinations of adapters
- outputs are finite and of the input's dtype in float16, bfloat16 and under autocast; without the casting of inputs
  there is PEFT's error
- a scaled adapter, one that is scaled in a context, and one whose weights were exchanged in place (LoRA: PEFT's hotswap
  does not know DoRA)
- mixed batches are refused; generation works; layer status; a state dict of PEFT's keys; torch.compile
"""

import copy

import pytest
import torch
from peft import (
    LoraConfig,
    PeftModel,
    get_layer_status,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.helpers import disable_input_dtype_casting, rescale_adapter_scale
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from hylorada.integrations.peft import FusedLinear, accelerate
from hylorada_kernels.testing import relative_error


class Mlp(nn.Module):
    def __init__(self, layer=nn.Linear, bias=True):
        super().__init__()
        torch.manual_seed(0)
        self.first = layer(10, 20, bias=bias) if layer is nn.Linear else layer(20, 10)
        self.second = nn.Linear(20, 20, bias=bias)
        self.head = nn.Linear(20, 2, bias=bias)

    def forward(self, x):
        return self.head(self.second(self.first(x).relu()).relu())


def config(**fields):
    return LoraConfig(**{"target_modules": ["first", "second"], "r": 4, "use_dora": True} | fields)


def make(base=None, start=False, plain=False, **fields):
    """An accelerated DoRA model, whose adapter is not at its start; `plain` leaves it to PEFT."""
    model = get_peft_model(Mlp() if base is None else base, config(**fields)).eval()
    if not start:
        disturb(model)
    if not plain:
        accelerate(model)
        assert any(isinstance(module, FusedLinear) for module in model.modules())
    return model


def disturb(model, name="default"):
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_" in key and f".{name}" in key:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator).to(parameter))


@pytest.fixture
def x():
    return torch.randn(5, 10, generator=torch.Generator().manual_seed(1))


def close(found, expected, bound=1e-6):
    return relative_error(found, expected.double()) <= bound


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layer", [nn.Linear, Conv1D])
def test_a_new_adapter_changes_no_output(x, layer, bias):
    base = Mlp(layer, bias)
    expected = base(x)
    model = make(base, start=True, fan_in_fan_out=layer is Conv1D, target_modules=["first"])
    assert close(model(x), expected)
    weight = model.base_model.model.first.base_layer.weight
    magnitude = model.base_model.model.first.lora_magnitude_vector["default"].weight
    torch.testing.assert_close(magnitude, (weight if layer is nn.Linear else weight.T).norm(dim=1))


def test_a_new_adapter_beside_an_embedding_and_a_convolution():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.convolution, self.first = nn.Embedding(9, 16), nn.Conv2d(1, 4, 3), nn.Linear(24, 8)

        def forward(self, ids):
            return self.first(self.convolution(self.table(ids).view(1, 1, 4, -1)).view(1, -1)[:, :24])

    base, ids = Mixed(), torch.arange(4)
    expected = base(ids)
    model = make(base, start=True, target_modules=["table", "convolution", "first"])
    assert close(model(ids), expected)
    disturb(model)
    assert not close(model(ids), expected, 1e-3)


def test_only_the_active_adapter_is_trained(x):
    model = make(start=True)
    model.add_adapter("other", config(target_modules=["second"]))
    accelerate(model)
    for name in ("default", "other"):
        model.set_adapter(name)
        before = {key: parameter.detach().clone() for key, parameter in model.named_parameters()}
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
        for _ in range(3):
            optimizer.zero_grad()
            model.train()(x).square().sum().backward()
            optimizer.step()
        changed = {key for key, parameter in model.named_parameters() if not torch.equal(parameter, before[key])}
        assert changed == {key for key in before if "lora_" in key and f".{name}" in key}


def test_gradients_are_pefts_and_so_with_checkpointing(x):
    plain, model = make(plain=True), make()

    def gradients(forward, of):
        of.zero_grad()
        forward(x).square().sum().backward()
        return {key: parameter.grad.clone() for key, parameter in of.named_parameters() if parameter.requires_grad}

    expected = gradients(plain, plain)
    for forward in (model, lambda x: torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)):
        found = gradients(forward, model)
        assert found.keys() == expected.keys()
        assert all(close(found[key], value) for key, value in expected.items())


@pytest.mark.parametrize("options", [{}, {"low_cpu_mem_usage": True}, {"adapter_name": "mine"}])
def test_saving_and_loading_restore_the_outputs(x, options, tmp_path):
    model = make()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(Mlp(), tmp_path, **options).eval()
    assert len(accelerate(loaded).fused) == 2
    assert close(loaded(x), model(x))
    assert not close(loaded(x), Mlp()(x), 1e-3)


def test_files_have_pefts_keys_and_old_files_are_read(x, tmp_path):
    """In files the magnitude is a tensor, not a module's weight, as before it was a module."""
    model, plain = make(), make(plain=True)
    assert get_peft_model_state_dict(model).keys() == get_peft_model_state_dict(plain).keys()
    assert list(model.state_dict()) == list(plain.state_dict())
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(key.endswith("lora_magnitude_vector") for key in tensors) == 2
    other = make(start=True)
    outcome = set_peft_model_state_dict(other, tensors)
    assert not outcome.unexpected_keys
    assert close(other(x), model(x))


@pytest.mark.parametrize("safe", [False, True])
def test_merging_changes_no_output_and_unmerging_restores(x, safe):
    model = make()
    expected = model(x)
    model.merge_adapter(safe_merge=safe)
    assert close(model(x), expected, 1e-5)
    model.unmerge_adapter()
    assert close(model(x), expected, 1e-5)
    assert close(model.merge_and_unload(safe_merge=safe)(x), expected, 1e-5)


def test_merging_nan_is_refused_when_asked_to_look():
    model = make()
    model.base_model.model.first.lora_A["default"].weight.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="NaN"):
        model.merge_and_unload(safe_merge=True)


def test_merging_one_of_several_adapters(x):
    model = make()
    model.add_adapter("other", config(r=2))
    disturb(model, "other")
    accelerate(model)
    first = model(x)
    model.set_adapter("other")
    second = model(x)
    assert not close(first, second, 1e-3)
    for name, expected in (("default", first), ("other", second)):
        merged = copy.deepcopy(model).merge_and_unload(adapter_names=[name])
        assert close(merged(x), expected, 1e-5)


def test_unloading_restores_the_base_model(x):
    unloaded = make().unload()
    assert torch.equal(unloaded(x), Mlp()(x))
    assert unloaded.state_dict().keys() == Mlp().state_dict().keys()
    assert not any(isinstance(module, FusedLinear) for module in unloaded.modules())


def test_disabling_restores_the_outputs_of_the_base_model(x):
    model, expected = make(), Mlp()(x)
    adapted = model(x)
    with model.disable_adapter():
        assert torch.equal(model(x), expected)
        assert not any(parameter.requires_grad for key, parameter in model.named_parameters() if "lora_" in key)
    assert torch.equal(model(x), adapted)
    model.merge_adapter()
    with model.disable_adapter():
        assert close(model(x), expected, 1e-5)


def test_active_adapters_require_gradients(x):
    model = make()
    model.add_adapter("other", config(target_modules=["second", "head"]))
    accelerate(model)
    for name in ("other", "default"):
        model.set_adapter(name)
        assert model.active_adapters == [name]
        trained = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
        assert trained == {key for key, _ in model.named_parameters() if "lora_" in key and f".{name}" in key}
    with pytest.raises(ValueError, match="not found"):
        model.set_adapter("third")


def test_adapters_are_deleted(x):
    model, plain = make(), make(plain=True)
    for either in (model, plain):
        either.add_adapter("other", config(r=2))
        disturb(either, "other")
    accelerate(model)
    expected = plain(x)
    with pytest.raises(ValueError, match="does not exist"):
        model.delete_adapter("third")
    model.delete_adapter("other")
    assert close(model(x), expected)
    model.add_adapter("other", config(r=2))
    disturb(model, "other")
    plain.set_adapter("other")
    with pytest.warns(UserWarning, match="active"):
        model.delete_adapter("default")
    assert model.active_adapters == ["other"]
    assert not any(".default" in key for key in model.state_dict())
    found = model(x)
    assert found.isfinite().all()


@pytest.mark.parametrize("kind", ["linear", "cat", "svd"])
def test_weighted_combinations(x, kind):
    model, plain = make(use_dora=False), make(plain=True, use_dora=False)
    for either in (model, plain):
        torch.manual_seed(4)
        either.add_adapter("other", config(use_dora=False))
        disturb(either, "other")
        either.add_weighted_adapter(["default", "other"], [0.3, 0.6], "both", combination_type=kind)
        either.set_adapter("both")
    assert len(accelerate(model).fused) == 2
    assert close(model(x), plain(x), 1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
def test_outputs_in_16_bits_are_finite_and_of_the_dtype(x, dtype, autocast_adapter_dtype):
    model = get_peft_model(Mlp().to(dtype), config(), autocast_adapter_dtype=autocast_adapter_dtype)
    disturb(model)
    assert accelerate(model).fused
    adapters = {parameter.dtype for key, parameter in model.named_parameters() if "lora_" in key}
    assert adapters == {torch.float32 if autocast_adapter_dtype else dtype}
    found = model(x.to(dtype))
    assert found.dtype == dtype and found.isfinite().all()
    found.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.requires_grad)


def test_outputs_under_autocast_are_pefts(x):
    model, plain = make(), make(plain=True)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = model(x), plain(x)
    assert found.dtype == expected.dtype and close(found, expected, 2**-6)


def test_without_the_casting_of_inputs_there_is_pefts_error(x):
    model = make(Mlp().bfloat16())
    with disable_input_dtype_casting(model), pytest.raises(RuntimeError, match="dtype"):
        model(x)


def test_scaled_adapters_are_pefts(x):
    model, plain = make(), make(plain=True)
    before = model(x)
    for either in (model, plain):
        either.base_model.model.first.set_scale("default", 3.0)
    assert close(model(x), plain(x)) and not close(model(x), before, 1e-3)
    with rescale_adapter_scale(model, 0.0), rescale_adapter_scale(plain, 0.0):
        assert close(model(x), plain(x))
    assert close(model(x), plain(x))


def test_exchanged_weights_are_used(x, tmp_path):
    other, model = make(use_dora=False), make(use_dora=False)
    disturb(other)
    other.save_pretrained(tmp_path)
    expected = other(x)
    assert not close(model(x), expected, 1e-3)
    hotswap_adapter(model, str(tmp_path), adapter_name="default", torch_device="cpu")
    assert close(model(x), expected)


def test_mixed_batches_are_refused(x):
    with pytest.raises(ValueError, match="DoRA"):
        make()(x, adapter_names=["default"] * 4 + ["__base__"])


def test_the_layer_status_is_pefts():
    found, expected = get_layer_status(make()), get_layer_status(make(plain=True))
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours.name, ours.enabled, ours.active_adapters, ours.requires_grad) == (
            theirs.name,
            theirs.enabled,
            theirs.active_adapters,
            theirs.requires_grad,
        )


def test_generation_is_pefts(make_base, token_ids):
    tokens = []
    for plain in (False, True):
        model = make(make_base(), plain=plain, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        tokens.append(model.generate(input_ids=token_ids, max_new_tokens=8, do_sample=False))
    assert torch.equal(*tokens)


def test_compiled_outputs_are_the_same(x):
    model = make()
    assert close(torch.compile(model, backend="aot_eager")(x), model(x))
