"""Decoding from a cache is the full forward, for every combination of components, merged or not."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.hylorada.test_causality import parts

FAMILIES = ("gpt2", "llama", "qwen2")
# the tiny models know 128 positions; more are decoded where these are scaled
SHORT, LONG, NEW = 20, 124, 6
PAD = 2


@st.composite
def combinations(draw):
    """(family, fields of the config)."""
    family = draw(st.sampled_from(FAMILIES))
    fields = {"train_norms": draw(st.booleans()), "train_embeddings": draw(st.sampled_from([False, "all"]))}
    fields |= draw(parts())
    kind = draw(st.sampled_from([None, "auto"] if family == "gpt2" else [None, "linear", "dynamic", "yarn"]))
    if kind is not None:
        fields |= {"rope_scaling_type": kind, "rope_scaling_factor": 2.0}
    return family, fields


def prompts(length):
    """Two texts, the first one of three quarters of the length and padded on the left, and their mask."""
    ids = torch.randint(3, 97, (2, length), generator=torch.Generator().manual_seed(11))
    mask = torch.ones_like(ids)
    mask[0, : length // 4] = 0
    return ids.masked_fill(mask == 0, PAD), mask


def scores_of_full_forwards(model, ids, mask):
    """The scores of the last NEW tokens of ids, by one forward pass for each."""
    scores = []
    for end in range(ids.shape[1] - NEW, ids.shape[1]):
        positions = (mask[:, :end].cumsum(-1) - 1).clamp(min=0)
        output = model(ids[:, :end], attention_mask=mask[:, :end], position_ids=positions, use_cache=False)
        scores.append(output.logits[:, -1])
    return torch.stack(scores, 1)


@torch.no_grad()
def assert_decoding_is_the_full_forward(model, length, beams):
    ids, mask = prompts(length)
    options = {"max_new_tokens": NEW, "do_sample": False, "num_beams": beams, "eos_token_id": None}
    output = model.generate(
        ids, attention_mask=mask, output_logits=True, return_dict_in_generate=True, use_cache=True, **options
    )
    whole = torch.cat([mask, mask.new_ones(2, NEW)], 1)
    if beams == 1:
        expected = scores_of_full_forwards(model, output.sequences, whole)
        torch.testing.assert_close(torch.stack(output.logits, 1), expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(output.sequences[:, length:], expected.argmax(-1))
    else:
        again = model.generate(ids, attention_mask=mask, use_cache=False, **options)
        assert torch.equal(output.sequences, again)
    start = length // 4
    alone = model.generate(ids[:1, start:], attention_mask=mask[:1, start:], **options)
    assert torch.equal(output.sequences[:1, start:], alone)
    return output.sequences


@pytest.mark.parametrize("beams", [1, 3])
@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(combination=combinations())
def test_decoding_is_the_full_forward(make_model, beams, combination):
    family, fields = combination
    scaling = fields.get("rope_scaling_type")
    # the frequencies of "dynamic" follow the length: what is in a cache past the original length has older ones
    length = SHORT if scaling in (None, "dynamic") else LONG
    model = make_model(family, max_sequence_length=256, **fields)
    sequences = assert_decoding_is_the_full_forward(model, length, beams)
    if model.position_bias is not None and fields["position_bias_target"] == "delta":
        return
    model.merge_lora_weights()
    assert torch.equal(assert_decoding_is_the_full_forward(model, length, beams), sequences)


def test_the_check_finds_positions_that_are_not_continued(make_model, monkeypatch):
    from hylorada import position

    original = position.logical_positions

    def restarted(batch, length, **given):
        positions = original(batch, length, **given)
        return positions - positions[:, :1] if length == 1 else positions

    model = make_model("llama")
    assert_decoding_is_the_full_forward(model, SHORT, 1)
    monkeypatch.setattr(position, "logical_positions", restarted)
    with pytest.raises(AssertionError):
        assert_decoding_is_the_full_forward(model, SHORT, 1)
