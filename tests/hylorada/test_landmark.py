"""Landmarks: identity at the start, causality, the same sums however a text is padded, packed, cached or cropped."""

import copy
import pickle

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import DynamicCache, StaticCache

from hylorada.landmark import (
    LandmarkHook,
    LandmarkLoRA,
    LandmarkSums,
    check_gate,
    find_head_input,
    has_landmarks,
    running_sums,
)

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
GATES = ("token", "prefix_mean")
VARIANTS = [(gate, buckets) for gate in GATES for buckets in (0, 16)]


@pytest.fixture
def make_landmarked(make_base):
    """make_landmarked(family, gate, num_buckets) -> (model, landmarks, hook); the landmarks are not at their start."""

    def make(family="llama", gate="prefix_mean", num_buckets=0, start=False, **changes):
        model = make_base(family, **changes)
        backbone, hidden = find_head_input(model)
        torch.manual_seed(3)
        landmarks = LandmarkLoRA(hidden.shape[-1], 5, gate, num_buckets, max_length=64)
        if not start:
            with torch.no_grad():
                landmarks.gamma.fill_(1.5)
                landmarks.landmarks.normal_()
                landmarks.gate.normal_()
                if num_buckets:
                    landmarks.position.normal_()
        return model, landmarks, LandmarkHook(landmarks, backbone)

    return make


def padded(token_ids, left):
    """The first row without its first `left` tokens, padded there."""
    mask = torch.ones_like(token_ids)
    mask[0, :left] = 0
    return token_ids.masked_fill(mask == 0, 2), mask


def test_formula(make_landmarked, token_ids):
    for gate in (*GATES, "sequence_mean"):
        model, landmarks, hook = make_landmarked("llama", gate, 16)
        found = model.model(token_ids).last_hidden_state
        hook.remove()
        hidden = model.model(token_ids).last_hidden_state.double()
        prefix = hidden.cumsum(1) / torch.arange(1, 13).double()[:, None]
        means = {
            "token": hidden,
            "prefix_mean": prefix,
            "sequence_mean": hidden.mean(1, keepdim=True).expand(2, 12, 32),
        }
        # 12 positions are 4 buckets of one position each, and 12 logarithmic ones up to 64
        buckets = [0, 1, 2, 3, *(4 + int(12 * torch.tensor(p / 4).log2() / 4) for p in range(4, 12))]
        logits = means[gate] @ landmarks.gate.double().T + landmarks.position.double()[buckets]
        expected = hidden + landmarks.gamma.double() * (logits.softmax(-1) @ landmarks.landmarks.double())
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_parameter_counts():
    assert sum(parameter.numel() for parameter in LandmarkLoRA(768).parameters()) == 12_289
    assert sum(parameter.numel() for parameter in LandmarkLoRA(768, num_buckets=64).parameters()) == 12_801


def test_values_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="gate must be 'token', 'prefix_mean' or 'sequence_mean', got 'mean'"):
        LandmarkLoRA(8, gate="mean")
    with pytest.raises(ValueError, match="max_length must exceed a quarter of num_buckets=64, got 16"):
        LandmarkLoRA(8, num_buckets=64, max_length=16)


@pytest.mark.parametrize(("gate", "buckets"), VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_start_is_the_base_model_bit_for_bit(make_landmarked, token_ids, family, gate, buckets, dtype):
    model, _, hook = make_landmarked(family, gate, buckets, start=True, dtype=dtype)
    found = model(token_ids).logits
    hook.remove()
    assert torch.equal(found, model(token_ids).logits)


def test_the_head_receives_what_the_hook_gives(make_landmarked, token_ids, family):
    model, _, hook = make_landmarked(family, "token")
    output = model(token_ids, output_hidden_states=True)
    head = model.get_output_embeddings()
    torch.testing.assert_close(head(output.hidden_states[-1]), output.logits)
    as_tuple = model(token_ids, output_hidden_states=True, return_dict=False)
    assert torch.equal(as_tuple[0], output.logits)
    hook.remove()
    assert (model(token_ids).logits - output.logits).abs().max() > 0.1


def test_backbone_alone_and_in_a_tuple(make_landmarked, token_ids):
    model, _, _ = make_landmarked("llama")
    hidden = model.model(token_ids).last_hidden_state
    assert torch.equal(model.lm_head(hidden), model(token_ids).logits)
    output = model.model(token_ids, return_dict=False, output_hidden_states=True)
    assert torch.equal(output[0], hidden)
    assert any(isinstance(entry, tuple) and entry[-1] is output[0] for entry in output)


def test_removal_leaves_nothing(make_landmarked, token_ids):
    model, _, hook = make_landmarked("gpt2")
    before = has_landmarks(model.transformer)
    hook.remove()
    assert before and not any(has_landmarks(module) for module in model.modules())
    cache = model(token_ids, use_cache=True).past_key_values
    assert not any(isinstance(layer, LandmarkSums) for layer in cache.layers)


@pytest.mark.parametrize("position", [0, 5, 11])
@pytest.mark.parametrize(("gate", "buckets"), VARIANTS)
def test_no_token_changes_an_earlier_output(make_landmarked, token_ids, family, gate, buckets, position):
    model, _, _ = make_landmarked(family, gate, buckets)
    changed = token_ids.clone()
    changed[:, position] = (changed[:, position] + 1) % 97
    before, after = model(token_ids).logits, model(changed).logits
    assert torch.equal(before[:, :position], after[:, :position])
    assert (before[:, position:] - after[:, position:]).abs().max() > 1e-3


def test_sequence_mean_shows_later_tokens(make_landmarked, token_ids):
    model, _, _ = make_landmarked("llama", "sequence_mean")
    changed = token_ids.clone()
    changed[:, -1] += 1
    assert (model(token_ids).logits - model(changed).logits)[:, 0].abs().max() > 1e-4


def test_no_gradient_comes_from_a_later_token(make_base):
    landmarks = LandmarkLoRA(8, 3, "prefix_mean")
    hidden = torch.randn(1, 7, 8, requires_grad=True)
    values = torch.cat([landmarks.gate_logits(hidden), torch.ones(1, 7, 1)], -1)
    sums = running_sums(values, torch.tensor([[False, False, False, True, False, False, False]]))
    for token in range(7):
        (gradient,) = torch.autograd.grad(sums[0, token].sum(), hidden, retain_graph=True)
        reached = gradient[0].abs().sum(-1) > 0
        start = 3 if token >= 3 else 0
        assert reached.tolist() == [start <= other <= token for other in range(7)]


def test_running_sums_are_loops():
    generator = torch.Generator().manual_seed(0)
    for length in (1, 2, 3, 7, 8, 33):
        values = torch.randn(2, length, 3, dtype=torch.float64, generator=generator)
        starts = torch.rand(2, length, generator=generator) < 0.2
        past = torch.randn(2, 3, dtype=torch.float64, generator=generator)
        for given_starts in (None, starts):
            for given_past in (None, past):
                found = running_sums(values, given_starts, given_past)
                for row in range(2):
                    total = torch.zeros(3, dtype=torch.float64) if given_past is None else given_past[row]
                    for token in range(length):
                        is_start = given_starts is not None and given_starts[row, token]
                        total = values[row, token] + (0 if is_start else total)
                        torch.testing.assert_close(found[row, token], total, rtol=0, atol=1e-13)


def test_sums_of_a_document_are_bit_for_bit_its_own():
    values = torch.randn(1, 300, 4, generator=torch.Generator().manual_seed(0))
    starts = torch.zeros(1, 300, dtype=torch.bool)
    starts[0, [0, 113]] = True
    other = values.clone()
    other[:, :113] *= 1e6
    found = running_sums(values, starts)[:, 113:]
    assert torch.equal(found, running_sums(other, starts)[:, 113:])
    assert torch.equal(found, running_sums(values[:, 113:]))


@pytest.mark.parametrize("gate", [*GATES, "sequence_mean"])
def test_padding_changes_nothing(make_landmarked, token_ids, family, gate):
    model, _, _ = make_landmarked(family, gate, 16)
    alone = model(token_ids[:1]).logits
    padding, ones = torch.full((1, 5), 2), torch.ones(1, 12, dtype=torch.long)
    zeros = torch.zeros(1, 5, dtype=torch.long)
    right = model(torch.cat([token_ids[:1], padding], 1), attention_mask=torch.cat([ones, zeros], 1)).logits[:, :12]
    torch.testing.assert_close(right, alone, **CLOSE)
    mask = torch.cat([zeros, ones], 1)
    # the families without relative positions need to be told where the text starts
    ids = {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)} if family in ("gpt2", "opt") else {}
    left = model(torch.cat([padding, token_ids[:1]], 1), attention_mask=mask, **ids).logits[:, 5:]
    torch.testing.assert_close(left, alone, **CLOSE)


@pytest.mark.parametrize("gate", [*GATES, "sequence_mean"])
def test_padding_inside_a_text_begins_no_document(make_landmarked, token_ids, gate):
    model, _, _ = make_landmarked("llama", gate, 16)
    alone = model(token_ids[:1]).logits
    padding, zeros = torch.full((1, 3), 2), torch.zeros(1, 3, dtype=torch.long)
    ids = torch.cat([token_ids[:1, :5], padding, token_ids[:1, 5:]], 1)
    mask = torch.cat([torch.ones_like(ids[:, :5]), zeros, torch.ones_like(ids[:, 8:])], 1)
    positions = torch.cat([torch.arange(5)[None], zeros, torch.arange(5, 12)[None]], 1)
    found = model(ids, attention_mask=mask, position_ids=positions).logits
    torch.testing.assert_close(found[:, mask[0] == 1], alone, **CLOSE)


# transformers' OPT does not keep packed documents apart
@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama", "mistral", "qwen2"])
@pytest.mark.parametrize("gate", [*GATES, "sequence_mean"])
def test_packed_documents_are_apart(make_landmarked, token_ids, family, gate):
    model, _, _ = make_landmarked(family, gate, 16)
    first, second = token_ids[:1, :5], token_ids[1:, :7]
    positions = torch.tensor([[*range(5), *range(7)]])
    packed = model(torch.cat([first, second], 1), position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(packed[:, :5], model(first).logits, **CLOSE)
    torch.testing.assert_close(packed[:, 5:], model(second).logits, **CLOSE)


@pytest.mark.parametrize(("gate", "buckets"), VARIANTS)
def test_cached_decoding_is_the_full_forward(make_landmarked, token_ids, family, gate, buckets):
    model, _, _ = make_landmarked(family, gate, buckets)
    full = model(token_ids).logits
    output = model(token_ids[:, :4], use_cache=True)
    pieces = [output.logits]
    for start, stop in ((4, 5), (5, 6), (6, 12)):
        output = model(token_ids[:, start:stop], past_key_values=output.past_key_values, use_cache=True)
        pieces.append(output.logits)
    torch.testing.assert_close(torch.cat(pieces, 1), full, **CLOSE)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize(("gate", "buckets"), VARIANTS)
def test_generate_with_cache_and_padding_is_generate_by_full_forwards(
    make_landmarked, token_ids, family, gate, buckets, beams
):
    model, _, hook = make_landmarked(family, gate, buckets)
    ids, mask = padded(token_ids, 4)
    options = {"max_new_tokens": 8, "do_sample": False, "num_beams": beams, "eos_token_id": None}
    scores = {"output_scores": True, "return_dict_in_generate": True}
    cached = model.generate(ids, attention_mask=mask, use_cache=True, **options, **scores)
    again = model.generate(ids, attention_mask=mask, use_cache=False, **options, **scores)
    assert torch.equal(cached.sequences, again.sequences)
    for step, other in zip(cached.scores, again.scores, strict=True):
        torch.testing.assert_close(step, other, rtol=1e-4, atol=1e-4)
    assert torch.equal(cached.sequences[:1, 4:], model.generate(ids[:1, 4:], attention_mask=mask[:1, 4:], **options))
    hook.remove()
    plain = model.generate(ids, attention_mask=mask, **options, **scores)
    assert (plain.scores[0] - cached.scores[0]).abs().max() > 1e-2


def test_reordered_rows_keep_their_own_sums(make_landmarked, token_ids):
    model, _, _ = make_landmarked("llama")
    cache = model(token_ids[:, :8], use_cache=True).past_key_values
    cache.reorder_cache(torch.tensor([1, 0]))
    swapped = model(token_ids.flip(0)[:, 8:], past_key_values=cache).logits
    torch.testing.assert_close(swapped, model(token_ids.flip(0)).logits[:, 8:], **CLOSE)


@torch.no_grad()
def test_a_cache_is_selected_repeated_cropped_copied_and_reset_with_its_sums(make_landmarked, token_ids):
    model, _, _ = make_landmarked("llama")
    full = model(token_ids).logits
    filled = model(token_ids[:, :8], use_cache=True).past_key_values

    def continued(cache, rows, start=8):
        return model(token_ids[rows][:, start:], past_key_values=cache).logits, full[rows][:, start:]

    selected = copy.deepcopy(filled)
    selected.batch_select_indices(torch.tensor([1]))
    torch.testing.assert_close(*continued(selected, [1]), **CLOSE)
    repeated = copy.deepcopy(filled)
    repeated.batch_repeat_interleave(2)
    torch.testing.assert_close(*continued(repeated, [0, 0, 1, 1]), **CLOSE)
    for removed in (1, 5):
        cropped = copy.deepcopy(filled)
        cropped.crop(-removed)
        torch.testing.assert_close(*continued(cropped, [0, 1], 8 - removed), **CLOSE)
    pickled = pickle.loads(pickle.dumps(filled))
    torch.testing.assert_close(*continued(pickled, [0, 1]), **CLOSE)
    filled.reset()
    torch.testing.assert_close(*continued(filled, [0, 1], 0), **CLOSE)


def test_assisted_generation_crops_the_sums(make_landmarked, token_ids):
    model, _, _ = make_landmarked("llama")
    prompt = torch.cat([token_ids[:1], token_ids[:1]], 1)
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    expected = model.generate(prompt, attention_mask=torch.ones_like(prompt), use_cache=False, **options)
    found = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), prompt_lookup_num_tokens=3, max_matching_ngram_size=1, **options
    )
    assert torch.equal(found, expected)


def test_a_sliding_window_keeps_the_sums_of_the_whole_text(make_landmarked):
    ids = torch.randint(3, 97, (2, 24), generator=torch.Generator().manual_seed(1))
    model, _, _ = make_landmarked("mistral", sliding_window=5)
    full = model(ids).logits
    output = model(ids[:, :9], use_cache=True)
    pieces = [output.logits]
    for start in range(9, 24):
        output = model(ids[:, start : start + 1], past_key_values=output.past_key_values)
        pieces.append(output.logits)
    torch.testing.assert_close(torch.cat(pieces, 1), full, **CLOSE)
    assert output.past_key_values.is_sliding == [True] * 3


def test_a_static_cache_is_for_the_gate_of_tokens(make_landmarked, token_ids):
    options = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(token_ids)}
    model, _, hook = make_landmarked("llama", "prefix_mean")
    with pytest.raises(TypeError, match=r"in this StaticCache \(static: True, .*cache_implementation=\"dynamic\""):
        model.generate(token_ids, cache_implementation="static", **options)
    hook.remove()
    model, _, _ = make_landmarked("llama", "token", 16)
    dynamic = model.generate(token_ids, **options)
    assert torch.equal(model.generate(token_ids, cache_implementation="static", **options), dynamic)
    full = model(token_ids).logits
    cache = StaticCache(config=model.config, max_cache_len=16)
    pieces = [model(token_ids[:, :8], past_key_values=cache).logits]
    pieces += [model(token_ids[:, i : i + 1], past_key_values=cache).logits for i in range(8, 12)]
    torch.testing.assert_close(torch.cat(pieces, 1), full, **CLOSE)


def test_a_mask_that_does_not_mark_padding_is_refused(make_landmarked, token_ids):
    model, _, _ = make_landmarked("llama")
    with pytest.raises(ValueError, match="marks padding, got one of 4 dimensions; pass that"):
        model(token_ids, attention_mask=torch.ones(2, 1, 12, 12, dtype=torch.bool))


def test_caches_without_the_sums_are_refused(make_landmarked, token_ids):
    model, landmarks, hook = make_landmarked("llama")
    hook.remove()
    cache = model(token_ids[:, :8], use_cache=True).past_key_values
    LandmarkHook(landmarks, model.model)
    with pytest.raises(ValueError, match="sums of 0 tokens in a cache of 8 tokens; fill the cache with this model"):
        model(token_ids[:, 8:], past_key_values=cache)
    offloaded = DynamicCache(config=model.config)
    offloaded.offloading = True
    with pytest.raises(TypeError, match=r"in this DynamicCache \(static: False, offloaded: True\)"):
        LandmarkSums.of(offloaded, 0)


def test_sequence_mean_refuses_a_filled_cache(make_landmarked, token_ids):
    model, _, _ = make_landmarked("llama", "sequence_mean")
    cache = model(token_ids[:, :8], use_cache=True).past_key_values
    with pytest.raises(ValueError, match="needs the whole text in one call"):
        model(token_ids[:, 8:], past_key_values=cache)


def test_packed_boundaries_without_positions_are_refused(make_landmarked, token_ids):
    model, _, _ = make_landmarked("llama")
    with pytest.raises(ValueError, match="position_ids that restart at 0 beside cu_seq_lens_q"):
        model.model(token_ids[:1], cu_seq_lens_q=torch.tensor([0, 5, 12]))


def test_sequence_mean_is_for_bidirectional_models(make_base, family):
    model = make_base(family).train()
    backbone, _ = find_head_input(model)
    with pytest.raises(ValueError, match="would show later tokens to earlier ones"):
        check_gate(model, backbone, "sequence_mean")
    for gate in GATES:
        check_gate(model, backbone, gate)
    assert all(module.training for module in model.modules())


def test_a_bidirectional_model_may_use_sequence_mean(make_base):
    model = make_base("llama", is_causal=False, attn_implementation="eager")
    backbone, _ = find_head_input(model)
    check_gate(model, backbone, "sequence_mean")


def test_what_feeds_the_head_is_found(make_base, family):
    model = make_base(family)
    expected = {"gpt2": "transformer", "gpt_neox": "gpt_neox", "opt": "model.decoder"}.get(family, "model")
    backbone, hidden = find_head_input(model)
    assert backbone is model.get_submodule(expected) and hidden.shape == (1, 1, 32)
    norm = {"gpt2": "ln_f", "gpt_neox": "final_layer_norm", "opt": "final_layer_norm"}.get(family, "norm")
    seen = []
    handle = backbone.get_submodule(norm).register_forward_hook(lambda module, args, output: seen.append(output))
    assert torch.equal(backbone(torch.tensor([[5, 6]]))[0], seen[0])
    handle.remove()


def test_models_whose_head_receives_something_else_are_refused(make_base):
    model = make_base("llama")
    model.lm_head.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    with pytest.raises(ValueError, match=r"no module of LlamaForCausalLM .* gives its output to the head unchanged"):
        find_head_input(model)
    with pytest.raises(ValueError, match="LlamaModel is no decoder with an output head; set landmark_enabled=False"):
        find_head_input(make_base("llama").model)


def test_finding_leaves_no_trace(make_base, token_ids):
    model = make_base("gpt2", resid_pdrop=0.3).train()
    state = torch.get_rng_state()
    find_head_input(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated")
@pytest.mark.parametrize("checkpointing", [None, True, False])
def test_every_parameter_has_a_gradient_and_checkpointing_changes_none(
    make_landmarked, token_ids, family, checkpointing
):
    model, landmarks, _ = make_landmarked(family, "prefix_mean", 16)
    ids, mask = padded(token_ids, 3)

    def gradients():
        landmarks.zero_grad()
        model.zero_grad()
        loss = model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100), use_cache=False).loss
        loss.backward()
        return {name: parameter.grad.clone() for name, parameter in landmarks.named_parameters()}

    expected = gradients()
    assert set(expected) == {"landmarks", "gate", "gamma", "position"}
    assert all(gradient.abs().sum() > 0 for gradient in expected.values())
    if checkpointing is not None:
        model.train().gradient_checkpointing_enable({"use_reentrant": checkpointing})
        model.enable_input_require_grads()
        for name, gradient in gradients().items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-7)


def test_first_gradients_exist_and_only_gamma_moves(make_landmarked, token_ids):
    model, landmarks, _ = make_landmarked("llama", "prefix_mean", 16, start=True)
    model(token_ids, labels=token_ids).loss.backward()
    for name, parameter in landmarks.named_parameters():
        assert (parameter.grad.abs().sum() > 0) == (name == "gamma"), name


@pytest.mark.parametrize("gate", [*GATES, "sequence_mean"])
def test_gradients_are_those_of_finite_differences(gate):
    torch.manual_seed(0)
    landmarks = LandmarkLoRA(6, 3, gate, 8, max_length=20).double()
    with torch.no_grad():
        landmarks.gamma.fill_(0.7)
    hidden = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)

    class Backbone(torch.nn.Module):
        def forward(self, hidden, attention_mask=None, position_ids=None, past_key_values=None):
            return (hidden.clone(),)

    backbone = Backbone()
    LandmarkHook(landmarks, backbone)
    mask = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 0]])
    positions = torch.tensor([[0, 0, 1, 0, 1], [0, 1, 2, 3, 0]])

    def output(hidden, *parameters):
        return backbone(hidden, attention_mask=mask, position_ids=positions)[0]

    assert torch.autograd.gradcheck(output, (hidden, *landmarks.parameters()))


def test_nothing_of_the_size_of_the_hidden_states_is_kept_for_the_landmarks():
    landmarks = LandmarkLoRA(64, 4, "token")
    hidden = torch.randn(1, 50, 64, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        landmarks(hidden, landmarks.gate_logits(hidden))
    own = [tensor for tensor in kept if tensor.numel() >= hidden.numel()]
    assert own and all(tensor.data_ptr() == hidden.data_ptr() for tensor in own)


@pytest.mark.parametrize("gate", GATES)
def test_rounding_of_bf16_is_that_of_its_hidden_states(gate):
    torch.manual_seed(0)
    exact = LandmarkLoRA(64, 8, gate).double()
    with torch.no_grad():
        exact.gamma.fill_(1.0)
        exact.landmarks.normal_()
    landmarks = copy.deepcopy(exact).float()
    hidden = torch.randn(2, 500, 64, dtype=torch.float64).bfloat16()

    def averaged(module, hidden):
        logits = module.gate_logits(hidden)
        if gate == "token":
            return logits
        sums = running_sums(torch.cat([logits, torch.ones_like(logits[..., :1])], -1))
        return sums[..., :-1] / sums[..., -1:]

    truth = exact(hidden.double(), averaged(exact, hidden.double()))
    found = landmarks(hidden, averaged(landmarks, hidden)).double()
    # the result's own rounding, and that of the mixed landmarks before the sum
    ideal = truth.bfloat16().double()
    assert (found - truth).square().mean() < 2**2 * (ideal - truth).square().mean()
    assert averaged(landmarks, hidden).dtype == torch.float32


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_has_landmarks_of_its_own(make_landmarked, token_ids, duplicate):
    model, landmarks, hook = make_landmarked("gpt2")
    # as a model that owns them holds all three
    owner = torch.nn.ModuleDict({"model": model, "landmarks": landmarks})
    owner.hook = hook
    other = duplicate(owner)
    expected = model(token_ids).logits
    assert torch.equal(other["model"](token_ids).logits, expected)
    with torch.no_grad():
        other["landmarks"].gamma.add_(1)
    assert (other["model"](token_ids).logits - expected).abs().max() > 1e-3
    other.hook.remove()
    assert torch.equal(model(token_ids).logits, expected)
    hook.remove()
    assert torch.equal(other["model"](token_ids).logits, model(token_ids).logits)


def test_a_compiled_model_is_one_graph_with_the_same_gradients(make_landmarked, token_ids):
    model, landmarks, _ = make_landmarked("llama", "prefix_mean", 16)
    ids, mask = padded(token_ids, 3)
    results = []
    for call in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        landmarks.zero_grad()
        logits = call(ids, attention_mask=mask, use_cache=False).logits
        loss = cross_entropy(logits.flatten(0, 1), ids.flatten())
        loss.backward()
        results.append([loss.detach(), *(parameter.grad for parameter in landmarks.parameters())])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-6)
