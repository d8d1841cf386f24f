"""No component lets a token see a later one, in any combination; two that do show that the check can fail."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from hylorada import s2_attention
from hylorada.landmark import LandmarkHook, LandmarkLoRA, find_head_input

FAMILIES = ("gpt2", "gpt_neox", "llama", "mistral", "opt", "qwen2")
LEARNED_POSITIONS = ("gpt2", "opt")
# the tiny models know 128 positions
SHORT, LONG = 32, 150

LINEARS = {"use_rslora": st.booleans(), "use_dora_magnitude": st.booleans(), "train_norms": st.booleans()}
POSITION_BIAS = {
    "position_num_buckets": st.just(16),
    "position_bucket": st.sampled_from(["log", "log2"]),
    "position_bias_target": st.sampled_from(["output", "delta"]),
}
LANDMARKS = {"landmark_gate": st.sampled_from(["token", "prefix_mean"]), "landmark_position": st.booleans()}
GROUPS = {
    "s2_group_size": st.integers(4, 16),
    "s2_shift_mode": st.sampled_from(["layers", "heads"]),
    "s2_shift_ratio": st.sampled_from([0.25, 0.5, 0.75]),
    "s2_sink_tokens": st.integers(0, 3),
    "s2_eval": st.booleans(),
}


@st.composite
def parts(draw):
    """Fields of the config for a combination of the parts beside the adapted linears."""
    fields = {}
    for switch, options in (
        ("position_bias_enabled", POSITION_BIAS),
        ("landmark_enabled", LANDMARKS),
        ("s2_attn_enabled", GROUPS),
    ):
        fields[switch] = draw(st.booleans())
        if fields[switch]:
            fields |= draw(st.fixed_dictionaries(options))
    if draw(st.booleans()):
        # a distance bias and groups are two attentions
        buckets = 0 if fields["s2_attn_enabled"] else draw(st.sampled_from([0, 8]))
        fields |= {"daa_enabled": True, "daa_num_buckets": buckets}
    return fields


@st.composite
def cases(draw):
    """(family, fields of the config, length, position of the changed token, whether the model trains)."""
    family = draw(st.sampled_from(FAMILIES))
    fields = draw(st.fixed_dictionaries(LINEARS))
    fields |= draw(parts())
    fields["train_embeddings"] = draw(st.sampled_from([False, "tokens", "all"]))
    kinds = ["auto"] if family in LEARNED_POSITIONS else ["linear", "yarn", "auto"]
    # the tiny GPT-NeoX rotates two features, for which transformers' dynamic scaling has no base
    if family not in (*LEARNED_POSITIONS, "gpt_neox"):
        kinds.append("dynamic")
    kind = draw(st.sampled_from([None, *kinds]))
    if kind is not None:
        fields |= {"rope_scaling_type": kind, "rope_scaling_factor": 2.0}
    length = SHORT if kind is None else LONG
    return family, fields, length, draw(st.integers(0, length - 1)), draw(st.booleans())


@torch.no_grad()
def assert_a_token_changes_nothing_before_it(model, length, position):
    ids = torch.randint(3, 97, (2, length), generator=torch.Generator().manual_seed(3))
    changed = ids.clone()
    changed[:, position] = (changed[:, position] + 1) % 97
    before, after = model(ids).logits, model(changed).logits
    assert not torch.equal(before[:, position], after[:, position])
    assert torch.equal(before[:, :position], after[:, :position]), f"the token at {position} shows before it"


@settings(max_examples=80, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=cases())
def test_a_token_changes_nothing_before_it(make_model, case):
    family, fields, length, position, training = case
    model = make_model(family, max_sequence_length=256, **fields).train(training)
    assert_a_token_changes_nothing_before_it(model, length, position)


def test_the_check_finds_the_mean_of_the_whole_text(make_base):
    model = make_base("llama")
    backbone, hidden = find_head_input(model)
    landmarks = LandmarkLoRA(hidden.shape[-1], 5, "sequence_mean")
    torch.manual_seed(0)
    with torch.no_grad():
        landmarks.gamma.fill_(1.5)
        landmarks.landmarks.normal_()
        landmarks.gate.normal_()
    LandmarkHook(landmarks, backbone)
    with pytest.raises(AssertionError, match="shows before it"):
        assert_a_token_changes_nothing_before_it(model, SHORT, SHORT - 1)


def test_the_check_finds_rolled_groups(make_model, monkeypatch):
    def rolled_attention(q, k, v, *, group_size, shift, **_):
        k, v = (tensor.repeat_interleave(q.shape[1] // tensor.shape[1], 1) for tensor in (k, v))
        groups = [tensor.roll(-shift, 2).unflatten(2, (-1, group_size)) for tensor in (q, k, v)]
        return F.scaled_dot_product_attention(*groups, is_causal=True).flatten(2, 3).roll(shift, 2)

    monkeypatch.setattr(s2_attention, "shifted_attention", rolled_attention)
    model = make_model("llama", s2_attn_enabled=True, s2_group_size=8).train()
    with pytest.raises(AssertionError, match="shows before it"):
        assert_a_token_changes_nothing_before_it(model, SHORT, SHORT - 1)
