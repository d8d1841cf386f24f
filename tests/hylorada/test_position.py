"""Position bias: buckets, logical positions, and one scale however a sequence is padded, packed, cached, recomputed."""

import copy
import math
import pickle
import threading
from fractions import Fraction

import pytest
import torch

from hylorada import HyLoRADAModel
from hylorada.position import PositionBias, bucket_starts, logical_positions

CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.mark.parametrize(
    ("buckets", "max_length"), [(64, 32768), (64, 2048), (8, 32), (16, 4 * 3**6), (4, 100), (32, 40)]
)
def test_log_buckets_follow_the_formula_exactly(buckets, max_length):
    bias = PositionBias(buckets, max_length, "log")
    found = bias.buckets(torch.arange(max_length + 10)).tolist()
    exact = buckets // 4
    steps = buckets - exact
    for position in range(max_length + 10):
        expected = position
        if position >= exact:
            # the largest k with k log(M / E) <= (N - E) log(pos / E), in rational numbers
            power, ratio = Fraction(position, exact) ** steps, Fraction(max_length, exact)
            guess = int(steps * math.log(position / exact) / math.log(max_length / exact))
            steps_done = max(k for k in range(max(guess - 1, 0), guess + 2) if ratio**k <= power)
            expected = min(buckets - 1, exact + steps_done)
        assert found[position] == expected, position


def test_default_log_buckets_use_every_bucket():
    assert PositionBias().buckets(torch.arange(32768)).unique().tolist() == list(range(64))


def test_log2_buckets_are_the_floor_of_the_logarithm():
    bias = PositionBias(64, 32768, "log2")
    positions = torch.cat([torch.arange(32768), torch.tensor([2**k + d for k in range(16, 50) for d in (-2, -1, 0)])])
    expected = [(position + 1).bit_length() - 1 for position in positions.tolist()]
    assert bias.buckets(positions).tolist() == expected
    assert bias.buckets(torch.arange(32768)).unique().tolist() == list(range(16))
    assert PositionBias(4, 32768, "log2").buckets(torch.tensor([0, 1, 6, 7, 10**6])).tolist() == [0, 1, 2, 3, 3]


def test_bucket_starts_do_not_fall():
    for buckets, max_length in ((64, 17), (64, 128), (256, 32768)):
        starts = bucket_starts(buckets, max_length, "log")
        assert starts[0] == 0 and starts == sorted(starts) and len(starts) == buckets


def test_scale_is_one_at_the_start_and_the_formula_later():
    bias = PositionBias()
    buckets = bias.buckets(torch.arange(4096).reshape(4, 1024))
    assert torch.equal(bias(buckets), torch.ones(4, 1024))
    with torch.no_grad():
        bias.table.normal_()
        bias.weight.fill_(0.7)
    truth = 1 + torch.sigmoid(bias.weight.double()) * torch.tanh(bias.table.double())[buckets]
    torch.testing.assert_close(bias(buckets).double(), truth, rtol=0, atol=3e-7)
    assert sum(parameter.numel() for parameter in bias.parameters()) == 65


LEFT = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
RIGHT = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
PACKED = torch.tensor([[0, 1, 0, 1]])


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, [[0, 1, 2, 3]]),
        ({"past_length": 5}, [[5, 6, 7, 8]]),
        ({"position_ids": PACKED}, [[0, 1, 0, 1]]),
        ({"position_ids": PACKED[0], "attention_mask": LEFT}, [[0, 1, 0, 1]]),
        ({"attention_mask": LEFT}, [[-1, -1, 0, 1], [0, 1, 2, 3]]),
        ({"attention_mask": RIGHT.bool()}, [[0, 1, 1, 1], [0, 1, 2, 3]]),
        ({"attention_mask": torch.cat([LEFT, LEFT.new_ones(2, 4)], 1), "past_length": 4}, [[2, 3, 4, 5], [4, 5, 6, 7]]),
        ({"attention_mask": LEFT.new_ones(2, 4), "past_length": 4}, [[4, 5, 6, 7], [4, 5, 6, 7]]),
        ({"attention_mask": torch.ones(2, 1, 4, 4)}, [[0, 1, 2, 3]]),
    ],
)
def test_logical_positions(given, expected):
    arguments = {"position_ids": None, "attention_mask": None, "past_length": 0} | given
    assert logical_positions(2, 4, **arguments).tolist() == expected


def test_position_ids_of_another_shape_are_refused(make_model, token_ids):
    model = make_model()
    with pytest.raises(ValueError, match=r"position_ids of shape \(2, 12\) or \(1, 12\), got \(3, 2, 12\)"):
        model.base_model.model(token_ids, position_ids=torch.zeros(3, 2, 12, dtype=torch.long))


def test_scale_acts_on_every_adapted_linear(make_model, token_ids, family):
    model = make_model(family)
    before = model(token_ids).logits
    with torch.no_grad():
        model.position_bias.table.zero_()
    assert (model(token_ids).logits - before).abs().max() > 1e-3


@pytest.mark.parametrize("target", ["output", "delta"])
def test_padding_changes_nothing(make_model, token_ids, family, target):
    model = make_model(family, position_bias_target=target)
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


# transformers' OPT does not keep packed documents apart
@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama", "mistral", "qwen2"])
def test_packed_documents_restart(make_model, token_ids, family):
    model = make_model(family).train()
    first, second = token_ids[:1, :5], token_ids[1:, :7]
    packed = model(torch.cat([first, second], 1), position_ids=torch.tensor([[*range(5), *range(7)]])).logits
    torch.testing.assert_close(packed[:, :5], model(first).logits, **CLOSE)
    torch.testing.assert_close(packed[:, 5:], model(second).logits, **CLOSE)


def test_cached_decoding_is_the_full_forward(make_model, token_ids, family):
    model = make_model(family)
    full = model(token_ids).logits
    output = model(token_ids[:, :4], use_cache=True)
    pieces = [output.logits]
    for start, stop in ((4, 5), (5, 6), (6, 12)):
        output = model(token_ids[:, start:stop], past_key_values=output.past_key_values, use_cache=True)
        pieces.append(output.logits)
    torch.testing.assert_close(torch.cat(pieces, 1), full, **CLOSE)


@pytest.mark.parametrize("beams", [1, 3])
def test_generate_with_cache_and_padding_is_generate_by_full_forwards(make_model, token_ids, family, beams):
    model = make_model(family)
    mask = torch.ones_like(token_ids)
    mask[0, :4] = 0
    ids = token_ids.masked_fill(mask == 0, 2)
    options = {"max_new_tokens": 6, "do_sample": False, "num_beams": beams, "eos_token_id": None}
    cached = model.generate(ids, attention_mask=mask, use_cache=True, **options)
    assert torch.equal(cached, model.generate(ids, attention_mask=mask, use_cache=False, **options))
    alone = model.generate(ids[:1, 4:], attention_mask=mask[:1, 4:], **options)
    assert torch.equal(cached[:1, 4:], alone)
    if beams == 1:
        text = token_ids[1:]
        for _ in range(6):
            text = torch.cat([text, model(text).logits[:, -1:].argmax(-1)], 1)
        assert torch.equal(cached[1:], text)


def test_a_static_cache_continues_the_positions(make_model, token_ids):
    model = make_model("llama")
    options = {
        "max_new_tokens": 6,
        "do_sample": False,
        "eos_token_id": None,
        "attention_mask": torch.ones_like(token_ids),
    }
    dynamic = model.generate(token_ids, **options)
    assert torch.equal(model.generate(token_ids, cache_implementation="static", **options), dynamic)


def gradients(model, token_ids):
    """Of two forwards of other lengths, paddings and packings, before one backward."""
    model.zero_grad()
    mask = torch.ones_like(token_ids)
    mask[0, :4] = 0
    packed = token_ids.flip(1)[:, :7]
    first = model(token_ids, attention_mask=mask, labels=token_ids).loss
    second = model(packed, position_ids=torch.tensor([[0, 1, 2, 0, 1, 2, 3]]).expand(2, 7), labels=packed).loss
    (first + 2 * second).backward()
    return {name: parameter.grad.clone() for name, parameter in model.adapter_parameters().items()}


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(make_model, token_ids, family, reentrant):
    model = make_model(family).train()
    expected = gradients(model, token_ids)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    found = gradients(model, token_ids)
    model.gradient_checkpointing_disable()
    again = gradients(model, token_ids)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-7)
        assert torch.equal(again[name], gradient), name


@pytest.mark.parametrize("implementation", ["REENTRANT", "NO_REENTRANT"])
def test_torchs_checkpoint_wrapper_changes_no_gradient(make_model, token_ids, implementation):
    from torch.distributed.algorithms._checkpoint import checkpoint_wrapper as torch_wrapper

    model = make_model("llama").train()
    expected = gradients(model, token_ids)
    model.base_model.enable_input_require_grads()
    layers = model.base_model.model.layers
    for index, layer in enumerate(layers):
        layers[index] = torch_wrapper.checkpoint_wrapper(layer, torch_wrapper.CheckpointImpl[implementation])
    found = gradients(model, token_ids)
    for name, gradient in zip(expected, found.values(), strict=True):
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-7)


def test_a_layer_outside_of_a_forward_says_so(make_model):
    model = make_model()
    with pytest.raises(RuntimeError, match="outside of its model's forward"):
        model.base_model.model.layers[0].mlp(torch.zeros(1, 3, 32))


def test_an_interrupted_forward_leaves_no_positions_behind(make_model, token_ids):
    model = make_model()
    expected = model(token_ids).logits

    def interrupt(*_):
        raise KeyboardInterrupt

    handle = model.base_model.model.layers[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(token_ids[:, :5])
    handle.remove()
    assert torch.equal(model(token_ids).logits, expected)


def test_threads_do_not_share_positions(make_model, token_ids):
    model = make_model()
    shifted = {"position_ids": torch.arange(50, 62).unsqueeze(0)}
    expected = model(token_ids).logits
    other = []

    def run_inside(*_):
        if threading.current_thread() is threading.main_thread():
            thread = threading.Thread(target=lambda: other.append(model(token_ids, **shifted).logits))
            thread.start()
            thread.join()

    handle = model.base_model.model.layers[1].register_forward_pre_hook(run_inside)
    found = model(token_ids).logits
    handle.remove()
    assert torch.equal(found, expected)
    assert torch.equal(other[0], model(token_ids, **shifted).logits)


def test_the_backbone_alone_is_scaled_too(make_model, token_ids):
    model = make_model("llama")
    hidden = model.base_model.model(token_ids).last_hidden_state
    assert torch.equal(model.base_model.lm_head(hidden), model(token_ids).logits)
    embeddings = model.get_input_embeddings()(token_ids)
    assert torch.equal(model(inputs_embeds=embeddings).logits, model(token_ids).logits)


def test_a_linear_with_other_tokens_is_refused(make_model, token_ids):
    model = make_model("llama")
    projection = model.base_model.model.layers[0].self_attn.q_proj
    flattened = projection.positions
    with pytest.raises(
        ValueError, match=r"positions for tokens \(2, 12\), but an adapted linear received \(2, 11, 32\)"
    ):
        handle = projection.register_forward_pre_hook(lambda _, args: (args[0][:, 1:],))
        model(token_ids)
    handle.remove()

    # a flattened input keeps the order of the tokens
    expected = model(token_ids).logits
    projection.register_forward_pre_hook(lambda _, args: (args[0].flatten(0, 1),))
    projection.register_forward_hook(lambda _, args, y: y.unflatten(0, (2, 12)))
    torch.testing.assert_close(model(token_ids).logits, expected, **CLOSE)
    assert projection.positions is flattened


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_is_a_model_of_its_own(make_model, token_ids, duplicate, merged):
    model = make_model("gpt2", gradient_checkpointing=True).train()
    gradients(model, token_ids)
    if merged:
        model.merge_lora_weights()
    other = duplicate(model)
    expected = model(token_ids).logits
    assert torch.equal(other(token_ids).logits, expected)
    with torch.no_grad():
        other.position_bias.table.add_(1)
    assert (other(token_ids).logits - expected).abs().max() > 1e-3
    assert torch.equal(model(token_ids).logits, expected)
    other.unmerge_lora_weights()
    assert isinstance(other, HyLoRADAModel) and not other.merged


def test_scale_stays_fp32_in_a_bf16_model(make_model, token_ids):
    model = make_model("llama", torch.bfloat16)
    assert {parameter.dtype for parameter in model.adapter_parameters().values()} == {torch.float32}
    exact = make_model("llama")
    exact.load_state_dict(model.state_dict())
    error = (model(token_ids).logits.float() - exact(token_ids).logits).abs().max()
    assert error < 0.03 * exact(token_ids).logits.abs().max()


@pytest.mark.parametrize("checkpointing", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_compiled_model_is_one_graph_with_the_same_gradients(make_model, token_ids, checkpointing):
    model = make_model("llama", gradient_checkpointing=checkpointing).train()
    mask = torch.ones_like(token_ids)
    mask[0, :4] = 0
    results = []
    for call in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        model.zero_grad()
        loss = call(token_ids, attention_mask=mask, labels=token_ids).loss
        loss.backward()
        results.append([loss.detach(), *(parameter.grad for parameter in model.adapter_parameters().values())])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-6)
