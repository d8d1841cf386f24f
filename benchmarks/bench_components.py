"""What position bias and landmarks add to a forward pass of SmolLM2-135M on the CPU, every linear layer adapted.

    pytest benchmarks/bench_components.py -n 0 --results benchmarks/results

All start as one model: their logits are compared, bit for bit, before anything is timed.
"""

import copy
import statistics

import pytest
import torch

from benchmarks.paired import median_ratio
from benchmarks.shapes import DTYPES
from hylorada.config import HyLoRADAConfig
from hylorada.model import HyLoRADAModel
from hylorada.pretrained import SMOLLM2, load_pretrained

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TOKENS = 2048
COMPONENTS = {
    "position bias": {"position_bias_enabled": True},
    "landmarks": {"landmark_enabled": True},
    "both": {"position_bias_enabled": True, "landmark_enabled": True},
}
# the fewest rounds of `paired_times` take longer on slow cores; a dtype alone, -k bf16, writes a table of its own
SECONDS_PER_CASE = 100.0


@pytest.mark.parametrize("dtype", DTYPES)
def test_overhead(benchmark, record, paired, dtype):
    base, _ = load_pretrained(SMOLLM2, DTYPES[dtype])
    ids = torch.randint(0, 49152, (1, TOKENS), generator=torch.Generator().manual_seed(0))

    def model_with(position_bias_enabled: bool = False, **fields: bool) -> HyLoRADAModel:
        shared = {"lora_target_modules": TARGETS, "gradient_checkpointing": False}
        config = HyLoRADAConfig(position_bias_enabled=position_bias_enabled, **shared, **fields)
        return HyLoRADAModel(copy.deepcopy(base), config).eval()

    @torch.no_grad()
    def logits(model: HyLoRADAModel) -> torch.Tensor:
        return model(input_ids=ids, use_cache=False).logits

    models = {"none": model_with()} | {name: model_with(**fields) for name, fields in COMPONENTS.items()}
    expected = logits(models["none"])
    for name in COMPONENTS:
        assert torch.equal(logits(models[name]), expected), f"{name} does not start as the model without it"
    del expected
    times = paired({name: lambda model=model: logits(model) for name, model in models.items()}, SECONDS_PER_CASE)
    values = {"none, s": statistics.median(times["none"])}
    values |= {f"{name} / none": median_ratio(times, name, "none") for name in COMPONENTS}
    record(f"overhead of components in {dtype}", {"": f"SmolLM2-135M, {TOKENS} tokens"}, values)
    benchmark.pedantic(logits, (models["both"],))
