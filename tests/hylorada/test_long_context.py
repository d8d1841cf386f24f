"""Landmarks, longer texts, trained embeddings and norms as parts of one model: start, files, merges, decoding."""

import pytest
import torch

from hylorada import HyLoRADAConfig, HyLoRADAModel, get_lora_plus_param_groups
from hylorada.embeddings import find_position_table
from hylorada.rope import RopeScaling, find_rotary_modules

EVERYTHING = {
    "landmark_enabled": True,
    "landmark_gate": "prefix_mean",
    "landmark_position": True,
    "train_embeddings": "all",
    "train_norms": True,
}
LONGER = {"rope_scaling_type": "auto", "rope_scaling_factor": 2.0}
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def long_ids(length=140):
    return torch.randint(3, 97, (2, length), generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("longer", [False, True])
def test_start_is_the_base_model(make_model, make_base, family, token_ids, longer):
    base = make_base(family)
    if longer and find_rotary_modules(base):
        # which RoPE scaling changes at once
        RopeScaling(base, "linear", 2.0).apply()
    found = make_model(family, start=True, **EVERYTHING, **(LONGER if longer else {}))(token_ids).logits
    torch.testing.assert_close(found, base(token_ids).logits, rtol=1e-5, atol=1e-5)


def test_every_trainable_parameter_has_a_gradient_and_is_saved(make_model, family):
    model = make_model(family, **EVERYTHING, **LONGER).train()
    ids = long_ids(256)
    model(ids, labels=ids).loss.backward()
    own = {id(parameter) for parameter in model.adapter_parameters().values()}
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (id(parameter) in own), name
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    counts = model.count_params()
    assert counts["trainable"] == sum(value for kind, value in counts.items() if kind not in ("total", "trainable"))
    assert counts["landmark"] == 2 * 8 * 32 + 1 + 64 * 8 and counts["base"] > 97 * 32
    groups = {group["name"]: sum(p.numel() for p in group["params"]) for group in get_lora_plus_param_groups(model)}
    assert groups["landmark"] == counts["landmark"] and groups["base"] == counts["base"]


@pytest.mark.parametrize("merge", [False, True])
def test_a_loaded_model_computes_the_same(make_model, make_base, family, tmp_path, merge):
    model = make_model(family, **EVERYTHING, **LONGER)
    ids = long_ids()
    expected = model(ids).logits
    if merge:
        model.merge_lora_weights()
        torch.testing.assert_close(model(ids).logits, expected, **CLOSE)
        expected = model(ids).logits
    model.save_pretrained(tmp_path)
    loaded = HyLoRADAModel.from_pretrained(make_base(family), tmp_path)
    assert torch.equal(loaded(ids).logits, expected)
    if merge:
        loaded = HyLoRADAModel.from_pretrained(None, tmp_path)
        assert torch.equal(loaded(ids).logits, expected)
        loaded.save_pretrained(tmp_path)
        assert torch.equal(HyLoRADAModel.from_pretrained(make_base(family), tmp_path)(ids).logits, expected)
    else:
        model.merge_lora_weights()
        model.unmerge_lora_weights()
        assert torch.equal(model(ids).logits, expected)


@pytest.mark.parametrize("beams", [1, 3])
def test_generation_past_the_original_length(make_model, family, beams):
    model = make_model(family, **EVERYTHING, **LONGER)
    ids = long_ids(124)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    ids = ids.masked_fill(mask == 0, 2)
    options = {"max_new_tokens": 8, "do_sample": False, "num_beams": beams, "eos_token_id": None}
    cached = model.generate(ids, attention_mask=mask, **options)
    assert torch.equal(cached, model.generate(ids, attention_mask=mask, use_cache=False, **options))


GROUPS = {"s2_attn_enabled": True, "s2_group_size": 16, "s2_eval": True, "s2_sink_tokens": 2, "daa_enabled": True}


@torch.no_grad()
def test_all_components_together_are_causal_and_decode_as_they_run(make_model, family):
    # the distance bias of Direct Attention Adaptation and groups are two attentions
    model = make_model(family, **EVERYTHING, **LONGER, **GROUPS, daa_num_buckets=0)
    ids = long_ids(150)
    full = model(ids).logits
    changed = ids.clone()
    changed[:, 90] = (changed[:, 90] + 1) % 97
    assert torch.equal(model(changed).logits[:, :90], full[:, :90])
    output = model(ids[:, :100], use_cache=True)
    pieces = [output.logits]
    for start, stop in ((100, 101), (101, 130), (130, 150)):
        output = model(ids[:, start:stop], past_key_values=output.past_key_values)
        pieces.append(output.logits)
    torch.testing.assert_close(torch.cat(pieces, 1), full, **CLOSE)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_no_gradient(make_model, family, reentrant):
    model = make_model(family, **EVERYTHING, **LONGER, **GROUPS, daa_num_buckets=0).train()
    ids = long_ids(150)

    def gradients():
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        return {name: parameter.grad.clone() for name, parameter in model.adapter_parameters().items()}

    expected = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for name, gradient in gradients().items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-6)


def test_a_failure_leaves_the_base_as_it_was(make_base, monkeypatch):
    for family in ("gpt2", "llama"):
        base = make_base(family)
        config, before = base.config.to_dict(), {name: value.clone() for name, value in base.state_dict().items()}
        rotary = find_rotary_modules(base)

        def fail(*_):
            raise MemoryError

        monkeypatch.setattr("hylorada.model._enable_checkpointing", fail)
        with pytest.raises(MemoryError):
            HyLoRADAModel(base, HyLoRADAConfig(**EVERYTHING, **LONGER))
        assert base.config.to_dict() == config and find_rotary_modules(base) == rotary
        assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())
        assert not any(module._forward_hooks for module in base.modules())


def test_a_tied_weight_cannot_be_trained_and_adapted(make_base):
    fields = {
        "train_embeddings": "tokens",
        "position_bias_enabled": False,
        "lora_target_modules": ("c_attn", "lm_head"),
    }
    with pytest.raises(
        ValueError, match=r"trains transformer.wte.weight, also the weight of the adapted layer lm_head"
    ):
        HyLoRADAModel(make_base("gpt2"), HyLoRADAConfig(**fields))


def test_table_length(make_model):
    assert find_position_table(make_model("gpt2", **LONGER).base_model).num_embeddings == 256
