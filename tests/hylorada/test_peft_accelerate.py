"""PEFT's layers by the fused op: PEFT's results, files and behaviour, and PEFT's own forward for what is not fused."""

import copy
import pickle
import statistics

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import Linear
from torch import nn
from transformers import Trainer, TrainingArguments

from hylorada.integrations import peft as integration
from hylorada.integrations.peft import FusedLinear, Status, accelerate, restore, status
from hylorada_kernels import norm_cache
from hylorada_kernels.testing import relative_error
from tests.hylorada.conftest import FAMILIES
from tests.hylorada.processes import data_parallel, fully_sharded

METHODS = {
    "lora": {"use_dora": False},
    "rslora": {"use_dora": False, "use_rslora": True},
    "dora": {"use_dora": True},
    "dora_rslora": {"use_dora": True, "use_rslora": True},
}


@pytest.fixture
def make_peft(make_base):
    """make_peft(family, dtype, **fields of LoraConfig) -> PEFT's model in eval mode, its adapter not at the start."""

    def make(family="llama", dtype=torch.float32, **fields):
        config = {"r": 4, "target_modules": list(FAMILIES[family][2]), "lora_dropout": 0.0, "use_dora": True} | fields
        if family == "gpt2":
            config["fan_in_fan_out"] = True
        return disturb(get_peft_model(make_base(family, dtype), LoraConfig(**config))).eval()

    return make


def disturb(model):
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator).to(parameter))
    return model


def accelerated(model):
    """A copy of a model whose layers are all fused."""
    model = copy.deepcopy(model)
    found = accelerate(model)
    assert found.fused and not found.fallback
    return model


def results(model, ids, **inputs):
    """Logits, and the gradients of all that is trained."""
    model.zero_grad()
    output = model(ids, labels=ids, **inputs)
    output.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    return {"logits": output.logits.detach()} | gradients


def assert_close(found, expected, bound):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert relative_error(found[name], value.double()) <= bound, name


def flattened(tensors):
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


def calls_of_the_op(monkeypatch):
    """A list that grows by one with every call of the fused op."""
    calls, op = [], integration.hybrid_linear

    def counted(x, *args, **kwargs):
        calls.append(x.shape)
        return op(x, *args, **kwargs)

    monkeypatch.setattr(integration, "hybrid_linear", counted)
    return calls


def assert_left_to_peft(model, expected, ids, monkeypatch, reason, **inputs):
    """Not a bit of the logits is other than PEFT's, the op is not called, and the status says why."""
    calls = calls_of_the_op(monkeypatch)
    assert torch.equal(model(ids, **inputs).logits, expected)
    assert not calls
    found = status(model)
    assert not found.fused
    assert found.fallback and all(reason in given for given in found.fallback.values()), found


@pytest.mark.parametrize("method", METHODS)
def test_logits_and_gradients_are_pefts(make_peft, token_ids, family, method):
    """In fp64, where only a mistake tells two programs apart; and to 1e-6 in fp32, no further from the truth."""
    plain = make_peft(family, **METHODS[method])
    expected, found = results(plain, token_ids), results(accelerated(plain), token_ids)
    exact = plain.double()
    truth = results(exact, token_ids)
    assert_close(results(accelerated(exact), token_ids), truth, 1e-12)
    for name, value in truth.items():
        assert relative_error(found[name], value) <= 2 * relative_error(expected[name], value) + 2**-23, name
    assert relative_error(found.pop("logits"), expected.pop("logits").double()) <= 1e-6
    assert relative_error(flattened(found), flattened(expected).double()) <= 1e-6


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("adapters", [torch.float32, torch.bfloat16])
def test_bf16_is_as_near_the_truth_as_peft_with_bf16_adapters(make_peft, token_ids, family, method, adapters):
    """The factors enter 16-bit products in 16 bits, as in PEFT with adapters of 16 bits."""
    plain = make_peft(family, torch.bfloat16, **METHODS[method])
    for name, parameter in plain.named_parameters():
        if "lora_" in name:
            # values that both dtypes have
            parameter.data = parameter.data.bfloat16().to(adapters)
    truth = results(copy.deepcopy(plain).double(), token_ids)
    fused = results(accelerated(plain), token_ids)
    in_bf16 = copy.deepcopy(plain)
    for parameter in in_bf16.parameters():
        parameter.data = parameter.data.bfloat16()
    expected = results(in_bf16, token_ids)
    for name in truth:
        assert fused[name].dtype == (adapters if "lora_" in name else torch.bfloat16)
    if family == "opt":
        # a ReLU that rounding turns on or off moves the gradients by more than any rounding
        truth = {"logits": truth["logits"]}
    ratios = []
    for name, value in truth.items():
        ratios.append(relative_error(fused[name], value) / relative_error(expected[name], value))
        assert ratios[-1] <= 2, name
    assert statistics.geometric_mean(ratios) <= 1.15


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_autocast_is_as_near_the_truth_as_peft(make_peft, token_ids, method):
    plain = make_peft("qwen2", **METHODS[method])
    truth = results(copy.deepcopy(plain).double(), token_ids)
    with torch.autocast("cpu", torch.bfloat16):
        expected, found = results(plain, token_ids), results(accelerated(plain), token_ids)
    for name, value in truth.items():
        assert found[name].dtype == expected[name].dtype
        assert relative_error(found[name], value) <= 1.5 * relative_error(expected[name], value) + 2**-8, name


def test_the_op_runs_in_every_layer(make_peft, token_ids, family, monkeypatch):
    model = accelerated(make_peft(family))
    calls = calls_of_the_op(monkeypatch)
    model(token_ids)
    assert len(calls) == len(status(model).fused) == sum(isinstance(module, FusedLinear) for module in model.modules())


def test_keys_parameters_and_files_are_pefts(make_base, make_peft, token_ids, tmp_path):
    model = make_peft("gpt2")
    keys, parameters = list(model.state_dict()), [id(parameter) for parameter in model.parameters()]
    expected = model(token_ids).logits
    model.save_pretrained(tmp_path / "before")
    accelerate(model)
    assert list(model.state_dict()) == keys and [id(parameter) for parameter in model.parameters()] == parameters
    model.save_pretrained(tmp_path / "after")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "after" / name).read_bytes() == (tmp_path / "before" / name).read_bytes()
    loaded = PeftModel.from_pretrained(make_base("gpt2"), tmp_path / "after")
    assert torch.equal(loaded(token_ids).logits, expected)
    accelerate(loaded)
    assert relative_error(loaded(token_ids).logits, expected.double()) <= 1e-6


def test_accelerating_twice_changes_nothing_more(make_peft):
    model = make_peft()
    first = accelerate(model)
    classes = [type(module) for module in model.modules()]
    assert accelerate(model) == first == status(model)
    assert [type(module) for module in model.modules()] == classes


def test_restoring_leaves_no_trace(make_peft, token_ids):
    model = make_peft()
    expected, contents = model(token_ids).logits, [(type(module), set(vars(module))) for module in model.modules()]
    accelerate(model)
    model(token_ids)
    restore(model)
    assert [(type(module), set(vars(module))) for module in model.modules()] == contents
    assert torch.equal(model(token_ids).logits, expected)
    assert b"hylorada" not in pickle.dumps(model)
    assert all("not accelerated" in reason for reason in status(model).fallback.values())
    restore(model)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_fused_and_keep_norms_of_their_own(make_peft, token_ids, copied):
    model = accelerated(make_peft())
    before = model(token_ids).logits
    other = copied(model)
    assert status(other) == status(model)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    with norm_cache.verifying():
        assert not torch.equal(other(token_ids).logits, before)
        assert torch.equal(model(token_ids).logits, before)


def test_the_norm_follows_factors_weight_and_scale(make_peft, token_ids):
    plain = make_peft().double()
    fused = accelerated(plain)

    def layer_of(model):
        return model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")

    changes = [
        lambda layer: layer.lora_A["default"].weight.data.mul_(1.5),
        lambda layer: layer.lora_B["default"].weight.data.mul_(1.5),
        lambda layer: layer.base_layer.weight.data.mul_(1.5),
        lambda layer: layer.scale_layer(2.0),
        lambda layer: layer.unscale_layer(),
        lambda layer: layer.set_scale("default", 0.5),
    ]
    for change in changes:
        before = plain(token_ids).logits
        for model in (plain, fused):
            change(layer_of(model))
        expected = plain(token_ids).logits
        assert not torch.allclose(expected, before)
        assert relative_error(fused(token_ids).logits, expected) <= 1e-12


def test_the_norms_of_all_layers_are_made_together_after_a_change(make_peft, token_ids, family, norms_made):
    model = accelerated(make_peft(family))
    accelerate(model)
    # layers that have run, no others
    model(token_ids)
    disturb(model)
    for _ in range(2):
        norms_made.clear()
        before = model(token_ids).logits
        model(token_ids)
        assert norms_made.are_together(len(status(model).fused))
        disturb(model)
    assert not torch.equal(model(token_ids).logits, before)
    norms_made.clear()
    # one that is not the first is made by its layer
    last = [module for module in model.modules() if isinstance(module, FusedLinear)][-1]
    last.lora_B["default"].weight.data.add_(0.1)
    found = model(token_ids).logits
    assert norms_made.are_of(1)
    assert torch.equal(found, copy.deepcopy(model)(token_ids).logits)


def test_trained_biases_get_pefts_gradients(make_peft, token_ids):
    plain = make_peft("qwen2", bias="all").double()
    expected = results(plain, token_ids)
    assert any(name.endswith("q_proj.base_layer.bias") for name in expected)
    assert_close(results(accelerated(plain), token_ids), expected, 1e-12)


def test_frozen_factors_stay_frozen(make_peft, token_ids):
    plain = make_peft().double()
    for name, parameter in plain.named_parameters():
        if "lora_A" in name or ("layers.0" in name and "magnitude" in name):
            parameter.requires_grad_(False)
    assert_close(results(accelerated(plain), token_ids), results(plain, token_ids), 1e-12)


def test_dropout_of_lora_is_on_the_low_rank_path(make_base):
    """With A and B that pass x on, the layer's output less the base's is the dropped x."""
    base = nn.Module()
    base.linear = nn.Linear(8, 8)
    config = LoraConfig(r=8, lora_alpha=8, target_modules=["linear"], lora_dropout=0.25)
    model = get_peft_model(base, config)
    layer = model.base_model.model.linear
    with torch.no_grad():
        for factor in (layer.lora_A["default"].weight, layer.lora_B["default"].weight):
            factor.copy_(torch.eye(8))
    assert accelerate(model).fused
    x = torch.randn(2000, 8).abs() + 1
    dropped = layer.train()(x) - layer.base_layer(x)
    kept = dropped.abs() > 1e-3
    assert abs(kept.float().mean().item() - 0.75) < 0.02
    torch.testing.assert_close(dropped, torch.where(kept, x / 0.75, 0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer.eval()(x) - layer.base_layer(x), x, rtol=1e-4, atol=1e-5)


def test_dora_with_dropout_is_pefts_in_training_and_fused_in_evaluation(make_peft, token_ids, monkeypatch):
    plain = make_peft(lora_dropout=0.3)
    model = copy.deepcopy(plain)
    found = accelerate(model)
    assert not found.fused and all("set lora_dropout=0; evaluation is fused" in r for r in found.fallback.values())
    calls = calls_of_the_op(monkeypatch)
    assert relative_error(model(token_ids).logits, plain(token_ids).logits.double()) <= 1e-6
    assert len(calls) == len(found.fallback)
    calls.clear()
    torch.manual_seed(5)
    expected = plain.train()(token_ids).logits
    torch.manual_seed(5)
    assert torch.equal(model.train()(token_ids).logits, expected)
    assert not calls


def test_several_adapters(make_peft, token_ids, monkeypatch):
    plain = make_peft()
    plain.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj", "o_proj"], use_rslora=True))
    disturb(plain)
    # in fp32 PEFT's own gradients lie further from the truth than that
    plain = plain.double()
    model = copy.deepcopy(plain)
    accelerate(model)
    for name in ("other", "default", "other"):
        for either in (plain, model):
            either.set_adapter(name)
        assert len(status(model).fused) == (14 if name == "default" else 4)
        assert_close(results(model, token_ids), results(plain, token_ids), 1e-6)
    for either in (plain, model):
        either.base_model.set_adapter(["default", "other"])
    found = status(model)
    assert len(found.fallback) == 4 and all("2 adapters are active" in reason for reason in found.fallback.values())
    assert relative_error(model(token_ids).logits, plain(token_ids).logits.double()) <= 1e-6
    for either in (plain, model):
        either.base_model.set_adapter("default")
        either.delete_adapter("other")
    assert all(set(layer._hylorada_kept) <= {"default"} for layer in model.modules() if isinstance(layer, FusedLinear))
    assert_close(results(model, token_ids), results(plain, token_ids), 1e-6)


def test_layers_of_an_adapter_added_later_are_named_until_accelerated(make_peft, token_ids):
    model = make_peft(target_modules=["q_proj"])
    accelerate(model)
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj", "v_proj"], use_dora=True))
    model.set_adapter("other")
    found = status(model)
    assert len(found.fused) == 2
    assert all(name.endswith("v_proj") and "call accelerate" in reason for name, reason in found.fallback.items())
    assert len(accelerate(model).fused) == 4


# not DoRA on Conv1D: peft 0.18 cannot unmerge that
@pytest.mark.parametrize(("family", "method"), [("llama", "dora"), ("gpt2", "lora")])
def test_merged_layers_are_left_to_peft(make_peft, token_ids, monkeypatch, family, method):
    plain = make_peft(family, **METHODS[method])
    model = accelerated(plain)
    fused = model(token_ids).logits
    for either in (plain, model):
        either.merge_adapter()
    with monkeypatch.context() as patch:
        assert_left_to_peft(model, plain(token_ids).logits, token_ids, patch, "merged")
    for either in (plain, model):
        either.unmerge_adapter()
    assert status(model).fused
    assert relative_error(model(token_ids).logits, fused.double()) <= 1e-5


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_merge_and_unload_give_pefts_models(make_base, make_peft, token_ids, method):
    plain = make_peft(**METHODS[method])
    merged = accelerated(plain).merge_and_unload()
    assert not any(isinstance(module, Linear) for module in merged.modules())
    assert torch.equal(merged(token_ids).logits, copy.deepcopy(plain).merge_and_unload()(token_ids).logits)
    assert torch.equal(accelerated(plain).unload()(token_ids).logits, make_base()(token_ids).logits)


def test_disabled_adapters_are_left_to_peft(make_base, make_peft, token_ids, monkeypatch):
    model = accelerated(make_peft())
    fused = model(token_ids).logits
    with model.disable_adapter(), monkeypatch.context() as patch:
        assert_left_to_peft(model, make_base()(token_ids).logits, token_ids, patch, "disabled")
    assert torch.equal(model(token_ids).logits, fused)


def test_disabling_while_merged_unmerges(make_base, make_peft, token_ids):
    model = accelerated(make_peft())
    model.merge_adapter()
    with model.disable_adapter():
        found = model(token_ids).logits
    assert relative_error(found, make_base()(token_ids).logits.double()) <= 1e-5


def test_mixed_batches_are_left_to_peft(make_peft, token_ids, monkeypatch):
    plain = make_peft(use_dora=False)
    plain.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))
    disturb(plain)
    model = copy.deepcopy(plain)
    accelerate(model)
    names = ["other", "__base__"]
    expected = plain(token_ids, adapter_names=names).logits
    calls = calls_of_the_op(monkeypatch)
    assert torch.equal(model(token_ids, adapter_names=names).logits, expected)
    assert not calls
    with pytest.raises(ValueError, match="Length of `adapter_names`"):
        model(token_ids, adapter_names=["other"])
    with pytest.raises(ValueError, match="DoRA"):
        accelerated(make_peft())(token_ids, adapter_names=["default", "__base__"])


def hook_on_base(layer):
    layer.base_layer.register_forward_hook(lambda module, inputs, output: 2 * output)


def hook_on_dropout(layer):
    layer.lora_dropout["default"].register_forward_pre_hook(lambda module, inputs: (2 * inputs[0],))


def replace_forward_of_base(layer):
    forward = layer.base_layer.forward
    layer.base_layer.forward = lambda x: 2 * forward(x)


def train_base(layer):
    layer.base_layer.weight.requires_grad_(True)


def other_base_class(layer):
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    layer.base_layer.__class__ = Doubled


def other_factor_class(layer):
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    layer.lora_A["default"].__class__ = Doubled


def tensor_scale(layer):
    layer.scaling["default"] = torch.tensor(0.7)


class Special(torch.Tensor):
    """What quantised and sharded parameters are to PyTorch: a subclass."""


def special_parameter(layer):
    parameter = layer.lora_B["default"].weight
    layer.lora_B["default"].weight = nn.Parameter(parameter.detach().as_subclass(Special))


def widened_bias(layer):
    layer.base_layer.bias = nn.Parameter(torch.zeros(layer.out_features, dtype=torch.float64), requires_grad=False)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (hook_on_base, "a hook sits on the base layer"),
        (hook_on_dropout, "a hook sits on the base layer"),
        (replace_forward_of_base, "a hook sits on the base layer"),
        (train_base, "the base weight is trained"),
        (other_base_class, "the base layer is a"),
        (other_factor_class, "A and B are not plain"),
        (tensor_scale, "the scaling is not a number"),
        (special_parameter, "a parameter is quantised, sharded or of another special kind"),
    ],
)
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_unusual_layers_are_left_to_peft(make_peft, token_ids, monkeypatch, method, change, reason):
    plain = make_peft(target_modules=["q_proj"], **METHODS[method])
    for layer in [module for module in plain.modules() if isinstance(module, Linear)]:
        change(layer)
    expected = plain(token_ids).logits
    accelerate(plain)
    assert_left_to_peft(plain, expected.detach(), token_ids, monkeypatch, reason)
    assert results(plain, token_ids)


def test_a_bias_of_another_dtype_is_pefts_error(make_peft, token_ids):
    model = make_peft(target_modules=["q_proj"])
    for layer in [module for module in model.modules() if isinstance(module, Linear)]:
        widened_bias(layer)
    assert all("the bias is torch.float64" in reason for reason in accelerate(model).fallback.values())
    with pytest.raises(RuntimeError, match="dtype"):
        model(token_ids)


def test_lora_bias_is_left_to_peft(make_peft, token_ids, monkeypatch):
    plain = make_peft("qwen2", target_modules=["q_proj"], use_dora=False, lora_bias=True)
    expected = plain(token_ids).logits
    accelerate(plain)
    assert_left_to_peft(plain, expected, token_ids, monkeypatch, "lora_bias=True")


def test_other_variants_are_left_to_peft(make_peft, token_ids, monkeypatch):
    plain = make_peft(target_modules=["q_proj"], use_dora=False, alora_invocation_tokens=[int(token_ids[0, 4])])
    expected = plain(token_ids).logits
    accelerate(plain)
    assert_left_to_peft(plain, expected, token_ids, monkeypatch, "ALoraLinearVariant is other mathematics")


def test_embeddings_and_convolutions_are_not_touched():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens, self.linear, self.convolution = nn.Embedding(9, 8), nn.Linear(8, 8), nn.Conv1d(8, 8, 1)

        def forward(self, ids):
            return self.convolution(self.linear(self.tokens(ids)).transpose(1, 2))

    config = LoraConfig(r=2, target_modules=["tokens", "linear", "convolution"], use_dora=True)
    plain = disturb(get_peft_model(Mixed(), config))
    model = copy.deepcopy(plain)
    found = accelerate(model)
    assert found.fused == ["base_model.model.linear"]
    reasons = {name.rpartition(".")[2]: reason for name, reason in found.fallback.items()}
    assert set(reasons) == {"tokens", "convolution"}
    assert "lora.layer.Embedding is not PEFT's plain linear layer" in reasons["tokens"]
    ids = torch.arange(6).view(2, 3)
    assert relative_error(model(ids), plain(ids).double()) <= 1e-6
    assert str(found).startswith("1 of 3 PEFT layers are fused")


def test_a_layer_whose_forward_is_replaced_says_so(make_peft):
    model = make_peft(target_modules=["q_proj"])
    layer = next(module for module in model.modules() if isinstance(module, Linear))
    layer.forward = layer.forward
    assert list(accelerate(model).fallback.values()) == ["its forward was replaced by a hook"]


def test_an_input_of_another_dtype_is_pefts_error(make_peft):
    model = accelerated(make_peft())
    layer = next(module for module in model.modules() if isinstance(module, FusedLinear))
    for x in (torch.randn(2, 32, dtype=torch.float64), torch.randn(2, 31), torch.zeros(2, 32, dtype=torch.int64)):
        with pytest.raises(RuntimeError, match=r"dtype|shapes cannot be multiplied"):
            layer(x)


def test_what_has_no_peft_layers_is_refused(make_base):
    with pytest.raises(ValueError, match="LlamaForCausalLM has no PEFT layers; call accelerate on what get_peft_model"):
        accelerate(make_base())
    with pytest.raises(TypeError, match="must be a torch module with PEFT layers, got dict"):
        accelerate({})
    assert status(make_base()) == Status([], {})


def test_a_replica_computes_the_same_and_leaves_the_norm_alone(make_peft):
    """nn.DataParallel runs copies of the modules in threads, which share everything but the parameters."""
    model = accelerated(make_peft())
    layer = next(module for module in model.modules() if isinstance(module, FusedLinear))
    x = torch.randn(3, 32)
    replica = layer._replicate_for_data_parallel()
    assert relative_error(replica(x), layer.double()(x.double())) <= 1e-6
    assert set(replica._hylorada_kept) == {"default"}
    fresh = accelerated(make_peft())
    layer = next(module for module in fresh.modules() if isinstance(module, FusedLinear))
    layer._replicate_for_data_parallel()(x)
    assert layer._hylorada_kept == {}


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(make_peft, token_ids, use_reentrant):
    plain = make_peft().double()
    model = accelerated(plain)
    expected = results(plain, token_ids)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    assert_close(results(model.train(), token_ids, use_cache=False), expected, 1e-12)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_a_compiled_layer_is_one_graph(make_peft, method):
    layer = next(
        module for module in accelerated(make_peft(**METHODS[method])).modules() if isinstance(module, FusedLinear)
    )
    x = torch.randn(3, 32)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert relative_error(compiled(x), layer(x).double()) <= 1e-6


class Recorder(Trainer):
    """A Trainer that keeps the loss of every step."""

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        self.__dict__.setdefault("losses", []).append(loss.item())
        return loss


def trained(model, folder):
    """Losses and final parameters of a few steps with transformers' Trainer."""
    rows = torch.randint(3, 97, (24, 16), generator=torch.Generator().manual_seed(4))
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=6,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        seed=7,
    )
    trainer = Recorder(model, arguments, train_dataset=[{"input_ids": row, "labels": row} for row in rows])
    with norm_cache.verifying():
        trainer.train()
    return trainer.losses, {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_trainer_sees_no_difference(make_peft, method, tmp_path):
    plain = make_peft(**METHODS[method]).double()
    model = accelerated(plain)
    expected_losses, expected = trained(plain, tmp_path / "plain")
    losses, found = trained(model, tmp_path / "fused")
    assert len(losses) == 12 and losses[-1] != losses[0]
    assert losses == pytest.approx(expected_losses, rel=1e-10)
    assert_close(found, expected, 1e-8)


def test_trainer_in_fp32_differs_by_rounding(make_peft, tmp_path):
    plain = make_peft()
    model = accelerated(plain)
    losses = trained(model, tmp_path / "fused")[0]
    assert losses == pytest.approx(trained(plain, tmp_path / "plain")[0], rel=1e-5)


def distributed_steps(rank, options):
    """Losses, gradients and calls of the op in three steps on this process's samples, by PEFT and fused."""
    from tests.kernels.test_distributed import whole

    found, calls = {}, []
    op = integration.hybrid_linear
    integration.hybrid_linear = lambda x, *args, **kwargs: calls.append(x.shape) or op(x, *args, **kwargs)
    for kind in ("peft", "fused"):
        model = copy.deepcopy(options["model"])
        if kind == "fused":
            accelerate(model)
        model = options["wrap"](model)
        trained = {name.removeprefix("module."): p for name, p in model.named_parameters() if p.requires_grad}
        optimizer = torch.optim.AdamW(trained.values(), lr=0.01)
        for step in range(3):
            ids = torch.randint(3, 97, (2, 8), generator=torch.Generator().manual_seed(10 * step + rank))
            optimizer.zero_grad()
            calls.clear()
            with norm_cache.verifying():
                loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            found[f"{kind} calls {step}"] = torch.tensor(len(calls))
            found[f"{kind} loss {step}"] = loss.detach()
            for name, parameter in trained.items():
                found[f"{kind} {name} {step}"] = whole(parameter.grad)
            optimizer.step()
    return found


@pytest.mark.parametrize("wrap", [data_parallel, fully_sharded])
def test_two_processes_get_pefts_losses_and_gradients(make_peft, wrap, tmp_path):
    from tests.kernels.test_distributed import in_processes

    model = make_peft().double()
    for found in in_processes(distributed_steps, tmp_path, {"model": model, "wrap": wrap}):
        assert {found.pop(f"fused calls {step}").item() for step in range(3)} == {len(accelerate(model).fused)}
        assert {found.pop(f"peft calls {step}").item() for step in range(3)} == {0}
        fused = {name.removeprefix("fused "): value for name, value in found.items() if name.startswith("fused ")}
        by_peft = {name.removeprefix("peft "): value for name, value in found.items() if name.startswith("peft ")}
        assert len(fused) > 3
        assert_close(fused, by_peft, 1e-9)
