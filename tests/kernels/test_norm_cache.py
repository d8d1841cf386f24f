"""The cached norm: one for each change of the factors, and never a stale one, however they are changed."""

import contextlib
import copy
import threading

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from hylorada_kernels import HybridLinear, column_norm, norm_cache, using
from hylorada_kernels.layer_cache import refresh
from hylorada_kernels.ops.column_norm import eager
from hylorada_kernels.ops.hybrid_linear import eager as linear_eager
from hylorada_kernels.testing import interpreter, relative_error


@pytest.fixture(autouse=True)
def on_either_backend(backend):
    with using(backend):
        yield


@pytest.fixture
def norms_made(backend, monkeypatch):
    """norms_made() counts the norms computed since the test began; a kernel that finds its norm reads no W."""
    made = []
    make = eager.norms_and_bases

    def counted(weights, *rest, **options):
        made.extend(weights)
        return make(weights, *rest, **options)

    monkeypatch.setattr(eager, "norms_and_bases", counted)
    if backend == "eager":
        yield lambda: len(made)
    else:
        with interpreter.traffic() as log:
            yield lambda: sum(
                launch.kernel == "column_norm_kernel" and launch.arguments["weight_ptr"].read > 0 for launch in log
            )


def layer_and_input(dtype=torch.float32, **options):
    torch.manual_seed(0)
    layer = HybridLinear.from_linear(nn.Linear(24, 16, bias=False).to(dtype), rank=4, **options)
    with torch.no_grad():
        layer.lora_b.normal_(std=0.3)
        layer.magnitude.mul_(torch.linspace(0.5, 1.5, 16))
    return layer, torch.randn(5, 24, dtype=dtype)


def uncached(layer, x):
    fresh = copy.deepcopy(layer)
    fresh.invalidate_norm()
    return fresh(x)


def foreach_adamw(layer, x):
    optimizer_step(layer, x, torch.optim.AdamW, foreach=True)


def fused_adamw(layer, x):
    optimizer_step(layer, x, torch.optim.AdamW, fused=True)


def looped_sgd(layer, x):
    optimizer_step(layer, x, torch.optim.SGD, foreach=False)


def optimizer_step(layer, x, kind, **options):
    optimizer = kind([p for p in layer.parameters() if p.requires_grad], lr=0.1, **options)
    layer(x).square().sum().backward()
    optimizer.step()


def write_through_data(layer, x):
    layer.lora_b.data.add_(0.1)


def write_through_numpy(layer, x):
    layer.lora_a.detach().numpy()[1] += 0.5


def write_one_element_through_numpy(layer, x):
    layer.lora_b.detach().numpy()[3, 2] += 0.01


def write_through_a_flat_buffer(layer, x):
    flat = torch.cat([layer.lora_a.data.flatten(), layer.lora_b.data.flatten()])
    split = layer.lora_a.numel()
    layer.lora_a.data = flat[:split].view_as(layer.lora_a)
    layer.lora_b.data = flat[split:].view_as(layer.lora_b)
    layer(x)
    flat.mul_(1.5)


def replace_data(layer, x):
    layer.lora_a.data = layer.lora_a.data * 2


def vector_to_parameters(layer, x):
    trained = [layer.lora_a, layer.lora_b]
    nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(trained) * 1.5, trained)


def load_state_dict(layer, x):
    layer.load_state_dict({name: tensor * 1.5 for name, tensor in layer.state_dict().items()})


def load_state_dict_by_assignment(layer, x):
    layer.load_state_dict({name: tensor * 1.5 for name, tensor in layer.state_dict().items()}, assign=True)


def swap_tensors(layer, x):
    torch.utils.swap_tensors(layer.lora_b, nn.Parameter(layer.lora_b.detach() * 2))


def another_scale(layer, x):
    layer.scale *= 2


def another_weight_through_data(layer, x):
    layer.weight.data.mul_(1.5)


def prune_half_of_the_inputs(layer, x):
    layer.weight.data[:, 1::2] = 0


def merge_and_unmerge(layer, x):
    layer.merge()
    layer.unmerge()
    layer.lora_b.data.mul_(2)


def permute_the_rows_of_b(layer, x):
    layer.lora_b.data.copy_(layer.lora_b.data.flip(0))


def another_magnitude_through_data(layer, x):
    layer.magnitude.data[3] *= 1.5


def another_blend_through_numpy(layer, x):
    layer.residual_weight.detach().numpy()[0] += 1.0


def swap_two_rows_of_one_norm(layer, x):
    """Nothing changes but the weight: the kept norm still holds, a kept scaled weight does not."""
    with torch.no_grad():
        layer.lora_b[:2] = 0
        layer.weight[1] = layer.weight[0].flip(0)
        layer.magnitude[:2] = layer.magnitude[0]
    layer(x)
    with torch.no_grad():
        layer.weight[:2] = layer.weight[:2].flip(0)


def another_dtype_of_the_magnitude(layer, x):
    layer.magnitude.data = layer.magnitude.data.bfloat16()


def turn_b_where_the_norm_stays(layer, x):
    with torch.no_grad():
        layer.weight[:2] = 0
    layer(x)
    layer.lora_b.data[:2] *= -1


def turn_b_before_a_compiled_call(layer, x):
    """A compiled call brings the kept norm up to date, which has not changed: B has."""
    turn_b_where_the_norm_stays(layer, x)
    kept, (choice, *_), step = layer._cache.norms._state
    norm_cache._norm_op(kept, layer._base(), layer.lora_a, layer.lora_b, layer.scale, choice, step)


def edit_under_no_grad(layer, x):
    with torch.no_grad():
        layer.lora_a[0] *= 3


EVENTS = [
    looped_sgd, foreach_adamw, fused_adamw, write_through_data, write_through_numpy, write_one_element_through_numpy,
    write_through_a_flat_buffer, replace_data, vector_to_parameters, load_state_dict, load_state_dict_by_assignment,
    swap_tensors, another_scale, another_weight_through_data, prune_half_of_the_inputs, merge_and_unmerge,
    permute_the_rows_of_b, edit_under_no_grad, another_magnitude_through_data, another_blend_through_numpy,
    swap_two_rows_of_one_norm, another_dtype_of_the_magnitude, turn_b_before_a_compiled_call,
    turn_b_where_the_norm_stays,
]  # fmt: skip


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: event.__name__)
@pytest.mark.parametrize("is_refreshed", [False, True])
@pytest.mark.parametrize("keep_scaled_weight", [False, True])
def test_no_change_goes_unnoticed(event, keep_scaled_weight, is_refreshed):
    layer, x = layer_and_input(keep_scaled_weight=keep_scaled_weight)
    before = layer(x).detach()
    event(layer, x)
    if is_refreshed:
        refresh(layer)
    after = layer(x)
    assert not torch.equal(after, before)
    assert torch.equal(after, uncached(layer, x))


def several_layers(backend):
    """Layers that differ in all that a layer may differ in and have run once; what they keep is stale."""
    torch.manual_seed(0)
    linears = {
        "plain": (nn.Linear(24, 16), {}),
        "low precision": (nn.Linear(24, 40).bfloat16(), {}),
        "another width": (nn.Linear(16, 40).bfloat16(), {}),
        "another rank": (nn.Linear(24, 16), {"rank": 2}),
        "another dtype": (nn.Linear(24, 16).to(torch.float64 if backend == "eager" else torch.float16), {}),
        "odd sizes": (nn.Linear(13, 33).bfloat16(), {"rank": 5}),
        "odd sizes again": (nn.Linear(13, 33).bfloat16(), {"rank": 5}),
        "odd sizes, another scale": (nn.Linear(13, 33).bfloat16(), {"rank": 5, "alpha": 3.0}),
        "no blend": (nn.Linear(24, 70, bias=False), {"use_blend": False}),
        "plain but for the blend": (nn.Linear(24, 16), {"use_blend": False}),
        "no magnitude": (nn.Linear(24, 16), {"use_magnitude": False}),
        "rows with gaps": (nn.Linear(24, 130), {}),
        "a scaled weight": (nn.Linear(24, 16).bfloat16(), {"keep_scaled_weight": True}),
        "its norm has a gradient": (nn.Linear(24, 16), {"norm_grad": True}),
        "a gain of zero": (nn.Linear(24, 16), {}),
        "a row of zeros": (nn.Linear(24, 16), {}),
        "rows that cancel": (nn.Linear(24, 16), {}),
        "not a number": (nn.Linear(24, 16), {}),
        "shares the first one's factors": (nn.Linear(24, 16), {}),
    }
    layers = nn.ModuleDict()
    for name, (linear, options) in linears.items():
        layers[name] = HybridLinear.from_linear(linear, **({"rank": 4} | options))
    layers["rows with gaps"].weight.data = torch.randn(130, 30)[:, :24]
    with torch.no_grad():
        for place, layer in enumerate(layers.values()):
            layer(torch.zeros(1, layer.in_features, dtype=layer.weight.dtype))
            layer.lora_b.normal_(std=0.3)
            if layer.magnitude is not None:
                layer.magnitude.mul_(torch.linspace(0.5, 1.5, layer.out_features))
            if layer.residual_weight is not None:
                layer.residual_weight.fill_(1.7 * place - 9.3)
        layers["a gain of zero"].magnitude[3] = 0.0
        layers["a row of zeros"].weight[2] = 0.0
        layers["a row of zeros"].lora_b[2] = 0.0
        cancelling = layers["rows that cancel"]
        cancelling.weight[:5] = -(1 + 1e-6) * cancelling.scale * (cancelling.lora_b @ cancelling.lora_a)[:5]
        layers["not a number"].lora_a[1, 2] = torch.nan
    shared = layers["shares the first one's factors"]
    shared.lora_a, shared.lora_b = layers["plain"].lora_a, layers["plain"].lora_b
    return layers


def results_of(layers):
    """Outputs and gradients of every layer, by name."""
    results = {}
    for name, layer in layers.items():
        x = torch.linspace(-1, 1, 5 * layer.in_features, dtype=layer.weight.dtype).view(5, -1).requires_grad_()
        trained = [parameter for parameter in layer.parameters() if parameter.requires_grad]
        y = layer(x)
        results[name] = [y, *torch.autograd.grad(y.square().sum(), [x, *trained])]
    return results


def test_layers_refreshed_together_have_the_bits_that_each_would_have_made(backend, norms_made):
    together, alone = several_layers(backend), several_layers(backend)
    one_by_one = norms_made()
    expected = results_of(alone)
    one_by_one = norms_made() - one_by_one
    before = norms_made()
    refresh(together)
    refreshed = norms_made() - before
    found = results_of(together)
    # one has a gradient: it is made in the forward alone; one is not a number, which is not found to be the same
    assert refreshed == (one_by_one - 1 if backend == "eager" else 0)
    assert norms_made() - before == one_by_one + (backend == "eager")
    for name, tensors in expected.items():
        for tensor, other in zip(found[name], tensors, strict=True):
            torch.testing.assert_close(tensor, other, rtol=0, atol=0, equal_nan=True, msg=name)


def test_a_refresh_makes_what_is_stale_where_the_first_is(backend, norms_made):
    layers, x = nn.ModuleList(layer_and_input()[0] for _ in range(3)), layer_and_input()[1]
    for layer in layers:
        layer(x)
        layer.lora_b.data.mul_(2)
    refresh(layers)
    gains = [layer._cache._kept for layer in layers]
    assert (None not in gains) == (backend == "eager")
    for layer, gain in zip(layers, gains, strict=True):
        layer(x)
        assert layer._cache._kept is gain
    before = norms_made()
    layers[1].lora_b.data.mul_(2)
    refresh(layers)
    assert norms_made() == before
    layers[0].lora_b.data.mul_(2)
    refresh(layers)
    refresh(layers)
    assert norms_made() == before + (2 if backend == "eager" else 0)


def test_a_refresh_in_inference_mode_leaves_training_as_it_was():
    layer, x = layer_and_input()
    with torch.inference_mode():
        refresh(layer)
        layer(x)
    refresh(layer)
    layer(x).sum().backward()
    assert layer.lora_a.grad is not None


@pytest.mark.parametrize(
    ("call", "module", "name"),
    [
        ("refresh", eager, "norms_and_bases"),
        ("refresh", norm_cache, "_end"),
        ("refresh", norm_cache, "Fresh"),
        ("refresh", linear_eager, "gain_of"),
        ("forward", eager, "norms_and_bases"),
        ("forward", norm_cache, "_end"),
        ("forward", linear_eager, "gain_of"),
    ],
)
def test_an_interrupted_norm_leaves_nothing_that_is_stale(backend, monkeypatch, call, module, name):
    layer, x = layer_and_input()
    layer(x)
    layer.lora_b.data.mul_(2)

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    with (
        monkeypatch.context() as patch,
        pytest.raises(KeyboardInterrupt) if backend == "eager" else contextlib.nullcontext(),
    ):
        patch.setattr(module, name, interrupt)
        refresh(layer) if call == "refresh" else layer(x)
    assert torch.equal(layer(x), uncached(layer, x))


@pytest.mark.parametrize("name", ["weight", "lora_a", "lora_b", "magnitude", "residual_weight"])
def test_tensors_that_are_not_there_are_left_alone(norms_made, name):
    """As a sharded layer's parameters are outside of its forward: flat, or without their storage."""
    layer, x = layer_and_input()
    layer(x)
    layer.lora_b.data.mul_(2)
    before, parameter = norms_made(), getattr(layer, name)
    whole = parameter.detach().clone()
    parameter.untyped_storage().resize_(0)
    refresh(layer)
    parameter.data = torch.empty(0)
    refresh(layer)
    assert norms_made() == before
    parameter.data = whole
    assert torch.equal(layer(x), uncached(layer, x))


def test_layers_that_run_compiled_are_left_alone(norms_made):
    layer, x = layer_and_input()
    torch.compile(layer, backend="aot_eager", fullgraph=True)(x)
    layer.lora_b.data.mul_(2)
    before = norms_made()
    refresh(layer)
    assert norms_made() == before and layer._cache._kept is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("other", [torch.float16, torch.bfloat16], ids=str)
def test_any_dtype_of_the_magnitude_works_under_autocast(dtype, other):
    layers, x = nn.ModuleList(layer_and_input()[0] for _ in range(2)), layer_and_input()[1]
    for layer in layers:
        for parameter in (layer.magnitude, layer.residual_weight):
            parameter.data = parameter.data.to(dtype)
    with torch.autocast("cpu", dtype=other):
        before = [layer(x) for layer in layers]
        for layer in layers:
            layer.lora_b.data.mul_(2)
        refresh(layers)
        for layer, y in zip(layers, before, strict=True):
            assert not torch.equal(layer(x), y)
            assert torch.equal(layer(x), uncached(layer, x))


def test_a_layer_whose_magnitude_was_taken_away_is_left_alone():
    layer, x = layer_and_input(use_blend=False)
    layer(x)
    layer.magnitude = None
    layer.lora_b.data.mul_(2)
    refresh(layer)
    assert torch.equal(layer(x), uncached(layer, x))


def test_an_edit_in_the_open_that_misses_the_sample_is_noticed(backend):
    layer = HybridLinear.from_linear(nn.Linear(16, 4096, bias=False), 2)
    with using(backend):
        before = layer._norm().clone()
        numbers = torch.arange(4096).repeat_interleave(16).view(4096, 16)
        seen = norm_cache.sample_of(numbers, norm_cache.sample_step(layer.weight)).unique()
        missed = sorted(set(range(0, 4096, 8)) - set(seen.tolist()))
        assert len(missed) > 100
        with torch.no_grad():
            layer.weight[missed] *= 3
        changed = layer._norm() != before
        assert changed.nonzero().flatten().tolist() == missed


def test_factors_that_change_and_leave_the_norm_as_it_is_are_not_kept():
    layer, x = layer_and_input(torch.bfloat16)
    with torch.no_grad():
        layer.lora_b.zero_()
        layer(x)
        layer.lora_a.neg_()
    with torch.inference_mode():
        layer(x)
    fresh = copy.deepcopy(layer)
    for each in (layer, fresh):
        each(x).sum().backward()
    assert layer.lora_b.grad.abs().max() > 0 and torch.equal(layer.lora_b.grad, fresh.lora_b.grad)


def test_a_parameter_that_was_replaced_by_its_equal_is_forgotten():
    layer, x = layer_and_input()
    layer(x)
    replaced = layer.lora_a
    layer.lora_a = nn.Parameter(replaced.detach().clone())
    expected = layer(x).detach()
    with torch.no_grad():
        replaced.mul_(2)
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("keep_scaled_weight", [False, True])
def test_what_is_kept_serves_autocast(keep_scaled_weight):
    layer, x = layer_and_input(keep_scaled_weight=keep_scaled_weight)
    plain = copy.deepcopy(layer)
    plain.norm_grad, results = True, []
    for each in (layer, plain):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = each(x)
        y.float().square().sum().backward()
        results.append([y, each.magnitude.grad, each.residual_weight.grad])
    for kept, made_anew in zip(*results, strict=True):
        assert kept.dtype == made_anew.dtype
        assert relative_error(kept, made_anew.double()) < (2.0**-7 if keep_scaled_weight else 2.0**-8)


@pytest.mark.parametrize("other", [1.0, torch.nan])
def test_a_gain_of_zero_is_seen_where_the_gain_is_kept(other):
    layer, x = layer_and_input(use_blend=False)
    with torch.no_grad():
        layer.magnitude[3] = 0.0
        layer.magnitude[5] = other
    layer(x).sum().backward()
    z = x @ (layer.weight + layer.scale * layer.lora_b @ layer.lora_a)[3].detach()
    assert layer.magnitude.grad[3].item() == pytest.approx((z.sum() / layer._norm()[3]).item(), rel=1e-4)


def test_the_scaled_weight_is_made_when_it_is_asked_for(backend):
    layer, x = layer_and_input()
    layer(x)
    layer.keep_scaled_weight = True
    layer(x)
    kept = layer._cache._kept
    assert kept is None if backend == "triton" else kept.gain.scaled is not None


def test_replicas_of_data_parallel_share_nothing_that_is_kept():
    layer, x = layer_and_input()
    expected = layer(x)
    kept = [tensor.clone() for tensor in layer._cache.norms._state[0]]
    replica = layer._replicate_for_data_parallel()
    for name, parameter in layer.named_parameters():
        replica._parameters[name] = nn.Parameter(2 * parameter, parameter.requires_grad)
    assert not torch.allclose(replica(x), expected)
    assert all(map(torch.equal, layer._cache.norms._state[0], kept)) and torch.equal(layer(x), expected)


@pytest.mark.parametrize("is_contiguous", [True, False])
@pytest.mark.parametrize("shape", [(256, 256), (1024, 2048), (4096, 512)], ids=str)
def test_a_sample_of_the_weight_visits_every_column(shape, is_contiguous):
    rows, columns = shape
    weight = torch.arange(columns).float().expand(rows, columns)
    weight = weight.contiguous() if is_contiguous else weight.T.contiguous().T
    seen = norm_cache.sample_of(weight, norm_cache.sample_step(weight)).unique()
    assert len(seen) >= min(columns, norm_cache.WEIGHT_SAMPLES // 2)


def test_a_forward_in_inference_mode_leaves_training_as_it_was():
    layer, x = layer_and_input()
    with torch.inference_mode():
        layer(x)
    layer(x).sum().backward()
    assert layer.lora_a.grad is not None


def test_a_base_made_in_inference_mode_works():
    with torch.inference_mode():
        layer, x = layer_and_input()
        assert torch.equal(layer(x), layer(x))


def test_another_dtype_is_noticed():
    layer, x = layer_and_input()
    layer(x)
    layer.to(torch.bfloat16)
    assert torch.equal(layer(x.bfloat16()), uncached(layer, x.bfloat16()))


def test_one_norm_serves_all_forwards_until_a_step(norms_made):
    layer, x = layer_and_input()
    layer(x)
    before = norms_made()
    optimizer = torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad], lr=0.1, fused=True)
    for step in range(3):
        for _ in range(8):
            layer(x).square().sum().backward()
        assert norms_made() == before + step
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_and_accumulation_give_the_bits_of_an_uncached_run_with_one_norm(norms_made, use_reentrant):
    layer, x = layer_and_input()
    x.requires_grad_()
    fresh = copy.deepcopy(layer)
    before = norms_made()
    for _ in range(3):
        checkpoint(layer, x, use_reentrant=use_reentrant).square().sum().backward()
    assert norms_made() == before + 1
    for _ in range(3):
        fresh.invalidate_norm()
        fresh(x).square().sum().backward()
    for name, parameter in layer.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(parameter.grad, dict(fresh.named_parameters())[name].grad), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_scaled_weight_serves_all_forwards_until_a_step(backend, monkeypatch, dtype):
    made = []
    make = linear_eager.with_scaled_weight
    monkeypatch.setattr(linear_eager, "with_scaled_weight", lambda *args: made.append(1) or make(*args))
    layer, x = layer_and_input(dtype, keep_scaled_weight=True)
    plain = copy.deepcopy(layer)
    plain.keep_scaled_weight = False
    optimizer = torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad], lr=0.1)
    for step in range(2):
        for _ in range(3):
            checkpoint(layer, x, use_reentrant=False).square().sum().backward()
        # in Triton, where it would gain nothing, there is none
        assert len(made) == (step + 1 if backend == "eager" else 0)
        plain.load_state_dict(layer.state_dict())
        assert relative_error(layer(x), plain(x).double()) < 4 * torch.finfo(dtype).eps
        optimizer.step()
        optimizer.zero_grad()


def test_a_graph_keeps_the_scaled_weight_that_it_was_made_with():
    layer, x = layer_and_input(keep_scaled_weight=True)
    x.requires_grad_()
    expected = torch.autograd.grad(layer(x).sum(), x)[0]
    y = layer(x)
    layer.magnitude.data.mul_(2)
    layer(x)
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], expected)


def test_threads_that_share_a_cache_get_their_own_norms():
    weight = torch.randn(400, 300)
    given = [(torch.randn(8, 300), torch.randn(400, 8)) for _ in range(4)]
    cache, wrong = norm_cache.NormCache(), []

    def use(lora_a, lora_b):
        # in a new thread the choice is automatic: the eager path
        expected = column_norm(weight, lora_a, lora_b, scale=1.0)
        for _ in range(100):
            if not torch.equal(cache.norm(weight, lora_a, lora_b, 1.0), expected):
                wrong.append(threading.current_thread().name)

    threads = [threading.Thread(target=use, args=factors) for factors in given]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_norm_once_given_is_never_written_to():
    layer, x = layer_and_input()
    kept = layer._norm()
    given = layer._norm()
    layer.lora_b.data.mul_(2)
    assert torch.equal(given, kept) and not torch.equal(layer._norm(), kept)
    assert torch.equal(given, kept)
    # the first one after a call in inference mode, which leaves a kept norm and nothing that was given
    layer.invalidate_norm()
    layer._cache.norms._given = None
    with torch.inference_mode():
        layer._norm()
    given, kept = layer._norm(), layer._norm().clone()
    layer.lora_b.data.mul_(2)
    layer._norm()
    assert torch.equal(given, kept)
    layer(x)
    layer.lora_b.data.mul_(2)
    refresh(layer)
    given, kept = layer._norm(), layer._norm().clone()
    layer.lora_b.data.mul_(2)
    layer._norm()
    assert torch.equal(given, kept)
    fresh = HybridLinear.from_linear(nn.Linear(24, 16))
    assert fresh._norm().data_ptr() != fresh.magnitude.data_ptr()


def test_copies_do_not_share_a_norm():
    layer, x = layer_and_input()
    layer(x)
    twin = copy.deepcopy(layer)
    twin.lora_b.data.mul_(2)
    assert torch.equal(twin(x), uncached(twin, x))
    assert torch.equal(layer(x), uncached(layer, x))


def test_no_norm_is_kept_where_it_has_a_gradient(norms_made):
    layer, x = layer_and_input(norm_grad=True)
    before = norms_made()
    layer(x)
    layer(x)
    assert norms_made() == before + 2


def test_verifying_catches_a_stale_norm():
    layer, x = layer_and_input()
    layer(x)
    with norm_cache.verifying():
        layer(x)
        kept = layer._cache.norms._state[0][0] if layer._cache.norms._given is None else layer._cache.norms._given[1]
        kept.mul_(1.01)
        with pytest.raises(RuntimeError, match=r"stale by 1\.0e-02.*call invalidate_norm"):
            layer(x)
    layer.invalidate_norm()
    with norm_cache.verifying():
        assert torch.equal(layer(x), uncached(layer, x))


def test_a_change_of_backend_is_noticed(backend):
    layer, x = layer_and_input()
    layer, x = layer.to(torch.get_default_device()), x.to(torch.get_default_device())
    with using("eager"):
        expected = layer(x)
    with using(backend):
        torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
