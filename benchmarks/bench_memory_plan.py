"""The planned peak of a training step of SmolLM2-135M beside the measured one, on the CPU.

    pytest benchmarks/bench_memory_plan.py -n 0 --results benchmarks/results

"step" is what forward and backward take beyond what is there before them: weights, adapter, optimizer. It is measured
as the most that PyTorch's allocator handed out at one time. "process" is everything, measured as the largest resident
size of a process of its own during its second step, less that before the model was made; what a plan leaves out, as
workspaces of BLAS, is therefore in it. The process gives large blocks back to the system when they are freed: glibc
keeps fragments otherwise, which are no part of a plan either.
"""

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.memory import MIB, peak_bytes
from hylorada.baselines import get_baseline_model
from hylorada.evaluation import batch_loss_sum
from hylorada.peak_memory import peak_memory
from hylorada.plan import plan
from hylorada.pretrained import DTYPES, SMOLLM2, load_config

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SETTINGS = {
    "fp32": {"dtype": "fp32", "checkpointing": False},
    "fp32, checkpointed": {"dtype": "fp32", "checkpointing": True},
    "bf16": {"dtype": "bf16", "checkpointing": False},
}
WITHIN = 0.1
# bytes from which on a block is given back when it is freed; unset, glibc raises it as blocks are freed. A hidden state
# of 512 tokens in bf16 takes 576 KiB: a limit of 1 MiB would let its fragments stay
LARGE_BLOCK = 1 << 16


def measured_mib(length: int, dtype: str, checkpointing: bool) -> tuple[float, float]:
    """Of the process, and of the step alone."""
    x = torch.randn(256, 256, requires_grad=True, dtype=DTYPES[dtype])
    (x @ x).softmax(1).sum().backward()
    with peak_memory() as before:
        pass
    base = AutoModelForCausalLM.from_config(load_config(SMOLLM2), dtype=DTYPES[dtype])
    model = get_baseline_model("hylorada", base, gradient_checkpointing=checkpointing, lora_target_modules=TARGETS)
    model.train()
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad])
    batch = {"input_ids": torch.randint(0, 49152, (1, length))}

    def gradients() -> None:
        batch_loss_sum(model, batch)[0].backward()

    def step() -> None:
        gradients()
        optimizer.step()
        optimizer.zero_grad()

    step()
    with peak_memory() as during:
        step()
    return during.mib - before.mib, peak_bytes(gradients) / MIB


@pytest.mark.parametrize("length", [512, 2048, 4096])
@pytest.mark.parametrize("setting", SETTINGS)
def test_planned_beside_measured(benchmark, record, monkeypatch, setting, length):
    count = plan("smollm2-135m", length=length, lora_target_modules=TARGETS, **SETTINGS[setting]).footprint
    lasting = sum(size for name, size in count.lasting.items() if name != "gradients")
    planned = {"process": count.peak / MIB, "step": (count.peak - lasting) / MIB}
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", str(LARGE_BLOCK))
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
        process, step = fresh.submit(measured_mib, length, **SETTINGS[setting]).result()
    values = {}
    for name, measured in (("process", process), ("step", step)):
        values |= {
            f"{name}: planned, MiB": planned[name],
            f"{name}: measured, MiB": measured,
            f"{name}: planned / measured": planned[name] / measured,
        }
    record("planned memory", {"setting": setting, "tokens": length}, values)
    assert abs(planned["step"] / step - 1) <= WITHIN
    assert abs(planned["process"] / process - 1) <= WITHIN
    benchmark.pedantic(lambda: None)
