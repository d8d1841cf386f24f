"""shifted_attention: meaning, parity of both backends with the fp64 truth, causality, cost, integration, bad input."""

import itertools
import random

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from hylorada_kernels import backend as dispatch
from hylorada_kernels import testing, using
from hylorada_kernels.ops.shifted_attention import eager, op, shifted_attention
from hylorada_kernels.testing import interpreter
from hylorada_kernels.testing.attention import (
    attended_pairs,
    attention_inputs,
)
from tests.kernels.attention_parity import assert_parity, run
from tests.kernels.test_mutations import mutant_of

G = 24
FACTORS = {
    "mode": ["none", "half", "all"],
    "causal": [True, False],
    "heads": [(2, 2), (4, 2), (8, 2), (7, 1), (14, 1), (2, 1)],
    "length": [1, G - 1, G, G + 1, 3 * G + 7],
    "sinks": [0, 1, 4, 11, 30],
    "pad": ["none", "right", "packed"],
    "head_dim": [32, 64, 80, 96, 128],
}
CASES = 90


def cases():
    """Combinations such that any two values of two factors meet; long rows with few heads are drawn most often."""
    draw = random.Random(0)
    weights = {"length": [1, 1, 1, 2, 4], "heads": [3, 3, 2, 1, 1, 3], "pad": [2, 1, 2]}
    found = [
        tuple(draw.choices(values, weights.get(name))[0] for name, values in FACTORS.items()) for _ in range(CASES)
    ]
    names = list(FACTORS)
    for (i, first), (j, second) in itertools.combinations(enumerate(names), 2):
        for a, b in itertools.product(FACTORS[first], FACTORS[second]):
            if not any(case[i] == a and case[j] == b for case in found):
                case = [draw.choice(FACTORS[name]) for name in names]
                case[i], case[j] = a, b
                found.append(tuple(case))
    return found


def inputs_of(mode, causal, heads, length, sinks, pad, head_dim, dtype=torch.float32, **options):
    third = length // 3
    return attention_inputs(
        2 if pad == "right" else 1, *heads, length, head_dim, dtype=dtype, group_size=G,
        shift=0 if mode == "none" else 10, shifted_heads=mode, causal=causal, sink_tokens=sinks,
        lengths=[length, length // 2] if pad == "right" else None,
        documents=[third, 0, length - third] if pad == "packed" else None, **options,
    )  # fmt: skip


@pytest.mark.parametrize("case", cases(), ids=str)
def test_forward_and_gradients_match_the_truth(backend, case):
    assert_parity(inputs_of(*case), backend)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", random.Random(1).sample(cases(), 12), ids=str)
def test_16_bits_err_as_pytorch_does(backend, case, dtype):
    assert_parity(inputs_of(*case, dtype=dtype), backend)


def test_cases_cover_every_pair_of_values():
    assert 2 * len(cases()) >= 200
    for (i, first), (j, second) in itertools.combinations(enumerate(FACTORS.values()), 2):
        assert {(case[i], case[j]) for case in cases()} == set(itertools.product(first, second))


def test_a_short_row_is_full_attention(backend):
    given = attention_inputs(2, 4, 2, 20, 16, group_size=20, sink_tokens=3)
    y, _ = run(given, backend)
    full = F.scaled_dot_product_attention(given.q, given.k, given.v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(y, full, rtol=1e-5, atol=1e-6)


def test_the_scale_is_used(backend):
    given = attention_inputs(1, 2, 2, 2 * G, 16, group_size=G, scale=0.7)
    assert_parity(given, backend)


# causality


def rolled_attention(q, k, v, *, group_size, shift, **_):
    """The published S2-Attn for all heads: roll by the shift, attend causally within the groups, roll back."""
    q, k, v = (x.roll(-shift, 2).unflatten(2, (-1, group_size)) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).flatten(2, 3).roll(shift, 2)


def our_attention(backend):
    def attention(q, k, v, **options):
        with using(backend):
            return shifted_attention(q, k, v, shifted_heads="all", sink_tokens=2, **options)

    return attention


def assert_no_gradient_of_the_future(attention):
    given = attention_inputs(1, 2, 2, 3 * G, 16, group_size=G)
    for end in (1, 5, G, 2 * G + 3):
        leaves = given.to(torch.float32)
        attention(leaves.q, leaves.k, leaves.v, group_size=G, shift=10)[:, :, :end].sum().backward()
        assert leaves.v.grad[:, :, :end].any()
        for name, gradient in leaves.gradients().items():
            assert not gradient[:, :, end:].any(), f"the first {end} tokens have a gradient of a later {name}"


def assert_a_suffix_changes_nothing_before_it(attention):
    given = attention_inputs(1, 2, 2, 3 * G, 16, group_size=G)
    y = attention(given.q, given.k, given.v, group_size=G, shift=10)
    for start in (1, 5, G, 2 * G + 3):
        q, k, v = (x.clone() for x in (given.q, given.k, given.v))
        for x in (q, k, v):
            x[:, :, start:] = torch.randn_like(x[:, :, start:])
        changed = attention(q, k, v, group_size=G, shift=10)
        assert not torch.equal(changed[:, :, start:], y[:, :, start:])
        assert torch.equal(changed[:, :, :start], y[:, :, :start]), f"a change from token {start} on shows before it"


def test_no_token_sees_the_future(backend):
    assert_no_gradient_of_the_future(our_attention(backend))
    assert_a_suffix_changes_nothing_before_it(our_attention(backend))


@pytest.mark.parametrize("check", [assert_no_gradient_of_the_future, assert_a_suffix_changes_nothing_before_it])
def test_the_rolled_attention_leaks(check):
    with pytest.raises(AssertionError, match=r"a later|shows before"):
        check(rolled_attention)


# padding, packing, layouts


@pytest.mark.parametrize("mode", ["half", "all"])
@pytest.mark.parametrize("causal", [True, False])
def test_padded_packed_and_alone_are_the_same(backend, mode, causal):
    lengths = [2 * G + 5, 7, 0]
    padded = attention_inputs(
        3, 4, 2, 2 * G + 9, 16, group_size=G, shift=10, shifted_heads=mode, causal=causal, sink_tokens=3,
        lengths=lengths,
    )  # fmt: skip
    # what stands in the padding must not matter
    for b, length in enumerate(lengths):
        for x in (padded.q, padded.k, padded.v, padded.do):
            x[b, :, length:] = float("nan")
    y, gradients = run(padded, backend)

    def rows(x):
        return [x[b : b + 1, :, :length] for b, length in enumerate(lengths)]

    packed = inputs_of(mode, causal, (4, 2), sum(lengths), 3, "packed", 16)
    for name in ("q", "k", "v", "do"):
        setattr(packed, name, torch.cat(rows(getattr(padded, name)), dim=2))
    packed.cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    y_packed, packed_gradients = run(packed, backend)
    torch.testing.assert_close(torch.cat(rows(y), dim=2), y_packed, rtol=1e-6, atol=1e-6)
    for name, gradient in gradients.items():
        torch.testing.assert_close(torch.cat(rows(gradient), dim=2), packed_gradients[name], rtol=1e-6, atol=1e-6)

    for b, length in enumerate(lengths[:2]):
        alone = inputs_of(mode, causal, (4, 2), length, 3, "none", 16)
        alone.q, alone.k, alone.v, alone.do = (rows(getattr(padded, name))[b] for name in ("q", "k", "v", "do"))
        y_alone, alone_gradients = run(alone, backend)
        torch.testing.assert_close(rows(y)[b], y_alone, rtol=1e-6, atol=1e-6)
        for name, gradient in gradients.items():
            torch.testing.assert_close(rows(gradient)[b], alone_gradients[name], rtol=1e-6, atol=1e-6)
    for b, length in enumerate(lengths):
        for x in (y, *gradients.values()):
            assert not x[b, :, length:].any()


@pytest.mark.parametrize("mode", ["none", "half"])
def test_layouts_do_not_matter(backend, mode):
    """GPT-2's fused projection, transposed (B, L, H, D) views, and a head dim that is not innermost."""
    given = attention_inputs(
        2, 4, 4, 2 * G, 16, group_size=G, shift=0 if mode == "none" else 10, shifted_heads=mode, sink_tokens=1
    )
    expected, gradients = run(given, backend)
    fused = torch.cat([x.transpose(1, 2).flatten(2) for x in (given.q, given.k, given.v)], dim=-1)
    by_token = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (given.q, given.k, given.v)]
    strided = [x.mT.contiguous().mT for x in (given.q, given.k, given.v)]
    for views in ([x.unflatten(2, (4, 16)).transpose(1, 2) for x in fused.split(64, dim=-1)], by_token, strided):
        leaves = [x.detach().requires_grad_() for x in views]
        options = {name: value for name, value in given.arguments().items() if name not in given.TRAINED}
        with using(backend):
            y = shifted_attention(*leaves, **options)
            y.backward(given.do.mT.contiguous().mT)
        torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6)
        for name, leaf in zip(given.TRAINED, leaves, strict=True):
            torch.testing.assert_close(leaf.grad, gradients[name], rtol=1e-6, atol=1e-6)


def test_no_tokens(backend):
    for batch, length in ((0, 5), (2, 0)):
        given = attention_inputs(batch, 4, 2, length, 16, group_size=G)
        y, gradients = run(given, backend)
        assert y.shape == given.q.shape and gradients["k"].shape == given.k.shape


# dropout


def kept_pairs(backend, given, dropout_p, seed):
    """The mask of a call: equal scores and one-hot values show every probability."""
    q, v = torch.zeros_like(given.q), torch.eye(given.q.shape[2]).expand_as(given.v)
    torch.manual_seed(seed)
    with using(backend):
        shown = shifted_attention(**{**given.arguments(), "q": q, "v": v}, dropout_p=dropout_p)
    return shown != 0


@pytest.mark.parametrize("pad", ["none", "packed"])
def test_dropout_thins_the_softmax_and_its_gradient_by_one_mask(backend, pad):
    dropout_p, length = 0.3, 2 * G + 2
    given = inputs_of("half", True, (2, 1), length, 3, pad, length)
    kept = kept_pairs(backend, given, dropout_p, seed=5)
    pairs = attended_pairs(given)
    assert not kept[~pairs].any()
    share = float(kept[pairs].double().mean())
    assert abs(share - (1 - dropout_p)) < 4 * (dropout_p * (1 - dropout_p) / int(pairs.sum())) ** 0.5
    assert not torch.equal(kept[:, 0][pairs[:, 0] & pairs[:, 1]], kept[:, 1][pairs[:, 0] & pairs[:, 1]])

    torch.manual_seed(5)
    y, gradients = run(given, backend, dropout_p=dropout_p)
    wide = given.to(torch.float64)
    k, v = (x.expand_as(wide.q) for x in (wide.k, wide.v))
    scores = (wide.q @ k.mT * length**-0.5).masked_fill(~pairs, float("-inf"))
    truth = (scores.softmax(-1) * kept / (1 - dropout_p)) @ v
    truth.backward(wide.do)
    torch.testing.assert_close(y.double(), truth, rtol=1e-5, atol=1e-5)
    for name, true in wide.gradients().items():
        torch.testing.assert_close(gradients[name].double(), true, rtol=1e-5, atol=1e-5)


def test_dropout_differs_between_calls_and_follows_the_seed(backend):
    given = attention_inputs(1, 2, 2, G, G, group_size=G)
    first, second = (kept_pairs(backend, given, 0.5, seed) for seed in (0, 1))
    assert not torch.equal(first, second)
    assert torch.equal(kept_pairs(backend, given, 0.5, 0), first)


def test_keys_without_a_query_head_have_no_gradient(backend):
    q, k, v = (torch.randn(1, heads, 8, 16, requires_grad=True) for heads in (0, 2, 2))
    with using(backend):
        shifted_attention(q, k, v, group_size=4).sum().backward()
    assert not k.grad.any() and not v.grad.any()


# cost


class Allocations(TorchDispatchMode):
    """Elements of every tensor that an operation makes, by storage; views and in-place results are not new."""

    def __init__(self, *known):
        super().__init__()
        self.known = {x.untyped_storage().data_ptr() for x in known}
        self.elements = {}
        # a storage that is freed may come back at the same address
        self.alive = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if isinstance(tensor, torch.Tensor) and tensor.numel():
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in self.known:
                    self.elements[storage.data_ptr()] = storage.nbytes() // tensor.element_size()
                    self.alive.append(storage)
        return made


@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
@pytest.mark.parametrize("options", [{}, {"sink_tokens": 5}, {"shift": 100, "shifted_heads": "half"}], ids=str)
def test_no_tensor_of_the_eager_path_is_as_large_as_length_by_group(options, dropout_p):
    length, group = 1024, 256
    given = attention_inputs(1, 4, 2, length, 16, group_size=group, **options).to(torch.float32)
    with using("eager"), Allocations() as seen:
        shifted_attention(**given.arguments(), dropout_p=dropout_p).backward(given.do)
    assert max(seen.elements.values()) <= given.q.numel() < length * group


def test_the_kernels_allocate_the_output_and_the_log_sum_exp_only(triton_interpreted):
    given = attention_inputs(1, 4, 2, 3 * G, 16, group_size=G, shift=10, shifted_heads="half", sink_tokens=2)
    fused = torch.cat([x.transpose(1, 2).flatten(2) for x in (given.q, given.k, given.v)], dim=-1)
    q, k, v = (x.unflatten(2, (-1, 16)).transpose(1, 2) for x in fused.split((64, 32, 32), dim=-1))
    options = {name: value for name, value in given.arguments().items() if name not in given.TRAINED}
    with using("triton"), Allocations(fused) as seen:
        shifted_attention(q, k, v, **options)
    assert sorted(seen.elements.values()) == [4 * 3 * G, given.q.numel()]


def test_saved_for_the_backward_are_the_inputs_the_output_and_the_log_sum_exp(backend):
    given = attention_inputs(1, 4, 2, 3 * G, 16, group_size=G).to(torch.float32)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x), using(backend):
        y = shifted_attention(**given.arguments())
    known = {x.data_ptr() for x in (given.q, given.k, given.v, y)}
    assert [tuple(x.shape) for x in saved if x.numel() and x.data_ptr() not in known] == [(1, 4, 3 * G)]


@pytest.mark.parametrize(("length", "shift"), [(4096, 0), (5120, 1024), (3000, 700)])
def test_tiles_visited_are_near_the_ideal(triton_interpreted, monkeypatch, length, shift):
    """At 128 x 64 with groups of 2048: no tile without a pair is visited, and few pairs that do not attend."""
    from hylorada_kernels.testing._builder import BUILDER

    monkeypatch.setattr(op.kernel, "chosen_tile", lambda *_: op.kernel.Tile(128, 64, 4, 1))
    visited, dot = [], BUILDER.create_dot

    def counted(a, b, *rest):
        visited.append((a.data.shape[0], b.data.shape[1]))
        return dot(a, b, *rest)

    monkeypatch.setattr(BUILDER, "create_dot", counted)
    given = attention_inputs(1, 1, 1, length, 16, group_size=2048, shift=shift, shifted_heads="all")
    with using("triton"):
        shifted_attention(**given.arguments())
    sizes = [shift, *[2048] * ((length - shift) // 2048), (length - shift) % 2048]
    with_pairs = sum(-(-min(start + 128, size) // 64) for size in sizes for start in range(0, size, 128))
    tiles = visited.count((128, 64))
    assert tiles == with_pairs
    if length % 1024 == 0:
        assert tiles * 128 * 64 <= 1.07 * sum(size * (size + 1) // 2 for size in sizes)


@pytest.fixture
def triton_interpreted():
    if not dispatch.HAS_TRITON or not interpreter.supported():
        pytest.skip(interpreter.requires_interpreter)
    testing.interpret()


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_runs_are_bit_identical(backend, dropout_p):
    given = inputs_of("half", True, (3, 1), 2 * G + 7, 4, "packed", 32, dtype=torch.bfloat16)
    results = []
    for _ in range(2):
        torch.manual_seed(0)
        results.append(run(given, backend, dropout_p=dropout_p))
    (y, gradients), (again, gradients_again) = results
    assert torch.equal(y, again)
    assert all(torch.equal(gradients[name], gradients_again[name]) for name in gradients)


# integration


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize(
    "case", [("half", True, (3, 1), 2, "none"), ("all", False, (2, 2), 7, "packed"), ("none", True, (2, 1), 0, "right")]
)
def test_gradcheck(case, dropout_p):
    mode, causal, heads, sinks, pad = case
    given = attention_inputs(
        2 if pad == "right" else 1, *heads, 11, 3, dtype=torch.float64, group_size=4, shift=0 if mode == "none" else 2,
        shifted_heads=mode, causal=causal, sink_tokens=sinks, lengths=[11, 6] if pad == "right" else None,
        documents=[8, 3] if pad == "packed" else None,
    ).to(torch.float64)  # fmt: skip
    options = {name: value for name, value in given.arguments().items() if name not in given.TRAINED}

    def function(q, k, v):
        # one mask for all evaluations
        torch.manual_seed(0)
        return shifted_attention(q, k, v, **options, dropout_p=dropout_p)

    assert torch.autograd.gradcheck(function, (given.q, given.k, given.v))


def test_only_what_is_asked_for_gets_a_gradient(backend):
    given = attention_inputs(1, 4, 2, G + 3, 16, group_size=G, sink_tokens=2)
    _, expected = run(given, backend)
    options = {name: value for name, value in given.arguments().items() if name not in given.TRAINED}
    for name in given.TRAINED:
        leaves = {other: getattr(given, other).detach().clone() for other in given.TRAINED}
        leaves[name].requires_grad_()
        with using(backend):
            shifted_attention(**leaves, **options).backward(given.do)
        assert torch.equal(leaves[name].grad, expected[name])


def test_an_output_edited_in_place_is_refused_by_the_backward(backend):
    given = attention_inputs(1, 2, 2, G, 16, group_size=G).to(torch.float32)
    with using(backend):
        y = shifted_attention(**given.arguments())
    with torch.no_grad():
        y.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_backward_keeps_the_backend_of_its_forward(backend, monkeypatch):
    given = attention_inputs(1, 2, 2, G, 16, group_size=G).to(torch.float32)
    with using(backend):
        y = shifted_attention(**given.arguments())
    called, implementation = [], op._implementation
    monkeypatch.setattr(op, "_implementation", lambda choice: called.append(choice) or implementation(choice))
    y.backward(given.do)
    assert called == [backend]


def test_autocast_follows_sdpa(backend):
    given = attention_inputs(1, 2, 2, G + 3, 16, group_size=G).to(torch.float32)
    with torch.autocast(given.q.device.type, dtype=torch.bfloat16), using(backend):
        y = shifted_attention(**given.arguments())
        assert F.scaled_dot_product_attention(given.q, given.k, given.v).dtype == y.dtype == torch.bfloat16
    y.backward(given.do.bfloat16())
    expected, gradients = run(attention_inputs(1, 2, 2, G + 3, 16, group_size=G, dtype=torch.bfloat16), backend)
    assert torch.equal(y, expected)
    for name, gradient in given.gradients().items():
        assert gradient.dtype == torch.float32 and torch.equal(gradient, gradients[name].float())


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
@pytest.mark.parametrize("pad", ["none", "right", "packed"])
def test_the_registered_ops_keep_their_contract(backend, pad, dropout_p):
    """torch.library.opcheck: schema, fake tensors, no aliasing; of one call for everything too."""
    for mode, length in (("half", G + 3), ("none", 2 * G)):
        given = inputs_of(mode, True, (4, 4), length, 0, pad, 16)
        options = (G, given.shift, mode, True, 0, 0.25, dropout_p, backend)
        arguments = (given.q, given.k, given.v, given.lengths, given.cu_seqlens)
        checks = ("test_schema", "test_faketensor")
        seed = torch.tensor([5]) if dropout_p else None
        call = (*arguments, seed, *options)
        torch.library.opcheck(torch.ops.hylorada.shifted_attention, call, test_utils=checks)
        saved = (*torch.ops.hylorada.shifted_attention(*call), seed)
        torch.library.opcheck(
            torch.ops.hylorada.shifted_attention_backward, (given.do, *arguments, *saved, *options), test_utils=checks
        )


@pytest.mark.parametrize("pad", ["none", "right", "packed"])
def test_compiles_into_one_graph(backend, pad):
    given = inputs_of("half", True, (4, 2), 2 * G + 3, 2, pad, 16)
    expected, gradients = run(given, backend)
    leaves = given.to(torch.float32)
    options = {name: value for name, value in leaves.arguments().items() if name not in leaves.TRAINED}

    @torch.compile(fullgraph=True, backend="aot_eager")
    def function(q, k, v):
        return shifted_attention(2 * q, k, v, **options) * 0.5

    leaves.q = (given.q / 2).requires_grad_()
    with using(backend):
        y = function(leaves.q, leaves.k, leaves.v)
        (2 * y).backward(given.do)
    torch.testing.assert_close(2 * y, expected)
    torch.testing.assert_close(leaves.q.grad / 2, gradients["q"])
    torch.testing.assert_close(leaves.k.grad, gradients["k"])


def test_fake_cuda_tensors_take_the_kernels():
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        q, k = torch.empty(1, 4, 100, 16, device="cuda"), torch.empty(1, 2, 100, 16, device="cuda")
        y = shifted_attention(q, k, k, group_size=G, dropout_p=0.1)
    assert y.shape == q.shape and y.stride() == (6400, 16, 64, 1) and y.device.type == "cuda"


BAD = {
    "three dims": ({"q": torch.zeros(4, 6, 8)}, ValueError, r"q must be \(batch, heads, length, head dim\)"),
    "integers": ({"q": torch.zeros(1, 4, 6, 8, dtype=torch.int32)}, TypeError, "q must be floating point"),
    "another length": ({"k": torch.zeros(1, 2, 5, 8)}, ValueError, r"must both be \(1, kv heads, 6, 8\)"),
    "heads that do not divide": (
        {"k": torch.zeros(1, 3, 6, 8), "v": torch.zeros(1, 3, 6, 8)}, ValueError, "4 heads of q .* multiple of the 3",
    ),
    "two dtypes": ({"k": torch.zeros(1, 2, 6, 8, dtype=torch.float16)}, TypeError, "must have one dtype"),
    "two devices": ({"v": torch.zeros(1, 2, 6, 8, device="meta")}, ValueError, "move them to one device"),
    "no group": ({"group_size": 0}, ValueError, "group_size must be at least 1, got 0"),
    "shift of a group": ({"shift": 4, "shifted_heads": "all"}, ValueError, r"shift must be in \[0, 4\)"),
    "negative shift": ({"shift": -1, "shifted_heads": "all"}, ValueError, r"shift must be in \[0, 4\)"),
    "shift of no head": ({"shift": 2}, ValueError, 'shifted_heads is "none"'),
    "unknown heads": ({"shifted_heads": "odd"}, ValueError, "shifted_heads must be one of"),
    "half of one head": (
        {"q": torch.zeros(1, 1, 6, 8), "k": torch.zeros(1, 1, 6, 8), "v": torch.zeros(1, 1, 6, 8),
         "shifted_heads": "half", "shift": 2}, ValueError, 'q has 1 head',
    ),
    "negative sinks": ({"sink_tokens": -1}, ValueError, "sink_tokens must be at least 0, got -1"),
    "dropout of 1": ({"dropout_p": 1.0}, ValueError, r"dropout_p must be in \[0, 1\)"),
    "lengths and documents": (
        {"lengths": torch.tensor([6]), "cu_seqlens": torch.tensor([0, 6])}, ValueError, "give one of them",
    ),
    "lengths of another batch": ({"lengths": torch.tensor([6, 6])}, ValueError, r"lengths must have shape \(1,\)"),
    "lengths of floats": ({"lengths": torch.tensor([6.0])}, TypeError, "lengths must be int32 or int64"),
    "a length too long": ({"lengths": torch.tensor([7])}, ValueError, r"lengths must be in \[0, 6\], got \[7\]"),
    "documents in a batch": (
        {name: torch.zeros(2, 4, 6, 8) for name in ("q", "k", "v")} | {"cu_seqlens": torch.tensor([0, 6])},
        ValueError, "needs one packed row, got a batch of 2",
    ),
    "documents that descend": ({"cu_seqlens": torch.tensor([0, 4, 3, 6])}, ValueError, "must rise from 0 to 6"),
    "documents that end early": ({"cu_seqlens": torch.tensor([0, 4])}, ValueError, "must rise from 0 to 6"),
    "no documents": ({"cu_seqlens": torch.zeros(0, dtype=torch.int64)}, ValueError, r"shape \(documents \+ 1,\)"),
    "fp64 in Triton": (
        {name: torch.zeros(1, 2, 6, 8, dtype=torch.float64) for name in ("q", "k", "v")} | {"backend": "triton"},
        RuntimeError, "not torch.float64",
    ),
    "a head dim too large": (
        {name: torch.zeros(1, 2, 6, 257) for name in ("q", "k", "v")} | {"backend": "triton"},
        ValueError, "head dims up to 256, got 257",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case, request):
    changes, error, message = BAD[case]
    good = {"q": torch.zeros(1, 4, 6, 8), "k": torch.zeros(1, 2, 6, 8), "v": torch.zeros(1, 2, 6, 8), "group_size": 4}
    given = {**good, **changes}
    backend = given.pop("backend", "eager")
    if backend == "triton":
        request.getfixturevalue("triton_interpreted")
    with using(backend):
        shifted_attention(**good)
        with pytest.raises(error, match=message):
            shifted_attention(**given)


# mutants: what the tests above would not let pass

EAGER = {
    "the shift is dropped": ("(half, heads, shift)]", "(half, heads, 0)]"),
    "the prefix is dropped": ("        yield 0, 1, start\n", "        yield 0, 1, start - 1\n"),
    "the mask is dropped": ("_fused(_after_zeros(q, dummies), k, v, 0.0, causal,", "_fused(q, k, v, 0.0, False,"),
    "the sinks are dropped in the backward": ("part.sum(1, dtype=target.dtype)", "0 * part.sum(1)"),
    "a head takes another's keys": ("slice(first, last)\n", "slice(0, last - first)\n"),
    "the scale is dropped in the backward": ("lse, 0.0, causal, scale=scale)", "lse, 0.0, causal)"),
}
KERNEL = {
    "the shift is dropped": ("offset = tl.where(head < first_shifted, 0, shift)", "offset = 0 * head"),
    "the diagonal is not masked": ("seen = seen & (o_k[None, :] <= o_q[:, None])", "seen = seen"),
    "the diagonal is not masked for dk": ("seen = o_k[:, None] <= o_q[None, :]\n", "seen = o_k[:, None] >= 0\n"),
    "shared keys have one offset": ("own_offset = tl.where(head < first_shifted, 0, shift)", "own_offset = 0"),
    "the sinks are counted twice": ("((o_k < lo) | (o_k >= hi))", "(o_k >= 0)"),
    "the sinks miss a split": ("for _ in range(0, splits):", "for _ in range(0, splits - 1):"),
    "padding is attended": ("m_k = o_k < hi\n    if SINK:", "m_k = o_k < hi + 1\n    if SINK:"),
    "delta is dropped": ("ds = p * (dp - delta[None, :])", "ds = p * dp"),
    "lse is not rescaled": ("peak + tl.log2(", "0 * peak + tl.log2("),
    "a group reaches into the next": ("tl.where(in_prefix, offset, lo + G), written", "lo + G + 1, written"),
}  # fmt: skip


def assert_all_parity(backend):
    for mode, heads, pad in (("half", (3, 1), "right"), ("half", (4, 2), "packed"), ("all", (2, 2), "none")):
        assert_parity(inputs_of(mode, True, heads, 6 * G, 3, pad, 16, scale=0.4), backend)
    assert_parity(inputs_of("half", False, (3, 1), 2 * G + 7, 30, "right", 16), backend)


@pytest.mark.parametrize("mutation", EAGER)
def test_a_mutant_of_the_eager_path_fails(mutation, monkeypatch, tmp_path):
    monkeypatch.setattr(op, "eager", mutant_of(eager, *EAGER[mutation], tmp_path))
    with pytest.raises((AssertionError, RuntimeError), match=r"exceeds the budget|not finite|size"):
        assert_all_parity("eager")


@pytest.mark.parametrize("mutation", KERNEL)
def test_a_mutant_of_the_kernels_fails(mutation, monkeypatch, tmp_path, triton_interpreted):
    monkeypatch.setattr(op, "kernel", mutant_of(op.kernel, *KERNEL[mutation], tmp_path))
    with pytest.raises((AssertionError, interpreter.OutOfBounds, interpreter.Race)):
        assert_all_parity("triton")


def test_the_originals_pass(backend):
    assert_all_parity(backend)
