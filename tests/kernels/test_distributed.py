"""Data parallel and fully sharded training, two processes on the CPU: the same numbers as in one process."""

import time
import traceback
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import nn

from hylorada_kernels import HybridLinear, norm_cache
from hylorada_kernels.testing import relative_error

if not dist.is_available() or not dist.is_gloo_available():
    pytest.skip("needs torch.distributed with gloo", allow_module_level=True)

fully_shard = pytest.importorskip("torch.distributed.fsdp", reason="needs FSDP2").fully_shard

RANKS = 2
PATIENCE = 90.0
STEPS = 3
WIDTH = 16


class DecoderLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = HybridLinear.from_linear(nn.Linear(WIDTH, 2 * WIDTH), rank=4)
        self.down = HybridLinear.from_linear(nn.Linear(2 * WIDTH, WIDTH, bias=False), rank=4)

    def forward(self, x):
        return x + self.down(nn.functional.gelu(self.up(x)))


def decoder():
    """Layers away from their initial state; fp64, so that nothing but a mistake tells two runs apart."""
    torch.manual_seed(0)
    with torch.device("cpu"):
        layers = [DecoderLayer() for _ in range(2)]
    model = nn.Sequential(*layers).double()
    with torch.no_grad():
        for layer in layers:
            layer.up.lora_b.normal_(std=0.1)
            layer.down.lora_b.normal_(std=0.1)
    return model


def train(model, samples, **options):
    """Of every step the losses of two micro-batches, the gradients and the adapters; of the `samples` of the data."""
    generator = torch.Generator().manual_seed(1)
    data = torch.randn(STEPS, 2, 2 * RANKS, 5, WIDTH, generator=generator, dtype=torch.float64)[:, :, samples]
    trained = {name.removeprefix("module."): p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=0.05, **options)
    history = []
    for x, target in data:
        optimizer.zero_grad()
        found = {}
        for part, (inputs, wanted) in enumerate(zip(x.chunk(2), target.chunk(2), strict=True)):
            with norm_cache.verifying():
                loss = (model(inputs) - wanted).square().mean()
            loss.backward()
            found[f"loss {part}"] = loss.detach()
        found |= {f"gradient of {name}": whole(parameter.grad) for name, parameter in trained.items()}
        optimizer.step()
        history.append(found | {name: whole(parameter) for name, parameter in trained.items()})
    return history


def whole(tensor):
    tensor = tensor.detach()
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).clone()


def data_parallel(rank, options):
    model = nn.parallel.DistributedDataParallel(decoder(), find_unused_parameters=False)
    return train(model, slice(rank, None, RANKS), **options)


def fully_sharded(rank, options):
    model = decoder()
    mesh = dist.init_device_mesh("cpu", (RANKS,))
    for layer in model:
        fully_shard(layer, mesh=mesh)
    return train(fully_shard(model, mesh=mesh), slice(rank, None, RANKS), **options)


def in_processes(function, folder, options):
    """What function(rank, options) returns in each of RANKS processes; AssertionError if one fails or hangs."""
    context = torch.multiprocessing.get_context("spawn")
    processes = [
        context.Process(target=_run, args=(function, rank, folder, options), daemon=True) for rank in range(RANKS)
    ]
    deadline = time.monotonic() + PATIENCE
    try:
        for process in processes:
            process.start()
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
        failures = [path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.error"))]
        assert all(process.exitcode == 0 for process in processes), "\n".join(failures) or "no answer in time"
        return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
                process.join()


def _run(function, rank, folder, options):
    torch.set_num_threads(1)
    timeout = timedelta(seconds=PATIENCE / 2)
    try:
        dist.init_process_group("gloo", f"file://{folder}/rendezvous", timeout, world_size=RANKS, rank=rank)
        torch.save(function(rank, options), folder / f"{rank}.pt")
        dist.destroy_process_group()
    except Exception:
        (folder / f"{rank}.error").write_text(traceback.format_exc(), encoding="utf-8")
        raise


@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True}], ids=["fused", "foreach"])
@pytest.mark.parametrize("kind", [data_parallel, fully_sharded], ids=lambda kind: kind.__name__)
def test_two_processes_train_as_one_does_on_all_the_data(kind, options, tmp_path):
    """Every adapter gets its gradient, and no norm is stale, whichever optimizer moved the factors."""
    # the micro-batches of one process hold, sample for sample, what those of two hold together
    expected = train(decoder(), slice(None), **options)
    first, second = in_processes(kind, tmp_path, options)
    for step, (true, one, other) in enumerate(zip(expected, first, second, strict=True)):
        assert true.keys() == one.keys() == other.keys()
        for name, value in true.items():
            joint = (one[name] + other[name]) / 2
            assert relative_error(joint, value) <= 1e-10, (step, name)
            if "loss" not in name:
                assert torch.equal(one[name], other[name]), (step, name)


def test_a_process_that_fails_is_reported(tmp_path):
    with pytest.raises(AssertionError, match="unexpected keyword argument 'no_such_option'"):
        in_processes(data_parallel, tmp_path, {"no_such_option": True})
