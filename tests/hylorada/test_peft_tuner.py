"""HyLoRADA as a method of PEFT: HyLoRADAModel's results, by PEFT's ways of training, saving, merging and switching."""

import copy
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_model_status, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer, TrainingArguments

from hylorada import HyLoRADAModel, get_lora_plus_param_groups
from hylorada.integrations.peft import HyLoRADAPeftConfig, accelerate, import_adapter, status
from hylorada.integrations.peft_tuner import HyLoRADALinear
from hylorada.lora import adapted_layers
from hylorada_kernels import norm_cache
from hylorada_kernels.testing import relative_error
from tests.hylorada.conftest import FAMILIES
from tests.hylorada.processes import data_parallel, fully_sharded

METHODS = {
    "hylorada": {},
    "dora": {"use_blend": False, "use_rslora": False},
    "rslora": {"use_dora_magnitude": False},
    "norm_grad": {"dora_norm_grad": True},
}
KINDS = {
    "hylorada_A": "lora_a",
    "hylorada_B": "lora_b",
    "hylorada_lora_magnitude_vector": "magnitude",
    "hylorada_lora_magnitude_vector_blend": "residual_weight",
}


@pytest.fixture
def make_peft(make_base):
    """make_peft(family, dtype, start, **fields of the config) -> PEFT's model in eval mode."""

    def make(family="llama", dtype=torch.float32, start=False, **fields):
        config = HyLoRADAPeftConfig(**{"r": 4, "target_modules": list(FAMILIES[family][2])} | fields)
        model = get_peft_model(make_base(family, dtype), config).eval()
        return model if start else disturb(model)

    return make


def disturb(model, adapter="default", seed=3):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "hylorada_" in name and f".{adapter}" in name:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator).to(parameter))
    return model


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


def trained(model):
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def adapter_of(model):
    return {name: parameter for name, parameter in model.named_parameters() if "hylorada_" in name}


def layers_of(model):
    return [module for module in model.modules() if isinstance(module, HyLoRADALinear)]


def base_weights(model):
    return [layer.base_layer.weight.detach().clone() for layer in layers_of(model)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_starts_as_the_base_model(make_base, make_peft, token_ids, family, dtype):
    model = make_peft(family, dtype, start=True)
    assert relative_error(logits(model, token_ids), logits(make_base(family, dtype), token_ids).double()) <= (
        1e-6 if dtype == torch.float32 else 2**-7
    )
    assert {parameter.dtype for parameter in trained(model).values()} == {torch.float32}
    assert len(status(model).fused) == len(layers_of(model)) > 0 and not status(model).fallback


@pytest.mark.parametrize("method", METHODS)
def test_logits_and_gradients_are_those_of_a_hylorada_model(make_peft, make_model, token_ids, family, method):
    model = make_peft(family, torch.float64, **METHODS[method])
    config = model.peft_config["default"]
    fields = ("use_rslora", "use_dora_magnitude", "use_blend", "dora_norm_grad")
    other = make_model(
        family, torch.float64, position_bias_enabled=False, **{name: getattr(config, name) for name in fields}
    )
    counterpart = {}
    for name, layer in adapted_layers(other.base_model).items():
        theirs = model.get_submodule(f"base_model.model.{name}")
        for kind, own in KINDS.items():
            if "default" in getattr(theirs, kind):
                counterpart[f"base_model.model.{name}.{kind}.default"] = getattr(layer, own)
                getattr(layer, own).data = getattr(theirs, kind)["default"].detach().clone()
    for either in (model, other):
        either(input_ids=token_ids, labels=token_ids).loss.backward()
    assert relative_error(logits(model, token_ids), logits(other, token_ids)) <= 1e-12
    assert trained(model).keys() == counterpart.keys()
    for name, parameter in trained(model).items():
        assert parameter.grad.abs().max() > 0, name
        assert relative_error(parameter.grad, counterpart[name].grad) <= 1e-10, name


def test_a_saved_adapter_comes_back(make_base, make_peft, token_ids, family, tmp_path):
    model = make_peft(family)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert {name.rpartition(".")[2] for name in tensors} == set(KINDS)
    assert len(tensors) == 4 * len(layers_of(model))
    config = PeftConfig.from_pretrained(tmp_path)
    assert type(config) is HyLoRADAPeftConfig and config.r == 4
    for options in ({}, {"low_cpu_mem_usage": True}, {"adapter_name": "mine"}, {"is_trainable": True}):
        loaded = PeftModel.from_pretrained(make_base(family), tmp_path, **options).eval()
        with norm_cache.verifying():
            found = logits(loaded, token_ids)
        assert relative_error(found, logits(model, token_ids).double()) <= 1e-6, options
        assert all(map(torch.equal, adapter_of(loaded).values(), adapter_of(model).values())), options
        assert bool(trained(loaded)) == ("is_trainable" in options)


def test_a_saved_adapter_is_read_into_a_hylorada_model(make_base, make_peft, token_ids, family, tmp_path):
    """With the blend, which a HyLoRADAModel can train on and export as DoRA."""
    model = make_peft(family, lora_dropout=0.1)
    model.save_pretrained(tmp_path)
    loaded = import_adapter(make_base(family), tmp_path)
    assert isinstance(loaded, HyLoRADAModel) and loaded.hylorada_config.use_blend
    assert loaded.hylorada_config.lora_dropout == 0.1
    assert relative_error(logits(loaded, token_ids), logits(model, token_ids).double()) <= 1e-6
    count = sum(parameter.numel() for parameter in loaded.adapter_parameters().values())
    assert count == sum(parameter.numel() for parameter in trained(model).values())


@pytest.mark.parametrize("method", ["hylorada", "rslora"])
def test_merging_changes_nothing_and_unmerging_nothing_at_all(make_peft, token_ids, family, method):
    model = make_peft(family, **METHODS[method])
    expected, weights = logits(model, token_ids), base_weights(model)
    model.merge_adapter(safe_merge=True)
    assert model.base_model.model is model.get_base_model() and all(layer.merged for layer in layers_of(model))
    assert all("merged" in reason for reason in status(model).fallback.values())
    assert relative_error(logits(model, token_ids), expected.double()) <= 2e-6
    assert not any(map(torch.equal, base_weights(model), weights))
    model.unmerge_adapter()
    assert all(map(torch.equal, base_weights(model), weights))
    assert torch.equal(logits(model, token_ids), expected)


def test_merge_and_unload_gives_a_plain_model(make_base, make_peft, token_ids, family):
    model = make_peft(family)
    expected, plain = logits(model, token_ids), make_base(family)
    merged = model.merge_and_unload()
    assert not layers_of(merged) and merged.state_dict().keys() == plain.state_dict().keys()
    assert [type(module) for module in merged.modules()] == [type(module) for module in plain.modules()]
    assert relative_error(logits(merged, token_ids), expected.double()) <= 2e-6
    assert torch.equal(logits(make_peft(family).unload(), token_ids), logits(plain, token_ids))
    assert not any(module._forward_pre_hooks for module in merged.modules())


def test_a_broken_adapter_is_not_merged_when_asked_to_look(make_peft):
    model = make_peft()
    model.add_adapter("other", HyLoRADAPeftConfig(r=2, target_modules=["q_proj"]))
    model.merge_adapter()
    weights = base_weights(model)
    layer = next(layer for layer in layers_of(model) if "other" in layer.configs)
    with torch.no_grad():
        layer.hylorada_B["other"].fill_(torch.nan)
    with pytest.raises(ValueError, match="not finite: adapter other seems to be broken"):
        layer.merge(safe_merge=True, adapter_names=["other"])
    assert layer.merged_adapters == ["default"] and all(map(torch.equal, base_weights(model), weights))


def test_disabled_adapters_leave_the_base_model(make_base, make_peft, token_ids):
    model = make_peft()
    expected, base = logits(model, token_ids), logits(make_base(), token_ids)
    with model.disable_adapter():
        assert torch.equal(logits(model, token_ids), base)
        assert set(status(model).fallback.values()) == {"its adapters are disabled"}
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(logits(model, token_ids), base)
    assert torch.equal(logits(model, token_ids), expected)


def test_several_adapters_are_switched_added_up_and_deleted(make_base, make_peft, token_ids):
    model = make_peft()
    first = logits(model, token_ids)
    model.add_adapter("other", HyLoRADAPeftConfig(r=2, target_modules=["q_proj", "lm_head"], use_rslora=False))
    disturb(model, "other", seed=5)
    assert torch.equal(logits(model, token_ids), first)
    assert all(".default" in name for name in trained(model))
    model.set_adapter("other")
    assert all(".other" in name for name in trained(model))
    second = logits(model, token_ids)
    assert not torch.allclose(first, second)
    alone = get_peft_model(make_base(), model.peft_config["other"], adapter_name="other").eval()
    for name, parameter in adapter_of(alone).items():
        parameter.data = model.get_parameter(name).data.clone()
    assert torch.equal(logits(alone, token_ids), second)

    model.base_model.set_adapter(["default", "other"])
    both = logits(model, token_ids)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    base, x = layer.base_layer, torch.randn(3, 32)
    parts = [layer._adapted(x, name) - base(x) for name in ("default", "other")]
    torch.testing.assert_close(layer(x), base(x) + parts[0] + parts[1])
    weights = base_weights(model)
    model.merge_adapter()
    assert relative_error(logits(model, token_ids), both.double()) <= 2e-6
    model.unmerge_adapter()
    assert all(map(torch.equal, base_weights(model), weights))
    model.merge_adapter(["default"])
    model.merge_adapter(["other"])
    assert relative_error(logits(model, token_ids), both.double()) <= 2e-6
    model.unmerge_adapter()
    assert all(map(torch.equal, base_weights(model), weights))

    model.base_model.set_adapter("default")
    model.delete_adapter("other")
    assert not any(".other" in name for name in model.state_dict())
    assert all(set(layer.configs) <= {"default"} and set(layer._caches) <= {"default"} for layer in layers_of(model))
    assert torch.equal(logits(model, token_ids), first)


def test_all_linear_means_all_but_the_head(make_base, token_ids, family):
    model = get_peft_model(make_base(family), HyLoRADAPeftConfig(target_modules="all-linear"))
    names = {name for name, module in model.named_modules() if isinstance(module, HyLoRADALinear)}
    lora = get_peft_model(make_base(family), LoraConfig(target_modules="all-linear"))
    assert names == {name for name, module in lora.named_modules() if isinstance(module, peft.tuners.lora.LoraLayer)}


def test_without_target_modules_the_usual_ones_are_adapted(make_base):
    model = get_peft_model(make_base("gpt2"), HyLoRADAPeftConfig(r=8))
    assert {name.rpartition(".")[2] for name in status(model).fused} == {"c_attn", "c_proj"}


def test_modules_to_save_and_excluded_ones(make_base, make_peft, token_ids, tmp_path):
    fields = {"target_modules": "all-linear", "exclude_modules": ["down_proj"], "modules_to_save": ["lm_head"]}
    model = make_peft(layers_to_transform=None, **fields)
    assert not any(name.endswith("down_proj") for name in status(model).fused)
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight.mul_(1.5)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_base(), tmp_path).eval()
    assert torch.equal(logits(loaded, token_ids), logits(model, token_ids))


def test_chosen_layers_only(make_peft):
    model = make_peft(layers_to_transform=[1], layers_pattern="layers")
    assert status(model).fused and all(".layers.1." in name for name in status(model).fused)


def test_dropout_acts_while_training_only(make_peft, token_ids):
    model = make_peft(lora_dropout=0.5)
    expected = logits(make_peft(), token_ids)
    assert torch.equal(logits(model, token_ids), expected)
    assert not torch.allclose(logits(model.train(), token_ids), expected)


def test_copies_are_independent(make_peft, token_ids):
    model = make_peft()
    before = logits(model, token_ids)
    other = copy.deepcopy(model)
    with norm_cache.verifying():
        assert torch.equal(logits(other, token_ids), before)
        disturb(other)
        assert not torch.allclose(logits(other, token_ids), before)
        assert torch.equal(logits(model, token_ids), before)


def test_peft_reports_it_like_its_own_methods(make_peft):
    found = get_model_status(make_peft())
    assert (found.adapter_model_type, found.num_adapter_layers) == ("HyLoRADAPeftModel", 14)
    assert found.enabled and found.requires_grad == {"default": True} and found.peft_types == {"default": "HYLORADA"}


def test_accelerate_has_nothing_left_to_do(make_peft, token_ids):
    model = make_peft()
    expected = logits(model, token_ids)
    found = accelerate(model)
    assert len(found.fused) == 14 and not found.fallback
    assert torch.equal(logits(model, token_ids), expected)


@pytest.mark.parametrize(("family", "targets"), [("llama", ["q_proj", "down_proj"]), ("gpt2", ["c_proj"])])
def test_peft_converts_it_to_lora(make_base, make_peft, token_ids, family, targets):
    pytest.importorskip("peft.tuners.lora.conversion", reason="PEFT converts since 0.19")
    model = make_peft(family, target_modules=targets)
    config, tensors = peft.convert_to_lora(model, rank=32)
    config.fan_in_fan_out = family == "gpt2"
    lora = get_peft_model(make_base(family), config).eval()
    peft.set_peft_model_state_dict(lora, tensors)
    assert relative_error(logits(lora, token_ids), logits(model, token_ids).double()) <= 1e-5


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"r": 0}, ValueError, "r must be at least 1, got 0"),
        ({"r": 2.0}, TypeError, "r must be a whole number"),
        ({"lora_alpha": -1}, ValueError, "lora_alpha must be positive"),
        ({"lora_dropout": 1.0}, ValueError, r"lora_dropout must be in \[0, 1\)"),
        ({"lora_init": "pissa"}, ValueError, "lora_init must be one of 'orthogonal', 'kaiming'"),
        ({"use_blend": 1}, TypeError, "use_blend"),
        ({"layers_pattern": "layers"}, ValueError, "give layers_to_transform, or neither"),
        ({"target_modules": "all-linear", "layers_to_transform": [1]}, ValueError, "PEFT ignores it"),
    ],
)
def test_options_out_of_range_are_refused(fields, error, message):
    with pytest.raises(error, match=message):
        HyLoRADAPeftConfig(**fields)


def test_layers_of_other_kinds_are_refused(make_base):
    with pytest.raises(TypeError, match=r"only nn.Linear.* can be adapted, got torch.nn.*Embedding; leave it out"):
        get_peft_model(make_base(), HyLoRADAPeftConfig(target_modules=["embed_tokens"]))
    lora = get_peft_model(make_base(), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(TypeError, match=r"got peft.tuners.lora.layer.Linear"):
        get_peft_model(lora.base_model.model, HyLoRADAPeftConfig(target_modules=["q_proj"]))


def test_mixed_batches_are_refused(make_peft, token_ids):
    with pytest.raises(ValueError, match=r"adapter_names: .* use set_adapter"):
        make_peft()(token_ids, adapter_names=["default", "__base__"])


def test_a_peft_that_takes_no_method_is_a_clear_error():
    code = """
import peft.utils

def refuse(**kwargs):
    raise KeyError("no further methods")

peft.utils.register_peft_method = refuse
try:
    import hylorada.integrations.peft
except ImportError as error:
    assert "does not let a method be added (KeyError" in str(error) and peft.__version__ in str(error), error
else:
    raise AssertionError("the method was registered")
"""
    outcome = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True
    )
    assert outcome.returncode == 0, outcome.stderr


def trainer_of(model, folder, **options):
    rows = torch.randint(3, 97, (1, 16), generator=torch.Generator().manual_seed(4)).expand(8, 16)
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=2e-2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        logging_steps=1,
        **{"max_steps": 8, "save_strategy": "no"} | options,
    )
    return Trainer(model, arguments, train_dataset=[{"input_ids": row, "labels": row} for row in rows])


def losses_of(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_transformers_trainer_trains_every_parameter(make_peft, checkpointing, tmp_path):
    model = make_peft(start=True)
    before = {name: parameter.detach().clone() for name, parameter in trained(model).items()}
    trainer = trainer_of(model, tmp_path, gradient_checkpointing=checkpointing)
    with norm_cache.verifying():
        trainer.train()
    losses = losses_of(trainer)
    assert losses[-1] < 0.8 * losses[0]
    assert not any(torch.equal(parameter, before[name]) for name, parameter in trained(model).items())


def test_transformers_trainer_resumes(make_peft, tmp_path):
    model = make_peft(start=True)
    whole = trainer_of(model, tmp_path / "a", save_strategy="steps", save_steps=4)
    whole.train()
    other = make_peft(start=True)
    trainer_of(other, tmp_path / "b").train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-4"))
    for name, parameter in trained(model).items():
        torch.testing.assert_close(trained(other)[name], parameter, rtol=1e-5, atol=1e-7)


def sft_trainer(model, folder, tokenizer, **options):
    datasets, trl = pytest.importorskip("datasets"), pytest.importorskip("trl")
    arguments = trl.SFTConfig(
        output_dir=str(folder),
        max_steps=8,
        per_device_train_batch_size=2,
        learning_rate=2e-2,
        max_length=16,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        logging_steps=1,
        save_strategy="no",
        bf16=False,
    )
    rows = datasets.Dataset.from_dict({"text": ["the same few words again"] * 8})
    return trl.SFTTrainer(model, arguments, train_dataset=rows, processing_class=tokenizer, **options)


def test_trl_trains_a_plain_model_by_the_config(make_base, tokenizer, tmp_path):
    trainer = sft_trainer(make_base(), tmp_path, tokenizer, peft_config=HyLoRADAPeftConfig(target_modules="all-linear"))
    trainer.train()
    assert losses_of(trainer)[-1] < 0.8 * losses_of(trainer)[0]
    assert len(status(trainer.model).fused) == 14


@pytest.fixture
def make_4bit(make_base, tmp_path):
    """make_4bit(family) -> a tiny model with NF4 weights, and the same model with these weights dequantised."""
    bitsandbytes = pytest.importorskip("bitsandbytes")

    def make(family="llama", dtype=torch.float32, double=False):
        folder = tmp_path / f"base-{family}"
        # bitsandbytes dequantises wrongly on a CPU where a row is no multiple of a block of 64
        base = make_base(family, dtype, tie_word_embeddings=False, hidden_size=64, intermediate_size=128)
        base.save_pretrained(folder)
        quantisation = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=dtype,
            bnb_4bit_use_double_quant=double,
        )
        model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantisation, dtype=dtype)
        plain = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        with torch.no_grad():
            for name, module in model.named_modules():
                if isinstance(module, bitsandbytes.nn.Linear4bit):
                    whole = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
                    plain.get_submodule(name).weight.copy_(whole)
        return model.eval(), plain.eval()

    return make


def adapted_both(bases, **fields):
    """PEFT's models of a 4-bit and a plain base, with the same adapters."""
    fields = {"r": 4, "target_modules": "all-linear"} | fields
    first, second = (get_peft_model(base, HyLoRADAPeftConfig(**fields)).eval() for base in bases)
    disturb(second)
    for name, parameter in adapter_of(first).items():
        parameter.data = second.get_parameter(name).data.clone()
    return first, second


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("method", METHODS)
def test_on_4_bit_weights_it_computes_with_the_dequantised_ones(make_4bit, token_ids, family, method):
    """qwen2 has biases, which are not scaled."""
    model, plain = adapted_both(make_4bit(family), **METHODS[method])
    assert all("quantised" in reason for reason in status(model).fallback.values())
    for either in (model, plain):
        either.train()(input_ids=token_ids, labels=token_ids).loss.backward()
    assert relative_error(model(token_ids).logits, plain(token_ids).logits.double()) <= 1e-5
    for name, parameter in trained(model).items():
        assert relative_error(parameter.grad, plain.get_parameter(name).grad.double()) <= 1e-4, name


def test_on_4_bit_weights_it_starts_as_the_base_model(make_4bit, token_ids):
    base, _ = make_4bit()
    expected = logits(base.train(), token_ids)
    model = get_peft_model(base, HyLoRADAPeftConfig(target_modules="all-linear"))
    assert relative_error(logits(model, token_ids), expected.double()) <= 1e-6
    assert {parameter.dtype for parameter in trained(model).values()} == {torch.float32}


def test_a_row_of_zeros_gives_the_bias(make_4bit):
    model, _ = adapted_both(make_4bit("qwen2"))
    layer = next(layer for layer in layers_of(model) if layer.base_layer.bias is not None)
    whole = layer._weight().clone()
    whole[3] = 0
    layer._replace_weight(whole)
    layer.hylorada_B["default"].data[3] = 0
    y = layer.train()(torch.randn(2, layer.in_features))
    torch.testing.assert_close(y[:, 3], layer.base_layer.bias[3].expand(2))
    y.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in trained(layer).values())


def test_an_evaluation_leaves_4_bit_weights_and_gradients_as_they_are(make_4bit, token_ids):
    """bitsandbytes packs a weight that evaluates on the CPU, and passes no gradient through it afterwards."""
    model, _ = adapted_both(make_4bit(double=True))

    def gradients():
        model.zero_grad()
        model.train()(input_ids=token_ids, labels=token_ids).loss.backward()
        return {name: parameter.grad.clone() for name, parameter in trained(model).items()}

    before = gradients()
    logits(model.eval(), token_ids)
    with model.disable_adapter():
        logits(model, token_ids)
    after = gradients()
    assert all(torch.equal(after[name], gradient) for name, gradient in before.items())


def test_weights_that_were_packed_before_are_refused(make_4bit, token_ids):
    base, _ = make_4bit()
    if not base.model.layers[0].mlp.up_proj.support_avx512bf16_for_cpu:
        pytest.skip("bitsandbytes packs weights on CPUs with AVX512-BF16 only")
    logits(base, token_ids)
    with pytest.raises(RuntimeError, match="adapt it before it runs in evaluation mode"):
        get_peft_model(base, HyLoRADAPeftConfig(target_modules="all-linear"))


def test_no_whole_weight_is_kept_for_the_backward(make_4bit, token_ids):
    model, _ = adapted_both(make_4bit())
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor.shape) or tensor, lambda t: t):
        model.train()(token_ids)
    shapes = {(layer.out_features, layer.in_features) for layer in layers_of(model)}
    assert saved and not shapes & {tuple(shape) for shape in saved}


def test_merging_into_4_bits_rounds_and_unmerging_restores(make_4bit, token_ids):
    model, plain = adapted_both(make_4bit())
    expected, weights = logits(model, token_ids), base_weights(model)
    model.merge_adapter(safe_merge=True)
    rounded = logits(model, token_ids)
    assert 1e-3 < relative_error(rounded, expected.double()) < 0.5
    # as near as quantising the merged weights is
    for layer, other in zip(layers_of(model), layers_of(plain), strict=True):
        whole = other._combined(["default"]).detach()
        assert relative_error(layer._weight(), whole.double()) < 0.15
    model.unmerge_adapter()
    assert all(map(torch.equal, base_weights(model), weights))
    assert torch.equal(logits(model, token_ids), expected)


def test_adapters_of_a_4_bit_model_are_saved_and_loaded(make_4bit, token_ids, tmp_path):
    model, _ = adapted_both(make_4bit())
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(make_4bit()[0], tmp_path / "adapter").eval()
    assert torch.equal(logits(loaded, token_ids), logits(model, token_ids))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_4_bit_models_train_with_trl(make_4bit, tokenizer, dtype, tmp_path):
    """TRL casts the factors to bf16; a magnitude or a blend in bf16 would stand still."""
    config = HyLoRADAPeftConfig(target_modules="all-linear")
    trainer = sft_trainer(make_4bit(dtype=dtype)[0], tmp_path / "run", tokenizer, peft_config=config)
    before = {name: parameter.detach().clone() for name, parameter in trained(trainer.model).items()}
    trainer.train()
    assert losses_of(trainer)[-1] < 0.9 * losses_of(trainer)[0]
    for name, parameter in trained(trainer.model).items():
        assert not torch.equal(parameter, before[name]), name
        if "magnitude_vector" in name:
            assert parameter.dtype == torch.float32


@pytest.mark.parametrize("config", [HyLoRADAPeftConfig, LoraConfig])
def test_parameter_groups_know_the_parts(make_base, config):
    options = {"use_dora": True} if config is LoraConfig else {}
    model = get_peft_model(make_base(), config(target_modules="all-linear", modules_to_save=["lm_head"], **options))
    groups = get_lora_plus_param_groups(model, lr_lora=1.0, lr_magnitude=3.0, weight_decay=0.1, lora_plus_ratio=4.0)
    found = {group["name"]: (group["lr"], group["weight_decay"], len(group["params"])) for group in groups}
    expected = {"lora_a": (1.0, 0.1, 14), "lora_b": (4.0, 0.1, 14), "magnitude": (3.0, 0.0, 14), "base": (1.0, 0.1, 1)}
    if config is HyLoRADAPeftConfig:
        expected["residual_weight"] = (3.0, 0.0, 14)
    assert found == expected


def distributed_gradients(rank, options):
    """Gradients of two processes with a batch each, and of one process with both."""
    from tests.kernels.test_distributed import whole

    batches = [torch.randint(3, 97, (2, 8), generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    alone, model = copy.deepcopy(options["model"]), copy.deepcopy(options["model"])
    for ids in batches:
        (alone(input_ids=ids, labels=ids).loss / 2).backward()
    wrapped = options["wrap"](model)
    with norm_cache.verifying():
        wrapped(input_ids=batches[rank], labels=batches[rank]).loss.backward()
    found = {f"alone {name}": parameter.grad for name, parameter in trained(alone).items()}
    for name, parameter in trained(wrapped).items():
        found[f"wrapped {name.removeprefix('module.')}"] = whole(parameter.grad)
    return found


@pytest.mark.parametrize("wrap", [data_parallel, fully_sharded])
def test_two_processes_get_the_gradients_of_one(make_peft, wrap, tmp_path):
    from tests.kernels.test_distributed import in_processes

    model = make_peft(dtype=torch.float64)
    names = list(trained(model))
    for found in in_processes(distributed_gradients, tmp_path, {"model": model, "wrap": wrap}):
        assert len(found) == 2 * len(names) == 2 * 56
        for name in names:
            assert relative_error(found[f"wrapped {name}"], found[f"alone {name}"]) <= 1e-9, name


def test_the_norms_of_all_layers_are_made_together_after_a_change(make_peft, token_ids, family, norms_made):
    model = make_peft(family)
    # layers that have run, no others
    logits(model, token_ids)
    disturb(model)
    for _ in range(2):
        norms_made.clear()
        before = logits(model, token_ids)
        logits(model, token_ids)
        assert norms_made.are_together(len(layers_of(model)))
        disturb(model)
    assert not torch.equal(logits(model, token_ids), before)
    norms_made.clear()
    # one that is not the first is made by its layer
    layers_of(model)[-1].hylorada_B["default"].data.add_(0.1)
    found = logits(model, token_ids)
    assert norms_made.are_of(1)
    assert torch.equal(found, logits(copy.deepcopy(model), token_ids))
