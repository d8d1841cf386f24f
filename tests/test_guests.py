"""The packages as guests in other people's programs: they change nothing, share nothing and say things once."""

import subprocess
import sys
import threading
from pathlib import Path

import accelerate
import pytest
import torch
from torch import nn

from hylorada_kernels import HybridLinear, backend, using

ROOT = Path(__file__).parents[1]

NOTHING_CHANGES = """
import io, logging, sys, warnings
from contextlib import redirect_stderr, redirect_stdout

import torch, transformers
{before}

WATCHED = ("torch", "transformers", {watched})


def state():
    # what the modules that were there already hold, by identity: a lazily loaded submodule is no change
    found = {{}}
    for name, module in list(sys.modules.items()):
        if name in present and module is not None and name.partition(".")[0] in WATCHED:
            for attribute, value in list(vars(module).items()):
                found[name, attribute] = id(value)
                if isinstance(value, type):
                    members = {{key: member for key, member in vars(value).items() if callable(member)}}
                    found |= {{(name, attribute, key): id(member) for key, member in members.items()}}
    settings = (
        torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled(),
        torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark,
        torch.get_float32_matmul_precision(), torch.random.get_rng_state().tolist(), list(warnings.filters),
        logging.getLogger().level, list(logging.getLogger().handlers), logging.root.manager.disable,
    )
    return found, settings


present = set(sys.modules)
before, settings_before = state()
out, err = io.StringIO(), io.StringIO()
with redirect_stdout(out), redirect_stderr(err):
    import hylorada, hylorada.model, hylorada.trainer, hylorada.evaluation, hylorada.baselines, hylorada_kernels
    {imports}
after, settings_after = state()
changed = [key for key, value in before.items() if after.get(key) != value]
assert not changed, changed[:10]
assert settings_before == settings_after
assert out.getvalue() == err.getvalue() == "", (out.getvalue(), err.getvalue())
"""


def test_importing_changes_nothing_of_torch_transformers_and_peft():
    code = NOTHING_CHANGES.format(before="import peft", watched='"peft"', imports="import hylorada.integrations.peft")
    outcome = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert outcome.returncode == 0, outcome.stderr


def in_threads(functions):
    errors, barrier = [], threading.Barrier(len(functions))

    def run(function):
        try:
            barrier.wait()
            function()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(function,)) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors


def test_the_choice_of_a_backend_belongs_to_its_thread():
    x = torch.ones(1)

    def choose(name):
        def run():
            for _ in range(500):
                with using(name):
                    assert backend._requested.get() == name
                    if name == "eager":
                        assert backend.choose(x) == "eager"
                assert backend._requested.get() == backend._start

        return run

    in_threads([choose("eager"), choose("triton"), choose("auto"), choose("eager")])


def trained_layer(linear=None):
    torch.manual_seed(0)
    layer = HybridLinear.from_linear(linear or nn.Linear(20, 12), rank=4)
    with torch.no_grad():
        layer.lora_b.normal_(std=0.3)
        layer.magnitude.mul_(1.3)
    return layer


def test_layers_in_several_threads_do_not_disturb_one_another():
    layer, x = trained_layer(), torch.randn(3, 20)
    states = [layer.lora_b.detach().clone(), 2 * layer.lora_b.detach()]
    allowed = []
    for state in states:
        layer.lora_b.data.copy_(state)
        layer.invalidate_norm()
        allowed.append(layer(x).detach())
    layers = [trained_layer() for _ in range(3)]

    def call(own, state, expected):
        def run():
            for _ in range(100):
                own.lora_b.data.copy_(state)
                torch.testing.assert_close(own(x).detach(), expected)

        return run

    pairs = zip(layers, [0, 1, 0], strict=True)
    in_threads([call(own, states[i], allowed[i]) for own, i in pairs])


def test_hooks_see_what_goes_in_and_comes_out():
    layer, x, seen = trained_layer(), torch.randn(3, 20), []
    layer.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    layer.register_forward_hook(lambda module, args, output: seen.append(output.detach().clone()))
    layer.register_full_backward_hook(lambda module, before, after: seen.append(after[0].clone()))
    x.requires_grad_()
    y = layer(x)
    y.sum().backward()
    torch.testing.assert_close(seen[0], trained_layer()(2 * x.detach()).detach())
    torch.testing.assert_close(seen[1], torch.ones_like(y))
    assert x.grad is not None and x.grad.abs().sum() > 0


def test_an_output_in_inference_mode_is_the_output():
    layer, x = trained_layer(), torch.randn(3, 20)
    expected = layer(x).detach()
    with torch.inference_mode():
        assert torch.equal(layer(x), expected)
    layer(x).sum().backward()
    assert layer.lora_b.grad.abs().sum() > 0


def test_a_layer_on_the_meta_device_takes_its_state():
    source = trained_layer()
    with torch.device("meta"):
        layer = HybridLinear.from_linear(nn.Linear(20, 12), rank=4)
    layer.load_state_dict(source.state_dict(), assign=True)
    x = torch.randn(3, 20)
    torch.testing.assert_close(layer(x), source(x))


def test_layers_that_share_a_weight_keep_their_own_adapters():
    linear = nn.Linear(20, 12)
    first, second = trained_layer(linear), trained_layer(linear)
    with torch.no_grad():
        second.lora_b.mul_(-2)
    x = torch.randn(3, 20)
    expected = [layer(x).detach() for layer in (first, second)]
    for _ in range(2):
        assert all(torch.equal(layer(x), y) for layer, y in zip((first, second), expected, strict=True))
    assert first.weight is second.weight and not torch.equal(*expected)


def test_a_layer_that_is_pickled_for_another_process_computes_the_same(tmp_path):
    layer, x = trained_layer(), torch.randn(3, 20)
    expected = layer(x).detach()
    context = torch.multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        found = pool.apply(_call, (layer, x))
    assert torch.equal(found, expected)


def test_an_offloaded_layer_computes_the_same():
    model, x = nn.Sequential(nn.Linear(20, 20), trained_layer()), torch.randn(3, 20)
    expected = model(x).detach()
    offloaded = accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert offloaded[1].weight.is_meta
    # the weights come anew for every call
    assert torch.equal(offloaded(x), expected) and torch.equal(offloaded(x), expected)


def test_vmap_says_that_it_cannot_go_through_the_layer():
    with pytest.raises(RuntimeError, match="functorch transforms"):
        torch.vmap(trained_layer())(torch.randn(3, 20))


def _call(layer, x):
    torch.set_num_threads(1)
    return layer(x).detach().clone()
