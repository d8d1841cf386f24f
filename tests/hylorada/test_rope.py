"""RoPE scaling of a loaded model: the frequencies of one built fresh, the undo, and what is refused."""

import copy
import math

import pytest
import torch

from hylorada.rope import TYPES, RopeScaling, find_rotary_modules

FAMILIES = ("gpt_neox", "llama", "mistral", "qwen2")
# max_position_embeddings of the tiny models
LENGTH = 128


@pytest.fixture
def make_base(make_base):
    """GPT-NeoX rotates a quarter of a head: of a wider one, for "dynamic" needs more than two rotated features."""
    wider = {"gpt_neox": {"hidden_size": 64}}
    return lambda family, *rest, **changes: make_base(family, *rest, **wider.get(family, {}), **changes)


def fresh(model, **changes):
    """A model of the same weights, built from a config of the same values and the changes."""
    config = type(model.config).from_dict(model.config.to_dict() | changes)
    other = type(model)(config).eval()
    other.load_state_dict(model.state_dict())
    return other


def scaled_config(model, kind, factor):
    parameters = dict(model.config.rope_parameters) | {"rope_type": kind, "factor": factor}
    if kind == "yarn":
        parameters["original_max_position_embeddings"] = LENGTH
    length = LENGTH if kind == "dynamic" else round(LENGTH * factor)
    return {"rope_parameters": parameters, "max_position_embeddings": length}


def frequencies(model):
    return [(rotary.inv_freq.clone(), rotary.attention_scaling) for rotary in find_rotary_modules(model)]


def assert_same_frequencies(model, other):
    found, expected = frequencies(model), frequencies(other)
    assert found
    for (one, one_scaling), (two, two_scaling) in zip(found, expected, strict=True):
        assert torch.equal(one, two) and one.dtype == torch.float32 and one_scaling == two_scaling


@pytest.mark.parametrize("factor", [1.0, 2.5, 4])
@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_model_is_the_one_built_from_the_scaled_config(make_base, family, kind, factor):
    model = make_base(family)
    expected = fresh(model, **scaled_config(model, kind, factor))
    scaling = RopeScaling(model, kind, factor)
    scaling.apply()
    assert (scaling.type, scaling.original_length, scaling.target_length) == (kind, LENGTH, round(LENGTH * factor))
    assert_same_frequencies(model, expected)
    # longer than the original: dynamic has other frequencies then
    ids = torch.randint(3, 97, (2, LENGTH + 40), generator=torch.Generator().manual_seed(0))
    assert torch.equal(model(ids).logits, expected(ids).logits)
    assert_same_frequencies(model, expected)
    assert torch.equal(model(ids[:, :20]).logits, expected(ids[:, :20]).logits)
    assert_same_frequencies(model, expected)


def test_frequencies_are_the_papers(make_base):
    """Linear: theta / s; NTK at twice the length: the base times (2 s - (s - 1))^(d / (d - 2)); yarn in between."""
    base = 10000 ** -(torch.arange(0, 8, 2).double() / 8)
    for kind in TYPES:
        model = make_base("llama")
        RopeScaling(model, kind, 4.0).apply()
        (rotary,) = find_rotary_modules(model)
        if kind == "linear":
            torch.testing.assert_close(rotary.inv_freq.double(), base / 4, rtol=1e-6, atol=0)
            assert rotary.attention_scaling == 1
        if kind == "dynamic":
            model(torch.zeros(1, 2 * LENGTH, dtype=torch.long))
            ntk = (10000 * (4 * 2 - 3) ** (8 / 6)) ** -(torch.arange(0, 8, 2).double() / 8)
            torch.testing.assert_close(rotary.inv_freq.double(), ntk, rtol=1e-6, atol=0)
        if kind == "yarn":
            assert rotary.attention_scaling == pytest.approx(0.1 * math.log(4) + 1)
            ratio = rotary.inv_freq.double() / base
            assert ((ratio >= 0.25 - 1e-6) & (ratio <= 1 + 1e-6)).all()
            # the slowest wavelength, of which the text holds less than one turn, is interpolated
            assert ratio[-1] == pytest.approx(0.25)


@pytest.mark.parametrize("kind", TYPES)
def test_the_original_lengths_outputs_change_as_the_type_says(make_base, token_ids, kind):
    model = make_base("llama")
    before = model(token_ids).logits
    RopeScaling(model, kind, 4.0).apply()
    after = model(token_ids).logits
    assert torch.equal(after, before) == (kind == "dynamic")


@pytest.mark.parametrize(("factor", "kind"), [(2, "linear"), (64, "linear"), (65, "yarn")])
def test_auto_is_linear_up_to_8192_tokens_and_yarn_beyond(make_base, factor, kind):
    scaling = RopeScaling(make_base("llama"), "auto", factor)
    assert scaling.type == kind and scaling.target_length == factor * LENGTH


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_undo_gives_back_the_original(make_base, token_ids, family, kind):
    model = make_base(family)
    before, config = model(token_ids).logits, copy.deepcopy(model.config.to_dict())
    rotary = find_rotary_modules(model)
    scaling = RopeScaling(model, kind, 4.0)
    assert torch.equal(model(token_ids).logits, before) and model.config.to_dict() == config
    scaling.apply()
    assert model.config.to_dict() != config
    scaling.undo()
    assert model.config.to_dict() == config
    assert all(one is two for one, two in zip(find_rotary_modules(model), rotary, strict=True))
    assert torch.equal(model(token_ids).logits, before)


@pytest.mark.parametrize("kind", TYPES)
def test_a_saved_config_has_the_scaling(make_base, tmp_path, token_ids, kind):
    model = make_base("qwen2")
    RopeScaling(model, kind, 4.0).apply()
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert_same_frequencies(loaded, model)
    assert torch.equal(loaded(token_ids).logits, model(token_ids).logits)
    # the same scaling again is no scaling of the scaled model
    scaling = RopeScaling(loaded, kind, 4.0)
    scaling.apply()
    assert (scaling.original_length, scaling.target_length) == (LENGTH, 4 * LENGTH)
    assert_same_frequencies(loaded, model)
    scaling.undo()
    assert_same_frequencies(loaded, model)
    with pytest.raises(ValueError, match=rf"Qwen2ForCausalLM is scaled already \(rope_type='{kind}', factor=4.0\)"):
        RopeScaling(loaded, kind, 2.0)


def test_new_modules_are_where_the_old_ones_were_and_read_the_models_config(make_base):
    model = make_base("llama").to("meta")
    RopeScaling(model, "dynamic", 2.0).apply()
    (rotary,) = find_rotary_modules(model)
    assert {buffer.device.type for buffer in rotary.buffers()} == {"meta"}
    assert rotary.config is model.config and not rotary.training


def test_frequencies_of_a_bf16_model_are_fp32(make_base):
    model = make_base("llama", torch.bfloat16)
    expected = fresh(make_base("llama"), **scaled_config(model, "yarn", 4.0))
    RopeScaling(model, "yarn", 4.0).apply()
    assert_same_frequencies(model, expected)


def test_scaled_decoding_is_the_full_forward(make_base):
    ids = torch.randint(3, 97, (2, LENGTH + 20), generator=torch.Generator().manual_seed(0))
    for kind in ("linear", "yarn"):
        model = make_base("llama")
        RopeScaling(model, kind, 2.0).apply()
        output = model(ids[:, : LENGTH - 5], use_cache=True)
        rest = model(ids[:, LENGTH - 5 :], past_key_values=output.past_key_values).logits
        torch.testing.assert_close(rest, model(ids).logits[:, LENGTH - 5 :], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_models_without_rope_are_refused(make_base, family):
    with pytest.raises(ValueError, match=r'has no rotary position embeddings .* learned position table .*"auto" does'):
        RopeScaling(make_base(family), "linear", 2.0)


def test_values_that_make_no_sense_are_refused(make_base):
    model = make_base("llama")
    with pytest.raises(ValueError, match="one of linear, dynamic, yarn or auto, got 'ntk'"):
        RopeScaling(model, "ntk", 2.0)
    for factor in (0.5, math.nan):
        with pytest.raises(ValueError, match=r"factor must be at least 1 .* got"):
            RopeScaling(model, "linear", factor)


def test_a_model_that_is_scaled_otherwise_is_refused(make_base):
    llama3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    model = make_base("llama", rope_parameters=llama3 | {"original_max_position_embeddings": 64})
    with pytest.raises(ValueError, match=r"is scaled already \(rope_type='llama3', factor=8.0\); load it with"):
        RopeScaling(model, "yarn", 8.0)


def test_a_scaling_without_a_factor_is_named(make_base):
    longrope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    model = make_base("llama", rope_parameters=longrope | {"original_max_position_embeddings": 64})
    with pytest.raises(ValueError, match=r"is scaled already \(rope_type='longrope', factor=None\); load it with"):
        RopeScaling(model, "linear", 2.0)


def test_layers_with_different_frequencies_are_refused(make_base):
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    config = Gemma3TextConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, head_dim=8
    )
    with pytest.raises(ValueError, match="layers of Gemma3ForCausalLM have different rotary embeddings"):
        RopeScaling(Gemma3ForCausalLM(config), "linear", 2.0)
