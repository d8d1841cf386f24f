"""PEFT's files: what is exported is the same model in stock PEFT, what is imported computes what PEFT computes."""

import json
import logging
import math

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from hylorada import HyLoRADAModel
from hylorada.hub import CARD_FILE
from hylorada.integrations import peft_files
from hylorada.integrations.peft_files import (
    CONFIG_FILE,
    EXTRAS_FILE,
    TENSORS_FILE,
    export_adapter,
    export_lora,
    import_adapter,
)
from hylorada.lora import adapted_layers
from hylorada_kernels.testing import relative_error
from tests.hylorada.conftest import FAMILIES

PLAIN = {"use_dora_magnitude": False, "use_blend": False, "position_bias_enabled": False, "lora_init": "kaiming"}
# the methods that PEFT can compute whole
METHODS = {
    "lora": PLAIN | {"use_rslora": False},
    "rslora": PLAIN,
    "dora": PLAIN | {"use_rslora": False, "use_dora_magnitude": True},
    "blend": {"position_bias_enabled": False},
}


@pytest.fixture(params=METHODS)
def method(request):
    """The config fields of every method in turn."""
    return METHODS[request.param]


@pytest.fixture
def make_peft(make_base):
    """make_peft(family, **fields of LoraConfig) -> PEFT's model in eval mode, its adapter not at the start."""

    def make(family="llama", dtype=torch.float32, **fields):
        defaults = {"r": 4, "target_modules": list(FAMILIES[family][2]), "fan_in_fan_out": family == "gpt2"}
        model = get_peft_model(make_base(family, dtype), LoraConfig(**defaults | fields)).eval()
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        return model

    return make


@pytest.fixture
def saved_peft(make_peft, tmp_path):
    """The folder of a PEFT DoRA adapter on two kinds of layers."""
    make_peft(target_modules=["q_proj", "v_proj"], use_dora=True).save_pretrained(tmp_path)
    return tmp_path


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def rewrite(folder, **fields):
    path = folder / CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_an_export_is_the_same_model_in_peft(make_base, make_model, token_ids, family, method, tmp_path):
    model = make_model(family, **method)
    expected = logits(model, token_ids)
    assert export_adapter(model, tmp_path) == []
    loaded = PeftModel.from_pretrained(make_base(family), tmp_path)
    assert type(loaded).__name__ == "PeftModelForCausalLM"
    assert relative_error(logits(loaded, token_ids), expected.double()) <= 1e-6
    assert relative_error(expected, logits(make_base(family), token_ids).double()) > 1e-3
    assert (tmp_path / EXTRAS_FILE).exists() == (method == METHODS["blend"])
    assert model.training is False and torch.equal(logits(model, token_ids), expected)


def test_an_export_in_bf16_is_as_near_the_truth_in_peft(make_base, make_model, token_ids, tmp_path):
    model = make_model("qwen2", torch.bfloat16, position_bias_enabled=False)
    export_adapter(model, tmp_path)
    loaded = PeftModel.from_pretrained(make_base("qwen2", torch.bfloat16), tmp_path)
    found, expected = logits(loaded, token_ids), logits(model, token_ids)
    truth = logits(model.double(), token_ids)
    assert relative_error(found, truth) <= 2 * relative_error(expected, truth)


def test_hylorada_to_peft_and_back_is_the_same_to_the_last_bit(make_base, make_model, token_ids, family, tmp_path):
    """The part that PEFT cannot compute too: the position bias, and the blend unfolded."""
    model = make_model(family)
    export_adapter(model, tmp_path)
    loaded = import_adapter(make_base(family), tmp_path)
    assert loaded.hylorada_config == model.hylorada_config
    ours, theirs = model.adapter_parameters(), loaded.adapter_parameters()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(theirs[name], parameter) for name, parameter in ours.items())
    assert torch.equal(logits(loaded, token_ids), logits(model, token_ids))


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_scaling_type": "linear", "rope_scaling_factor": 2.0},
        {"s2_attn_enabled": True, "s2_group_size": 4, "s2_eval": True},
    ],
)
def test_parts_without_tensors_come_back_from_an_export(make_base, make_model, token_ids, tmp_path, fields):
    model = make_model("llama", use_dora_magnitude=False, position_bias_enabled=False, **fields)
    export_adapter(model, tmp_path)
    loaded = import_adapter(make_base("llama"), tmp_path)
    assert loaded.hylorada_config == model.hylorada_config
    assert torch.equal(logits(loaded, token_ids), logits(model, token_ids))


def test_without_the_extras_the_function_comes_back_folded(make_base, make_model, token_ids, tmp_path):
    model = make_model(position_bias_enabled=False)
    export_adapter(model, tmp_path)
    (tmp_path / EXTRAS_FILE).unlink()
    loaded = import_adapter(make_base(), tmp_path)
    assert all(layer.residual_weight is None for layer in adapted_layers(loaded.base_model).values())
    assert relative_error(logits(loaded, token_ids), logits(model, token_ids).double()) <= 1e-6


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_peft_to_hylorada_and_back(make_base, make_peft, token_ids, family, use_dora, use_rslora, tmp_path):
    original = make_peft(family, use_dora=use_dora, use_rslora=use_rslora, lora_alpha=6, lora_dropout=0.1)
    expected = logits(original, token_ids)
    original.save_pretrained(tmp_path / "peft")
    model = import_adapter(make_base(family), tmp_path / "peft")
    config = model.hylorada_config
    assert (config.lora_rank, config.lora_alpha, config.lora_dropout) == (4, 6.0, 0.1)
    assert (config.use_rslora, config.use_dora_magnitude, config.use_blend) == (use_rslora, use_dora, False)
    assert "residual_weight" not in {name.rpartition(".")[2] for name in model.adapter_parameters()}
    assert relative_error(logits(model, token_ids), expected.double()) <= 1e-6
    assert export_adapter(model, tmp_path / "again") == []
    assert set(contents(tmp_path / "again")) == {CONFIG_FILE, TENSORS_FILE, CARD_FILE}
    first, second = (load_file(tmp_path / folder / TENSORS_FILE) for folder in ("peft", "again"))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    again = PeftModel.from_pretrained(make_base(family), tmp_path / "again")
    assert torch.equal(logits(again, token_ids), expected)


def test_an_imported_adapter_trains_and_saves(make_base, saved_peft, token_ids, tmp_path):
    model = import_adapter(make_base(), saved_peft)
    model(token_ids, labels=token_ids).loss.backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in model.adapter_parameters().values())
    model.save_pretrained(tmp_path / "native")
    loaded = HyLoRADAModel.from_pretrained(make_base(), tmp_path / "native")
    assert torch.equal(logits(loaded, token_ids), logits(model, token_ids))


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("use_dora", [False, True])
def test_patterns_of_ranks_and_alphas(make_base, make_peft, token_ids, use_rslora, use_dora, tmp_path):
    patterns = {
        "rank_pattern": {"v_proj": 2, r"model\.layers\.1\.mlp\.up_proj": 6},
        "alpha_pattern": {"o_proj": 3, "v_proj": 5},
    }
    original = make_peft(use_rslora=use_rslora, use_dora=use_dora, lora_alpha=7, **patterns)
    original.save_pretrained(tmp_path)
    model = import_adapter(make_base(), tmp_path)
    assert model.hylorada_config.lora_rank == 6
    assert relative_error(logits(model, token_ids), logits(original, token_ids).double()) <= 1e-6
    # the rows that were added to A can learn
    model(token_ids, labels=token_ids).loss.backward()
    layer = adapted_layers(model.base_model)["model.layers.0.self_attn.v_proj"]
    assert (layer.lora_b.grad.abs().amax(0) > 0).all() and not layer.lora_b[:, 2:].any()


def test_adapters_in_bf16_are_widened(make_base, make_peft, token_ids, tmp_path):
    original = make_peft(use_dora=True)
    for name, parameter in original.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.bfloat16()
    original.save_pretrained(tmp_path)
    assert {tensor.dtype for tensor in load_file(tmp_path / TENSORS_FILE).values()} == {torch.bfloat16}
    model = import_adapter(make_base(), tmp_path)
    assert {parameter.dtype for parameter in model.adapter_parameters().values()} == {torch.float32}
    exact = PeftModel.from_pretrained(make_base(dtype=torch.float64), tmp_path).double()
    assert relative_error(logits(model, token_ids), logits(exact, token_ids)) <= 1e-6


def test_targets_that_names_alone_do_not_tell_are_whole_paths(make_base, make_peft, token_ids, tmp_path):
    names = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"]
    original = make_peft(target_modules=names, use_dora=True)
    original.save_pretrained(tmp_path / "peft")
    model = import_adapter(make_base(), tmp_path / "peft")
    assert sorted(adapted_layers(model.base_model)) == names
    export_adapter(model, tmp_path / "again")
    assert json.loads((tmp_path / "again" / CONFIG_FILE).read_text())["target_modules"] == names
    again = PeftModel.from_pretrained(make_base(), tmp_path / "again")
    assert torch.equal(logits(again, token_ids), logits(original, token_ids))


def test_parts_that_peft_has_no_place_for_are_named(make_base, make_model, token_ids, tmp_path, caplog):
    model = make_model(s2_attn_enabled=True, s2_group_size=8, daa_enabled=True)
    with caplog.at_level(logging.WARNING):
        missing = export_adapter(model, tmp_path)
    assert missing == ["the position bias", "Direct Attention Adaptation", "shifted sparse attention"]
    assert f"PEFT computes the adapter in {tmp_path} without {', '.join(missing)}" in caplog.text
    loaded = PeftModel.from_pretrained(make_base(), tmp_path)
    assert relative_error(logits(loaded, token_ids), logits(model, token_ids).double()) > 1e-3
    again = import_adapter(make_base(), tmp_path)
    assert torch.equal(logits(again, token_ids), logits(model, token_ids))


def test_a_new_export_takes_old_extras_away(make_model, tmp_path):
    export_adapter(make_model(), tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    export_adapter(make_model(**METHODS["dora"]), tmp_path)
    assert set(contents(tmp_path)) == {CONFIG_FILE, TENSORS_FILE, CARD_FILE, "notes.txt"}


def test_a_failed_export_leaves_the_old_files(make_model, tmp_path, monkeypatch):
    export_adapter(make_model(), tmp_path)
    before = contents(tmp_path)

    def fail(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(peft_files.storage.os, "fsync", fail)
    with pytest.raises(OSError, match="what was there before is unchanged"):
        export_adapter(make_model(**METHODS["dora"]), tmp_path)
    assert contents(tmp_path) == before


def test_what_cannot_be_exported_is_refused(make_base, make_model, tmp_path):
    model = make_model()
    model.merge_lora_weights()
    for export in (export_adapter, lambda *arguments: export_lora(*arguments, rank=2)):
        with pytest.raises(RuntimeError, match=r"call unmerge_lora_weights\(\) first"):
            export(model, tmp_path / "new")
        with pytest.raises(TypeError, match="must be a HyLoRADAModel, got LlamaForCausalLM"):
            export(make_base(), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_extras_of_another_adapter_are_refused(make_base, make_model, tmp_path):
    export_adapter(make_model(), tmp_path)
    tensors = load_file(tmp_path / TENSORS_FILE)
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, tmp_path / TENSORS_FILE)
    base = make_base()
    modules = list(base.modules())
    with pytest.raises(ValueError, match=f"belongs to another {TENSORS_FILE}.*delete {EXTRAS_FILE}"):
        import_adapter(base, tmp_path)
    assert list(base.modules()) == modules


def test_another_base_is_refused_unless_told_otherwise(make_base, make_model, tmp_path):
    export_adapter(make_model(), tmp_path)
    base = make_base()
    with torch.no_grad():
        base.model.layers[0].self_attn.q_proj.weight.mul_(1.1)
    with pytest.raises(ValueError, match=r"wrong base model.*strict_base=False"):
        import_adapter(base, tmp_path)
    assert import_adapter(base, tmp_path, strict_base=False).hylorada_config.use_blend


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / EXTRAS_FILE).write_bytes(b"no tensors"), f"{EXTRAS_FILE} is damaged"),
        (lambda folder: save_file({"a": torch.ones(1)}, folder / EXTRAS_FILE), "has version None"),
        (
            lambda folder: save_file({"a": torch.ones(1)}, folder / EXTRAS_FILE, {"hylorada": '{"version": 9}'}),
            "has version 9, this hylorada reads version 1",
        ),
        (lambda folder: (folder / TENSORS_FILE).write_bytes(b"no tensors"), f"{TENSORS_FILE} is damaged"),
        (lambda folder: (folder / CONFIG_FILE).write_text("{"), f"{CONFIG_FILE} is damaged"),
        (lambda folder: (folder / CONFIG_FILE).write_text("[]"), "peft_type is 'list'"),
    ],
)
def test_damage_is_a_value_error(make_base, make_model, tmp_path, damage, message):
    export_adapter(make_model(), tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError, match=message):
        import_adapter(make_base(), tmp_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"bias": "all"}, "bias='all'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'.*merge_and_unload"),
        ({"lora_bias": True}, "lora_bias"),
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"target_parameters": ["experts"]}, "target_parameters"),
        ({"an_option_of_tomorrow": 1}, "an_option_of_tomorrow=1"),
        ({"use_dora": False}, "nothing takes .*magnitude"),
        ({"lora_alpha": 0}, "lora_alpha must be positive"),
    ],
)
def test_what_the_model_cannot_express_is_refused(make_base, saved_peft, fields, message):
    rewrite(saved_peft, **fields)
    base = make_base()
    modules = list(base.modules())
    with pytest.raises(ValueError, match=message):
        import_adapter(base, saved_peft)
    assert list(base.modules()) == modules and all(parameter.requires_grad for parameter in base.parameters())


def test_peft_itself_writes_what_is_refused(make_base, make_peft, tmp_path):
    """Trained biases and whole modules, as PEFT saves them."""
    make_peft("qwen2", bias="lora_only").save_pretrained(tmp_path / "bias")
    with pytest.raises(ValueError, match="bias='lora_only'"):
        import_adapter(make_base("qwen2"), tmp_path / "bias")
    make_peft(target_modules=["embed_tokens", "q_proj"]).save_pretrained(tmp_path / "embedding")
    with pytest.raises(ValueError, match=r"holds .*embed_tokens\..*, which is no A, B or magnitude"):
        import_adapter(make_base(), tmp_path / "embedding")


def test_tensors_that_do_not_fit_the_base_are_refused(make_base, saved_peft):
    with pytest.raises(ValueError, match=r"GPT2LMHeadModel has no layer model\.layers\.0\.self_attn\.q_proj"):
        import_adapter(make_base("gpt2"), saved_peft)
    with pytest.raises(ValueError, match=r"is \(.*\) torch.float32, expected \(.*\) floating point"):
        import_adapter(make_base("llama", hidden_size=16), saved_peft)
    tensors = load_file(saved_peft / TENSORS_FILE)
    tensors.pop(next(name for name in tensors if name.endswith("magnitude_vector")))
    save_file(tensors, saved_peft / TENSORS_FILE)
    with pytest.raises(ValueError, match=r"lacks .*magnitude"):
        import_adapter(make_base(), saved_peft)
    save_file({}, saved_peft / TENSORS_FILE)
    with pytest.raises(ValueError, match="holds no adapted layer"):
        import_adapter(make_base(), saved_peft)


def test_missing_files_are_named(make_base, make_model, saved_peft):
    (saved_peft / TENSORS_FILE).unlink()
    with pytest.raises(FileNotFoundError, match=f"has no {TENSORS_FILE}; load an adapter of another format with PEFT"):
        import_adapter(make_base(), saved_peft)
    (saved_peft / CONFIG_FILE).unlink()
    with pytest.raises(FileNotFoundError, match=f"there is no {CONFIG_FILE} in it"):
        import_adapter(make_base(), saved_peft)
    with pytest.raises(TypeError, match="must be a transformers PreTrainedModel, got HyLoRADAModel"):
        import_adapter(make_model(), saved_peft)


def full_updates(model):
    """The whole update of every layer, (O, I) fp64, from the layer's merged weight."""
    updates = {}
    for name, layer in adapted_layers(model.double().base_model).items():
        update = layer.merged_weight() - layer.weight
        updates[name] = update.T if layer.weight_is_transposed else update
    return updates


@pytest.mark.parametrize(("family", "targets"), [("llama", ("q_proj", "o_proj")), ("gpt2", ("c_attn", "c_proj"))])
def test_a_lora_export_is_the_best_of_its_rank_and_says_how_far_off(
    make_base, make_model, token_ids, family, targets, tmp_path, caplog
):
    model = make_model(family, position_bias_enabled=False, lora_target_modules=targets)
    expected = logits(model, token_ids)
    errors = {}
    for rank in (1, 8, 32):
        with caplog.at_level(logging.INFO):
            errors[rank] = export_lora(model, tmp_path / str(rank), rank)
        assert f"relative error is {errors[rank]:.2e}" in caplog.text
    assert errors[1] > errors[8] > errors[32] < 1e-12
    whole = PeftModel.from_pretrained(make_base(family), tmp_path / "32")
    assert relative_error(logits(whole, token_ids), expected.double()) <= 1e-5
    record = json.loads((tmp_path / "8" / CONFIG_FILE).read_text())
    assert record["r"] == record["lora_alpha"] == 8 and not record.get("use_dora")

    updates, tensors = full_updates(model), load_file(tmp_path / "8" / TENSORS_FILE)
    missed, size = 0.0, 0.0
    for name, update in updates.items():
        a, b = (tensors[f"base_model.model.{name}.lora_{factor}.weight"].double() for factor in "AB")
        missed += (b @ a - update).square().sum().item()
        size += update.square().sum().item()
        assert (b @ a - update).square().sum() == pytest.approx(torch.linalg.svdvals(update)[8:].square().sum().item())
    assert errors[8] == pytest.approx(math.sqrt(missed / size), rel=1e-5)


def test_a_lora_export_of_lora_is_exact_from_its_rank_on(make_model, tmp_path):
    assert export_lora(make_model(**METHODS["rslora"]), tmp_path, 4) < 1e-12
    assert export_lora(make_model(start=True, **METHODS["rslora"]), tmp_path, 1) == 0.0


def test_ranks_out_of_range_are_refused(make_model, tmp_path):
    for rank in (0, 17):
        with pytest.raises(ValueError, match=rf"rank must be in 1\.\.16.*got {rank}"):
            export_lora(make_model(), tmp_path, rank)
    for rank in (2.0, True):
        with pytest.raises(TypeError, match="whole number"):
            export_lora(make_model(), tmp_path, rank)
