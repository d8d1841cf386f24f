"""The planned peak of a training step of SmolLM2-135M beside the measured one, on the CPU.

    pytest benchmarks/bench_memory_plan.py -n 0 --results benchmarks/results

The peak is the largest resident size of a process of its own while it takes its second step of AdamW. From it the size
of the same process before the model was loaded is subtracted, after a few operations that load libraries and start
threads. What a plan leaves out (workspaces of BLAS, the allocator's fragments) is therefore in the measured number.
"""

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
import torch

from benchmarks.memory import MIB
from hylorada.evaluation import batch_loss_sum
from hylorada.memory import peak_memory
from hylorada.plan import plan

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SETTINGS = {
    "fp32": {"dtype": "fp32", "checkpointing": False},
    "fp32, checkpointed": {"dtype": "fp32", "checkpointing": True},
    "bf16": {"dtype": "bf16", "checkpointing": False},
}
WITHIN = 0.1


def measured_mib(length: int, dtype: str, checkpointing: bool) -> float:
    from transformers import AutoModelForCausalLM

    from hylorada.baselines import get_baseline_model
    from hylorada.plan import DTYPES
    from hylorada.pretrained import SMOLLM2, load_config

    x = torch.randn(256, 256, requires_grad=True, dtype=DTYPES[dtype])
    (x @ x).softmax(1).sum().backward()
    with peak_memory() as before:
        pass
    base = AutoModelForCausalLM.from_config(load_config(SMOLLM2), dtype=DTYPES[dtype])
    model = get_baseline_model("hylorada", base, gradient_checkpointing=checkpointing, lora_target_modules=TARGETS)
    model.train()
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad])
    batch = {"input_ids": torch.randint(0, 49152, (1, length))}

    def step() -> None:
        batch_loss_sum(model, batch)[0].backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    with peak_memory() as during:
        step()
    return during.mib - before.mib


@pytest.mark.parametrize("length", [512, 2048, 4096])
@pytest.mark.parametrize("setting", SETTINGS)
def test_planned_beside_measured(benchmark, record, setting, length):
    planned = plan("smollm2-135m", length=length, lora_target_modules=TARGETS, **SETTINGS[setting]).peak / MIB
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
        measured = fresh.submit(measured_mib, length, **SETTINGS[setting]).result()
    values = {"planned, MiB": planned, "measured, MiB": measured, "planned / measured": planned / measured}
    record("planned memory", {"setting": setting, "tokens": length}, values)
    assert abs(planned / measured - 1) <= WITHIN
    benchmark.pedantic(lambda: None)
