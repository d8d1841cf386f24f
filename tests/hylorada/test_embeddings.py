"""The choice of trained embeddings and norms."""

import logging

import pytest
import torch
import transformers
from torch import nn

from hylorada.embeddings import embedding_parameters, is_norm, norm_parameters, tied_names
from hylorada.position_table import PositionTable, find_position_table
from tests.hylorada.test_position_table import LEARNED, LENGTH, ids_of

TOKENS = {
    "gpt2": "transformer.wte.weight",
    "gpt_neox": "gpt_neox.embed_in.weight",
    "opt": "model.decoder.embed_tokens.weight",
}
POSITIONS = {"gpt2": "transformer.wpe.weight", "opt": "model.decoder.embed_positions.weight"}


@pytest.mark.parametrize("choice", [False, True, "positions", "tokens", "all"])
def test_chosen_embeddings(make_base, family, choice):
    model = make_base(family)
    tokens, positions = TOKENS.get(family, "model.embed_tokens.weight"), POSITIONS.get(family)
    if choice == "positions" and positions is None:
        with pytest.raises(ValueError, match='has no learned position table; use "tokens" or False'):
            embedding_parameters(model, choice)
        return
    expected = {
        False: [],
        True: [positions or tokens],
        "positions": [positions],
        "tokens": [tokens],
        "all": [name for name in (tokens, positions) if name],
    }
    found = embedding_parameters(model, choice)
    assert sorted(found) == sorted(expected[choice])
    for name, parameter in found.items():
        assert parameter is model.get_parameter(name)


def test_a_tied_head_is_reported(make_base, caplog):
    model = make_base("gpt2")
    with caplog.at_level(logging.INFO, "hylorada.embeddings"):
        parameters = embedding_parameters(model, "all")
    assert "trains lm_head.weight too: it is tied to transformer.wte.weight (3104 parameters)" in caplog.text
    assert tied_names(model, parameters) == {"transformer.wte.weight": ["lm_head.weight"]}
    caplog.clear()
    untied = make_base("llama")
    with caplog.at_level(logging.INFO, "hylorada.embeddings"):
        assert tied_names(untied, embedding_parameters(untied, "tokens")) == {}
    assert not caplog.text


def test_steps_that_bf16_rounds_away_are_a_warning(make_base, caplog):
    norm_parameters(make_base("llama", torch.bfloat16))
    assert "model.layers.0.input_layernorm.weight and 4 more are trained in torch.bfloat16" in caplog.text
    caplog.clear()
    norm_parameters(make_base("llama"))
    assert not caplog.text


def test_every_norm_is_found(make_base, family):
    parameters = norm_parameters(make_base(family))
    # two in each of two layers and the last one, of which LayerNorms have biases
    has_biases = family in ("gpt2", "gpt_neox", "opt")
    assert len(parameters) == 5 * (1 + has_biases)
    assert all("norm" in name or ".ln_" in name for name in parameters)


@pytest.mark.parametrize(
    ("prefix", "options", "count"),
    [("Qwen3", {"head_dim": 8}, 9), ("Gemma2", {"head_dim": 8}, 9), ("Olmo2", {}, 9), ("Cohere", {}, 3)],
)
def test_norms_of_other_families_are_found(prefix, options, count):
    config = getattr(transformers, f"{prefix}Config")(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        **options,
    )
    model = getattr(transformers, f"{prefix}ForCausalLM")(config)
    assert len(norm_parameters(model)) == count
    assert sum(parameter.dim() == 1 for parameter in model.parameters()) == count


def test_other_modules_with_gains_are_no_norms():
    assert is_norm(nn.RMSNorm(4)) and is_norm(nn.LayerNorm(4))
    for module in (nn.BatchNorm1d(4), nn.GroupNorm(2, 4), nn.PReLU(4), nn.Linear(4, 4), nn.Embedding(4, 4)):
        assert not is_norm(module)
    with pytest.raises(ValueError, match="Linear has no norms with parameters"):
        norm_parameters(nn.Linear(2, 2))


def test_every_chosen_parameter_has_a_gradient(make_base, family):
    model = make_base(family)
    model.requires_grad_(False)
    if family in LEARNED:
        PositionTable(model, 2).apply()
    chosen = embedding_parameters(model, "all") | norm_parameters(model)
    for parameter in chosen.values():
        parameter.requires_grad_(True)
    ids = ids_of(2 * LENGTH if family in LEARNED else 20)
    model(ids, labels=ids).loss.backward()
    for name, parameter in chosen.items():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    assert all(parameter.grad is None for name, parameter in model.named_parameters() if name not in chosen)
    if family in LEARNED:
        # beyond the original rows too
        assert (find_position_table(model).weight.grad[-LENGTH:].abs().sum(1) > 0)[:-1].all()
