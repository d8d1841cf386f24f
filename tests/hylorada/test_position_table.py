"""Position tables made longer: what stays, what is new, the undo, and what is refused."""

import copy

import pytest
import torch
import transformers

from hylorada import HyLoRADAConfig, HyLoRADAModel
from hylorada.position_table import PositionTable, find_position_table

LEARNED = ("gpt2", "opt")
# at its start bit for bit its base
PLAIN = {"use_dora_magnitude": False, "use_blend": False, "gradient_checkpointing": False}
# max_position_embeddings of the tiny models
LENGTH = 128


def ids_of(length):
    return torch.randint(3, 97, (2, length), generator=torch.Generator().manual_seed(length))


def gpt_neo():
    config = transformers.GPTNeoConfig(
        vocab_size=97,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        attention_types=[[["global", "local"], 1]],
        window_size=8,
        max_position_embeddings=32,
    )
    torch.manual_seed(0)
    return transformers.GPTNeoForCausalLM(config).eval()


@pytest.mark.parametrize("family", LEARNED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tiling_keeps_every_text_that_fitted_bit_for_bit(make_base, family, dtype):
    model = make_base(family, dtype)
    before = {length: model(ids_of(length)).logits for length in (1, 7, LENGTH)}
    rows = find_position_table(model).weight.detach().clone()
    table = PositionTable(model, 2.5)
    table.apply()
    assert (table.original_length, table.target_length) == (LENGTH, 320)
    assert model.config.max_position_embeddings == 320
    for length, logits in before.items():
        assert torch.equal(model(ids_of(length)).logits, logits)
    offset = len(rows) - LENGTH
    weight = find_position_table(model).weight
    assert weight.shape == (offset + 320, 32) and weight.dtype == dtype
    assert torch.equal(weight[:offset], rows[:offset])
    for position in range(320):
        assert torch.equal(weight[offset + position], rows[offset + position % LENGTH])


@torch.no_grad()
def test_gpt2_keeps_the_logits_of_its_1024_positions_bit_for_bit(make_base):
    model = make_base("gpt2", n_positions=1024)
    lengths = (1, 1000, 1023, 1024)
    before = [model(ids_of(length)).logits for length in lengths]
    model = HyLoRADAModel(model, HyLoRADAConfig(rope_scaling_type="auto", rope_scaling_factor=4.0, **PLAIN))
    assert model.config.max_position_embeddings == 4096
    for length, logits in zip(lengths, before, strict=True):
        assert torch.equal(model.eval()(ids_of(length)).logits, logits)
    assert torch.isfinite(model(ids_of(4096)).logits).all()


@pytest.mark.parametrize("family", LEARNED)
def test_longer_texts_run_and_decode(make_base, family):
    model = make_base(family)
    with pytest.raises((IndexError, RuntimeError)):
        model(ids_of(LENGTH + 1))
    PositionTable(model, 2).apply()
    ids = ids_of(2 * LENGTH)
    full = model(ids).logits
    output = model(ids[:, : LENGTH - 3], use_cache=True)
    rest = model(ids[:, LENGTH - 3 :], past_key_values=output.past_key_values).logits
    torch.testing.assert_close(rest, full[:, LENGTH - 3 :], rtol=1e-5, atol=1e-5)
    assert model.generate(ids[:, : LENGTH - 2], max_new_tokens=8, eos_token_id=None).shape[1] == LENGTH + 6


@pytest.mark.parametrize("family", LEARNED)
def test_interpolation_is_linear_between_the_ends(make_base, family):
    model = make_base(family)
    rows = find_position_table(model).weight.detach().double()
    PositionTable(model, 3, "interpolate").apply()
    weight = find_position_table(model).weight.detach().double()
    offset = len(rows) - LENGTH
    assert torch.equal(weight[: offset + 1], rows[: offset + 1]) and torch.equal(weight[-1], rows[-1])
    for position in range(3 * LENGTH):
        place = position * (LENGTH - 1) / (3 * LENGTH - 1)
        lower = min(int(place), LENGTH - 2)
        expected = rows[offset + lower].lerp(rows[offset + lower + 1], place - lower)
        torch.testing.assert_close(weight[offset + position], expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("family", LEARNED)
def test_undo_gives_back_the_original(make_base, family):
    model = make_base(family)
    config, state = copy.deepcopy(model.config.to_dict()), copy.deepcopy(model.state_dict())
    weight, ids = find_position_table(model).weight, ids_of(9)
    before = model(ids).logits
    table = PositionTable(model, 2)
    assert model.config.to_dict() == config and find_position_table(model).weight is weight
    table.apply()
    table.undo()
    assert model.config.to_dict() == config and find_position_table(model).weight is weight
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(model(ids).logits, before)
    with pytest.raises((IndexError, RuntimeError)):
        model(ids_of(LENGTH + 1))


def test_an_extended_model_is_saved_known_and_not_extended_twice(make_base, tmp_path):
    model = make_base("gpt2")
    PositionTable(model, 2).apply()
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    again = PositionTable(loaded, 2)
    again.apply()
    assert (again.original_length, again.target_length) == (LENGTH, 2 * LENGTH)
    ids = ids_of(2 * LENGTH)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    again.undo()
    assert find_position_table(loaded).num_embeddings == 2 * LENGTH
    with pytest.raises(ValueError, match="extended already, from 128 to 256 positions and not to 384"):
        PositionTable(loaded, 3)


def test_factor_one_changes_nothing(make_base):
    model = make_base("gpt2")
    weight = find_position_table(model).weight
    table = PositionTable(model, 1.0)
    table.apply()
    assert find_position_table(model).weight is weight and not hasattr(model.config, "original_max_position_embeddings")


def test_causal_patterns_grow_with_the_table():
    model = gpt_neo()
    before = model(ids_of(32)).logits
    local = model.transformer.h[1].attn.attention
    pattern = local.bias
    table = PositionTable(model, 2)
    table.apply()
    assert torch.equal(model(ids_of(32)).logits, before)
    distance = torch.arange(64).unsqueeze(1) - torch.arange(64)
    assert torch.equal(local.bias[0, 0], (distance >= 0) & (distance < 8))
    assert torch.equal(model.transformer.h[0].attn.attention.bias[0, 0], distance >= 0)
    assert model(ids_of(64)).logits.shape == (2, 64, 97)
    table.undo()
    assert local.bias is pattern

    local.bias = torch.ones_like(pattern)
    with pytest.raises(ValueError, match=r"buffer bias \(1, 1, 32, 32\) is no causal pattern by distance"):
        PositionTable(model, 2)


def test_values_that_make_no_sense_are_refused(make_base):
    model = make_base("gpt2")
    with pytest.raises(ValueError, match="'tile' or 'interpolate', got 'repeat'"):
        PositionTable(model, 2, "repeat")
    for factor in (0.5, float("nan")):
        with pytest.raises(ValueError, match="factor must be at least 1"):
            PositionTable(model, factor)
    with pytest.raises(ValueError, match="LlamaForCausalLM has no learned position table to extend; use RoPE scaling"):
        PositionTable(make_base("llama"), 2)


def test_a_frozen_table_stays_frozen_when_it_grows(make_base):
    for trainable in (False, True):
        model = make_base("gpt2").requires_grad_(trainable)
        PositionTable(model, 2).apply()
        assert find_position_table(model).weight.requires_grad == trainable
