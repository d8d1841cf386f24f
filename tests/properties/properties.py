"""Random cases of every op and of whole models, and what must hold for each, for the tests and for `fuzz.py`."""

import tempfile
from dataclasses import replace

import torch
from hypothesis import strategies as st

from hylorada import HyLoRADAModel
from hylorada_kernels import column_norm, using
from hylorada_kernels.ops.shifted_attention import shifted_attention
from hylorada_kernels.testing import LinearInputs, linear_inputs, reference_norm
from hylorada_kernels.testing.attention import attention_inputs
from tests.hylorada.conftest import build_base, build_model
from tests.hylorada.test_causality import assert_a_token_changes_nothing_before_it
from tests.hylorada.test_causality import cases as model_fields
from tests.kernels import attention_parity
from tests.kernels.parity import assert_parity, norm_error

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


@st.composite
def linear_cases(draw, dtypes=DTYPES, largest=16):
    """(inputs of hybrid_linear, its options) of any shape, layout and combination of parts."""
    tokens = draw(st.sampled_from([1, 2, 5, 9, (2, 3), (1, 1, 4), 0, (3, 0)]))
    columns, rows = draw(st.integers(1, largest)), draw(st.integers(1, largest))
    magnitude, dtype = draw(st.booleans()), draw(st.sampled_from(dtypes))
    # products with these leave the range in which fp16 has all of its digits
    tiny = [] if dtype == torch.float16 else [2.0**-10]
    given = linear_inputs(
        tokens, columns, rows, draw(st.sampled_from([1, 2, 3, 5, 8, 17])),
        dtype=dtype, magnitude=magnitude, blend=draw(st.booleans()), bias=draw(st.booleans()),
        token_scale=draw(st.booleans()), token_scale_target=draw(st.sampled_from(["output", "delta"])),
        scale=draw(st.sampled_from([0.7, 1.0, 16.0, *tiny])), seed=draw(st.integers(0, 2**32 - 1)),
    )  # fmt: skip
    for name in ("x", "weight", "lora_a", "lora_b", "dy"):
        setattr(given, name, draw(st.sampled_from(LAYOUTS))(getattr(given, name)))
    if magnitude:
        given.magnitude[:: draw(st.integers(1, 5))] *= draw(st.sampled_from([1.0, -1.0, 0.0, 2.0**8, *tiny]))
    if given.token_scale is not None:
        given.token_scale.reshape(-1)[:1] *= draw(st.sampled_from([1.0, 0.0, -1.0]))
    options = {"save_output": draw(st.booleans())}
    if magnitude:
        options["gives_norm"] = draw(st.booleans())
    return given, options


def _transposed(tensor):
    return tensor.transpose(-1, -2).contiguous().transpose(-1, -2) if tensor.dim() > 1 else tensor


def _every_other(tensor):
    return torch.stack([tensor, torch.full_like(tensor, float("nan"))], -1)[..., 0]


def _shifted(tensor):
    """At an odd address, between values that must not be read."""
    buffer = tensor.new_full((tensor.numel() + 2,), float("nan"))
    view = buffer[1:-1].view(tensor.shape)
    view.copy_(tensor)
    return view


LAYOUTS = [lambda tensor: tensor, _transposed, _every_other, _shifted]


def check_linear(given: LinearInputs, options: dict, backend: str = "eager", route: str = "fused") -> None:
    """Output and all gradients against the fp64 formula. route: of a call in Triton."""
    options = dict(options)
    if options.pop("gives_norm", False):
        options["norm"] = column_norm(given.weight, given.lora_a, given.lora_b, scale=given.scale)
    assert_parity(given, backend, route=route, drawn=True, **options)


def check_norm(given: LinearInputs, backend: str = "eager") -> None:
    """Every row's norm against the fp64 formula, row by row."""
    wide = given.map(torch.Tensor.double)
    truth = reference_norm(wide.weight, wide.lora_a, wide.lora_b, scale=given.scale)
    with using(backend):
        norm = column_norm(given.weight, given.lora_a, given.lora_b, scale=given.scale)
    wide_type = torch.promote_types(given.weight.dtype, torch.float32)
    assert norm.dtype == wide_type
    assert ((norm.double() - truth).abs() <= 2 * torch.finfo(wide_type).eps * norm_error(wide)).all(), (norm, truth)


@st.composite
def attention_cases(draw, dtypes=DTYPES, longest=24):
    """Inputs of shifted_attention: any lengths, padding, packing, shared heads, shifts, sinks, strides."""
    kv_heads = draw(st.integers(1, 3))
    heads = kv_heads * draw(st.integers(1, 3))
    length, group = draw(st.integers(1, longest)), draw(st.integers(1, 10))
    mode = draw(st.sampled_from(["none", "half", "all"] if heads > 1 else ["none", "all"]))
    batch, boundaries = draw(st.integers(1, 2)), {}
    padding = draw(st.sampled_from(["none", "lengths", "documents"]))
    if padding == "lengths":
        boundaries["lengths"] = draw(st.lists(st.integers(0, length), min_size=batch, max_size=batch))
    elif padding == "documents":
        batch = 1
        first = draw(st.integers(0, length))
        second = draw(st.integers(0, length - first))
        boundaries["documents"] = [first, second, length - first - second]
    given = attention_inputs(
        batch, heads, kv_heads, length, draw(st.sampled_from([1, 3, 8, 16])), group_size=group,
        dtype=draw(st.sampled_from(dtypes)), shift=0 if mode == "none" else draw(st.integers(0, group - 1)),
        shifted_heads=mode, causal=draw(st.booleans()), sink_tokens=draw(st.integers(0, 6)),
        seed=draw(st.integers(0, 2**32 - 1)), **boundaries,
    )  # fmt: skip
    for name in ("q", "k", "v", "do"):
        setattr(given, name, draw(st.sampled_from(LAYOUTS))(getattr(given, name)))
    return given


def check_attention(given, backend: str = "eager") -> None:
    """Output and gradients against the dense fp64 predicate; in a causal case nothing shows before a changed token."""
    attention_parity.assert_parity(given, backend, drawn=True)
    if given.causal and given.cu_seqlens is None:
        length = given.q.shape[2]
        start = length // 2
        # a copy may have other strides, for which the calls are cut otherwise: both runs are of copies
        copies = [replace(given, **{name: getattr(given, name).clone() for name in given.TRAINED}) for _ in range(2)]
        for name in given.TRAINED:
            getattr(copies[1], name)[:, :, start:] += 1
        with torch.no_grad(), using(backend):
            before, after = (shifted_attention(**copy.arguments()) for copy in copies)
        assert torch.equal(after[:, :, :start], before[:, :, :start]), "a later token shows"


WHAT = ["start", "causality", "merge", "save", "decode", "export"]


@st.composite
def model_cases(draw):
    """(what is checked, family, fields of the config, length, position)."""
    family, fields, length, position, training = draw(model_fields())
    return draw(st.sampled_from(WHAT)), family, fields, length, position, training


@torch.no_grad()
def check_model(case) -> None:
    """One of the equalities of a whole model, in a random combination of its parts."""
    what, family, fields, length, position, training = case
    fields = fields | {"max_sequence_length": 256}
    ids = torch.randint(3, 97, (2, 12), generator=torch.Generator().manual_seed(position))
    if what == "start":
        fields |= {"rope_scaling_type": None, "rope_scaling_factor": 1.0, "s2_eval": False}
        found = build_model(family, start=True, **fields)(ids).logits
        torch.testing.assert_close(found, build_base(family)(ids).logits, rtol=1e-5, atol=1e-5)
        return
    model = build_model(family, **fields)
    if what == "causality":
        assert_a_token_changes_nothing_before_it(model.train(training), length, position)
        return
    expected = model(ids).logits
    if what == "merge":
        weights = {name: weight.clone() for name, weight in model.named_parameters()}
        if fields["position_bias_enabled"] and fields["position_bias_target"] == "delta":
            try:
                model.merge_lora_weights()
            except RuntimeError as error:
                assert "position" in str(error)
            else:
                raise AssertionError("a position scale of the delta was merged away")
        else:
            model.merge_lora_weights()
            torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-5)
            model.unmerge_lora_weights()
        assert torch.equal(model(ids).logits, expected)
        assert all(torch.equal(weight, weights[name]) for name, weight in model.named_parameters())
    elif what == "save":
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            loaded = HyLoRADAModel.from_pretrained(build_base(family), folder)
        assert torch.equal(loaded(ids).logits, expected)
    elif what == "decode":
        # whole, then from a cache: all tokens but the last few, then one by one
        known = model(ids[:, :8], use_cache=True)
        steps = [known.logits]
        cache = known.past_key_values
        for i in range(8, 12):
            step = model(ids[:, i : i + 1], past_key_values=cache, use_cache=True)
            steps.append(step.logits)
            cache = step.past_key_values
        torch.testing.assert_close(torch.cat(steps, 1), expected, rtol=1e-4, atol=1e-5)
    else:
        from hylorada.integrations.peft_files import export_adapter, import_adapter

        with tempfile.TemporaryDirectory() as folder:
            export_adapter(model, folder)
            loaded = import_adapter(build_base(family), folder)
        assert torch.equal(loaded(ids).logits, expected)
