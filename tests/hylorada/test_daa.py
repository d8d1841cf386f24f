"""Direct Attention Adaptation: the formula in every layer and mode, its gradients, and what carries it."""

import copy
import math
import pickle

import pytest
import torch
from torch.nn import functional as F
from transformers import AttentionInterface

from hylorada import HyLoRADAConfig, HyLoRADAModel, get_lora_plus_param_groups
from hylorada.daa import DirectAttention
from hylorada.row_attention import ROWS, row_attention
from hylorada.s2_attention import attention_layers
from tests.hylorada.conftest import FAMILIES

EXACT = {"rtol": 1e-9, "atol": 1e-9}
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture
def make_daa(make_base):
    """make_daa(family, dtype, base changes, config fields) -> a model whose only trained part is its attention."""

    def make(family="llama", dtype=torch.float64, changes=None, start=False, **fields):
        shared = {"lora_rank": 2, "lora_dropout": 0.0, "gradient_checkpointing": False, "position_bias_enabled": False}
        shared |= {"daa_enabled": True, "daa_num_buckets": 8, "max_sequence_length": 64}
        targets = {"lora_target_modules": FAMILIES[family][2]}
        model = HyLoRADAModel(make_base(family, dtype, **changes or {}), HyLoRADAConfig(**shared | targets | fields))
        if not start:
            torch.manual_seed(2)
            with torch.no_grad():
                for parameter in model.daa.parameters():
                    parameter.add_(0.5 * torch.randn_like(parameter))
        model.daa.to(torch.promote_types(dtype, torch.float32))
        return model

    return make


def bucket(distance, buckets, max_length):
    """The bucket of one distance, from the formula of the position bias."""
    exact = buckets // 4
    if distance < exact:
        return distance
    # exact powers of the ratio would need rational numbers; the tests avoid them
    steps = buckets - exact
    return min(buckets - 1, exact + math.floor(steps * math.log(distance / exact) / math.log(max_length / exact)))


def reference_logits(model, base, token_ids, allowed=None):
    """The base model's logits, its attention recomputed by the formula with the parameters of `model`."""
    length = token_ids.shape[1]
    allowed = torch.ones(length, length).tril().bool() if allowed is None else allowed
    handles = []
    for index, layer in enumerate(attention_layers(base)):
        temperature = model.daa.temperature[index].to(base.dtype)
        bias = torch.zeros(len(temperature), length, length, dtype=base.dtype)
        if model.daa.distance_bias is not None:
            buckets = torch.tensor([[bucket(max(i - j, 0), 8, 64) for j in range(length)] for i in range(length)])
            bias = model.daa.distance_bias[index].to(base.dtype)[:, buckets]
        additive = bias.masked_fill(~allowed, torch.finfo(base.dtype).min).unsqueeze(0)

        def put(module, args, kwargs, additive=additive, temperature=temperature):
            module.temperature_of_test = temperature
            return args, kwargs | {"attention_mask": additive}

        handles.append(layer.register_forward_pre_hook(put, with_kwargs=True))

    def formula(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **_):
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
        logits = module.temperature_of_test[:, None, None] * (query @ key.transpose(-1, -2)) * scaling + attention_mask
        return (logits.softmax(-1) @ value).transpose(1, 2), None

    AttentionInterface.register("daa_formula_of_test", formula)
    base.config._attn_implementation_internal = "daa_formula_of_test"
    logits = base(token_ids, use_cache=False).logits
    for handle in handles:
        handle.remove()
    return logits


@pytest.mark.parametrize("buckets", [8, 0])
@pytest.mark.parametrize("training", [False, True])
def test_every_layer_computes_the_formula(make_base, make_daa, text, family, buckets, training):
    model = make_daa(family, daa_num_buckets=buckets).train(training)
    expected = reference_logits(model, make_base(family, torch.float64), text)
    torch.testing.assert_close(model(text).logits, expected, **EXACT)
    assert (expected - make_base(family, torch.float64)(text).logits).abs().max() > 1e-2


@pytest.mark.parametrize("buckets", [8, 0])
@pytest.mark.parametrize("sinks", [0, 2])
def test_it_acts_together_with_groups(make_base, make_daa, text, buckets, sinks):
    options = {"s2_attn_enabled": True, "s2_group_size": 4, "s2_sink_tokens": sinks, "s2_shift_mode": "heads"}
    model = make_daa("llama", daa_num_buckets=buckets, **options).train()
    i, j = torch.arange(23)[:, None], torch.arange(23)[None, :]
    offsets = torch.tensor([0, 0, 2, 2])[:, None, None]
    allowed = (j <= i) & (((i + 4 - offsets) // 4 == (j + 4 - offsets) // 4) | (j < sinks))
    expected = reference_logits(model, make_base("llama", torch.float64), text, allowed)
    torch.testing.assert_close(model(text).logits, expected, **EXACT)
    # evaluation has full attention
    expected = reference_logits(model, make_base("llama", torch.float64), text)
    torch.testing.assert_close(model.eval()(text).logits, expected, **EXACT)


@pytest.mark.parametrize("mode", ["layers", "heads"])
@pytest.mark.parametrize("sinks", [0, 3])
def test_blocks_of_rows_and_the_kernel_have_the_same_groups(make_daa, text, family, mode, sinks):
    """A distance bias of zeros is computed in blocks of rows, none by the op: with groups, shifts and packing."""
    options = {"s2_attn_enabled": True, "s2_group_size": 7, "s2_sink_tokens": sinks, "s2_shift_mode": mode}
    rows, op = make_daa(family, **options).train(), make_daa(family, daa_num_buckets=0, **options).train()
    with torch.no_grad():
        rows.daa.distance_bias.zero_()
        rows.daa.temperature.copy_(op.daa.temperature)
    mask = torch.ones_like(text)
    mask[0, :5] = 0
    packed = {"position_ids": torch.tensor([[*range(9), *range(14)]])}
    for given, begin in (({}, 0), ({"attention_mask": mask}, 5), (packed, 0)):
        torch.testing.assert_close(rows(text, **given).logits[:, begin:], op(text, **given).logits[:, begin:], **EXACT)


@pytest.mark.parametrize("buckets", [8, 0])
def test_start_is_the_base_model(make_base, make_daa, text, family, buckets):
    expected = make_base(family)(text).logits
    found = make_daa(family, torch.float32, start=True, daa_num_buckets=buckets)(text).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=4e-6 * expected.abs().max().item())


def test_every_parameter_gets_the_gradient_of_the_formula(make_base, make_daa, text, family):
    model = make_daa(family)
    F.cross_entropy(model(text).logits[:, :-1].flatten(0, 1), text[:, 1:].flatten()).backward()
    found = {name: parameter.grad.clone() for name, parameter in model.daa.named_parameters()}
    model.daa.zero_grad()
    logits = reference_logits(model, make_base(family, torch.float64), text)
    F.cross_entropy(logits[:, :-1].flatten(0, 1), text[:, 1:].flatten()).backward()
    for name, parameter in model.daa.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, **EXACT)
    assert (found["temperature"] != 0).all()
    # distances below 23 lie in the first buckets of 64, and the first query and key have only distance 0
    reached = bucket(22, 8, 64) + 1
    assert (found["distance_bias"][..., :reached] != 0).all() and (found["distance_bias"][..., reached:] == 0).all()


@pytest.mark.parametrize("position", [0, 6, 22])
def test_a_token_changes_nothing_before_it(make_daa, text, family, position):
    model = make_daa(family, torch.float32)
    changed = text.clone()
    changed[:, position] = 1
    before, after = model(text).logits, model(changed).logits
    assert torch.equal(before[:, :position], after[:, :position])
    assert not torch.equal(before[:, position], after[:, position])


@pytest.mark.parametrize("buckets", [8, 0])
def test_padding_packing_and_caching_change_nothing(make_daa, text, family, buckets):
    model = make_daa(family, daa_num_buckets=buckets)
    alone = model(text).logits
    mask = F.pad(torch.ones_like(text), (4, 3))
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    padded = model(F.pad(text, (4, 3), value=2), attention_mask=mask, position_ids=positions).logits[:, 4:27]
    torch.testing.assert_close(padded, alone, **EXACT)

    documents = [model(text[:1, :9]).logits, model(text[:1, 9:]).logits]
    packed = model(text[:1], position_ids=torch.tensor([[*range(9), *range(14)]]), use_cache=False).logits
    torch.testing.assert_close(packed, torch.cat(documents, 1), **EXACT)

    output = model(text[:, :5], use_cache=True)
    pieces = [output.logits]
    for start, stop in ((5, 6), (6, 7), (7, 12), (12, 23)):
        output = model(text[:, start:stop], past_key_values=output.past_key_values, use_cache=True)
        pieces.append(output.logits)
    torch.testing.assert_close(torch.cat(pieces, 1), alone, **EXACT)


def test_generation_with_padding_is_generation_alone(make_daa, text, family):
    model = make_daa(family)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    expected = model.generate(text, attention_mask=torch.ones_like(text), **options)
    ids, mask = F.pad(text, (5, 0), value=2), F.pad(torch.ones_like(text), (5, 0))
    assert torch.equal(model.generate(ids, attention_mask=mask, **options)[:, 5:], expected)


@pytest.mark.parametrize("buckets", [8, 0])
def test_a_sliding_window_is_kept(make_base, make_daa, text, buckets):
    model = make_daa("mistral", changes={"sliding_window": 6}, daa_num_buckets=buckets)
    i, j = torch.arange(23)[:, None], torch.arange(23)[None, :]
    expected = reference_logits(model, make_base("mistral", torch.float64), text, (j <= i) & (i - j < 6))
    torch.testing.assert_close(model(text).logits, expected, **EXACT)
    output = model(text[:, :11], use_cache=True)
    pieces = [output.logits]
    for start in range(11, 23):
        output = model(text[:, start : start + 1], past_key_values=output.past_key_values, use_cache=True)
        pieces.append(output.logits)
    torch.testing.assert_close(torch.cat(pieces, 1), expected, **EXACT)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("s2", [False, True])
def test_gradient_checkpointing_changes_no_gradient(make_daa, text, family, reentrant, s2):
    changes = {"attn_pdrop" if family == "gpt2" else "attention_dropout": 0.2}
    fields = {"s2_attn_enabled": True, "s2_group_size": 5} if s2 else {}
    model = make_daa(family, changes=changes, **fields).train()
    results = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.zero_grad()
        torch.manual_seed(0)
        model(text, labels=text).loss.backward()
        results.append([parameter.grad for parameter in model.adapter_parameters().values()])
    for plain, recomputed in zip(*results, strict=True):
        torch.testing.assert_close(recomputed, plain, **EXACT)


def test_it_is_saved_counted_merged_and_grouped(make_daa, make_base, text, tmp_path):
    model = make_daa("gpt2", torch.float32)
    expected = model(text).logits
    assert model.count_params()["daa"] == 2 * 4 * (1 + 8)
    assert {name for name in model.adapter_parameters() if name.startswith("daa")} == {
        "daa.temperature",
        "daa.distance_bias",
    }
    groups = {group["name"]: group for group in get_lora_plus_param_groups(model, lr_attention=3.0, weight_decay=0.1)}
    assert (groups["daa"]["lr"], groups["daa"]["weight_decay"]) == (3.0, 0.0)
    assert groups["daa"]["params"] == [model.daa.temperature, model.daa.distance_bias]

    model.save_pretrained(tmp_path / "adapter")
    loaded = HyLoRADAModel.from_pretrained(make_base("gpt2"), tmp_path / "adapter")
    assert torch.equal(loaded(text).logits, expected)
    model.merge_lora_weights()
    torch.testing.assert_close(model(text).logits, expected, **CLOSE)
    assert model.count_params()["trainable"] == model.count_params()["daa"]
    model.save_pretrained(tmp_path / "merged")
    again = HyLoRADAModel.from_pretrained(None, tmp_path / "merged")
    torch.testing.assert_close(again(text).logits, expected, **CLOSE)
    assert set(model.base_model.state_dict()) == set(make_base("gpt2").state_dict())


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_is_a_model_of_its_own(make_daa, text, duplicate):
    model = make_daa()
    other, expected = duplicate(model), model(text).logits
    with torch.no_grad():
        other.daa.temperature.mul_(2)
    assert torch.equal(model(text).logits, expected)
    assert (other(text).logits - expected).abs().max() > 1e-3


def test_a_bf16_model_keeps_the_parameters_in_fp32(make_daa, text):
    model = make_daa("llama", torch.bfloat16)
    exact = make_daa("llama", torch.float64)
    exact.load_state_dict({name: value.double() for name, value in model.state_dict().items()})
    assert model.daa.temperature.dtype == torch.float32
    assert (model(text).logits - exact(text).logits).abs().max() < 0.03 * exact(text).logits.abs().max()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = make_daa("llama", torch.float32)(text).logits
    assert found.isfinite().all()


@pytest.mark.parametrize("count", [1, 100, 5000])
def test_the_bias_of_a_distance_is_that_of_its_bucket(count):
    direct = DirectAttention(2, 3, num_buckets=8, max_length=64)
    torch.nn.init.normal_(direct.distance_bias)
    found = direct.bias_by_distance(1, count, torch.device("cpu"))
    distances = [distance for distance in range(count) if distance not in (2, 4, 8, 16, 32, 64)]
    expected = direct.distance_bias[1][:, [bucket(distance, 8, 64) for distance in distances]]
    assert torch.equal(found[:, distances], expected)
    assert DirectAttention(1, 1, num_buckets=0).bias_by_distance(0, 5, torch.device("cpu")) is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [1, ROWS - 1, ROWS + 1, 3 * ROWS + 7])
def test_blocks_of_rows_are_dense_attention(dtype, length):
    generator = torch.Generator().manual_seed(length)
    total, group, sinks, window = length + 11, 50, 3, 40
    q = torch.randn(2, 4, length, 16, generator=generator, dtype=torch.float64)
    k, v = (torch.randn(2, 2, total, 16, generator=generator, dtype=torch.float64) for _ in range(2))
    bias = torch.randn(4, total, generator=generator, dtype=torch.float64)
    first, stop, offsets = torch.tensor([0, 5]), torch.tensor([total, total - 2]), torch.tensor([0, 0, 20, 20])
    leaves = [tensor.to(dtype).requires_grad_() for tensor in (q, k, v)] + [bias.requires_grad_()]
    options = {"first": first, "stop": stop, "latest_first": 5, "group_size": group, "offsets": offsets}
    options |= {"sink_tokens": sinks, "window": window, "scale": 0.3}
    out = row_attention(*leaves[:3], distance_bias=leaves[3], **options)
    dout = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    out.backward(dout.to(dtype))

    copies = [leaf.detach().double().requires_grad_() for leaf in leaves]
    i, j = torch.arange(total)[-length:, None], torch.arange(total)[None, :]
    begin, end, o = first[:, None, None, None], stop[:, None, None, None], offsets[:, None, None]
    same = (i - begin + group - o) // group == (j - begin + group - o) // group
    allowed = (j <= i) & (i - j < window) & (j >= begin) & (j < end) & (i < end) & (i >= begin)
    allowed = allowed & (same | (j - begin < sinks))
    keys, values = (copy.repeat_interleave(2, 1) for copy in copies[1:3])
    scores = 0.3 * copies[0] @ keys.transpose(-1, -2) + copies[3][:, (i - j).clamp(min=0)]
    weights = scores.masked_fill(~allowed, -1e30).softmax(-1) * allowed
    truth = weights @ values
    truth.backward(dout.to(dtype).double())
    # rounding of the result alone, for fp32 also of the sums
    rounding = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2**-8}[dtype]
    for found, expected in (
        (out, truth),
        *((leaf.grad, exact.grad) for leaf, exact in zip(leaves, copies, strict=True)),
    ):
        assert (found - expected).abs().max() <= rounding * expected.abs().max()
    assert (out[1, :, -2:] == 0).all() and (copies[0].grad[1, :, -2:] == 0).all()


@pytest.mark.parametrize("buckets", [1, 3])
def test_too_few_buckets_are_refused(buckets):
    with pytest.raises(ValueError, match=f"daa_num_buckets >= 4 is needed.*got {buckets}; use more, or 0 for the temp"):
        HyLoRADAConfig(daa_enabled=True, daa_num_buckets=buckets)


def test_buckets_beyond_the_length_are_refused():
    with pytest.raises(ValueError, match="max_sequence_length must exceed a quarter of daa_num_buckets=32"):
        HyLoRADAConfig(daa_enabled=True, max_sequence_length=8, position_bias_enabled=False)


def test_a_static_cache_is_refused(make_daa, text):
    with pytest.raises(ValueError, match='cache_implementation="dynamic"'):
        make_daa().generate(text, cache_implementation="static", max_new_tokens=2, attention_mask=torch.ones_like(text))
