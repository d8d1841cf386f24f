"""SmolLM2-135M trained with PEFT's LoRA and DoRA, as they are and after `accelerate(model)`, on the CPU.

    pytest benchmarks/bench_peft_accelerate.py -n 0 --results benchmarks/results

Every linear layer adapted, rank 8, fp32 adapters as PEFT makes them, AdamW, no dropout, 512 tokens. Loss and gradients
of the accelerated models are compared with PEFT's before anything is timed. Ratios are medians over rounds in which
every contender ran once. `test_training_script` runs a script with transformers' Trainer on text, with and without the
line.
"""

import copy
import statistics

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainingArguments

from benchmarks.paired import median_ratio
from benchmarks.shapes import DTYPES
from hylorada.data import load_documents, token_blocks
from hylorada.integrations.peft import accelerate
from hylorada.pretrained import SMOLLM2, load_pretrained
from hylorada_kernels.testing import relative_error

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TOKENS = 512
# norm-wise, of the gradients of all adapters, after 30 layers that round in their own ways
AGREEMENT = {"fp32": 1e-4, "bf16": 0.1}
# of the losses in the script, whose steps carry rounding on from one to the next
SAME_LOSS = {"fp32": 1e-4, "bf16": 2e-2}
SECONDS_PER_DTYPE = 60.0


def peft_model(base: PreTrainedModel, *, use_dora: bool) -> nn.Module:
    """PEFT's model with a B that is not 0."""
    config = LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS, use_dora=use_dora, lora_dropout=0.0)
    torch.manual_seed(0)
    model = get_peft_model(copy.deepcopy(base), config).train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.01)
    return model


def contenders(base: PreTrainedModel) -> dict[str, nn.Module]:
    models = {}
    for name, use_dora in (("peft lora", False), ("peft dora", True)):
        models[name] = peft_model(base, use_dora=use_dora)
        models[f"accelerated {name}"] = peft_model(base, use_dora=use_dora)
        assert not accelerate(models[f"accelerated {name}"]).fallback
    return models


def loss_of(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, labels=ids, use_cache=False).loss


def assert_agreement(models: dict[str, nn.Module], ids: torch.Tensor, dtype: str) -> None:
    for name in ("peft lora", "peft dora"):
        results = []
        for model in (models[f"accelerated {name}"], models[name]):
            loss = loss_of(model, ids)
            trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
            gradients = torch.autograd.grad(loss, trained)
            results.append((loss.detach(), torch.cat([gradient.flatten() for gradient in gradients])))
        for what, ours, theirs in zip(("loss", "gradient"), *results, strict=True):
            error = relative_error(ours, theirs.double())
            assert error <= AGREEMENT[dtype], f"the {what} differs from {name}'s by {error:.1e}"


def training_step(model: nn.Module, ids: torch.Tensor):
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-4)

    def step() -> None:
        loss_of(model, ids).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


@pytest.mark.parametrize("dtype", DTYPES)
def test_training_step(benchmark, record, paired, dtype):
    base, _ = load_pretrained(SMOLLM2, DTYPES[dtype])
    models = contenders(base)
    ids = torch.randint(0, 49152, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    assert_agreement(models, ids, dtype)
    steps = {name: training_step(model, ids) for name, model in models.items()}
    times = paired(steps, SECONDS_PER_DTYPE, fewest=4, warmup=1)
    values = {"peft lora, ms": 1e3 * statistics.median(times["peft lora"])}
    for name in models:
        if name != "peft lora":
            values[f"{name} / peft lora"] = median_ratio(times, name, "peft lora")
    values["peft dora / accelerated peft dora"] = median_ratio(times, "peft dora", "accelerated peft dora")
    record("peft accelerate", {"": "SmolLM2-135M, 512 tokens", "dtype": dtype}, values)
    benchmark.pedantic(steps["accelerated peft dora"])


def losses_of_script(base: PreTrainedModel, blocks: list[dict], folder, fused: bool) -> list[float]:
    """The script of somebody who fine-tunes with PEFT, and its loss at every step."""
    torch.manual_seed(0)
    config = LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS, use_dora=True, lora_dropout=0.0)
    model = get_peft_model(copy.deepcopy(base), config)
    if fused:
        assert not accelerate(model).fallback
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=1,
        max_steps=len(blocks),
        learning_rate=1e-3,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    rows = [{"input_ids": block["input_ids"], "labels": block["input_ids"]} for block in blocks]
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("dtype", DTYPES)
def test_training_script(benchmark, record, dtype, tmp_path):
    tokens, steps = (64, 2) if benchmark.disabled else (TOKENS, 8)
    base, tokenizer = load_pretrained(SMOLLM2, DTYPES[dtype])
    blocks = token_blocks(load_documents("kjv"), tokenizer, tokens, steps)
    expected = losses_of_script(base, blocks, tmp_path / "peft", fused=False)
    found = benchmark.pedantic(losses_of_script, (base, blocks, tmp_path / "fused", True), rounds=1)
    differences = [abs(ours - theirs) / theirs for ours, theirs in zip(found, expected, strict=True)]
    assert len(found) == steps and max(differences) <= SAME_LOSS[dtype], differences
    record(
        "peft training script",
        {"": f"SmolLM2-135M, {tokens} tokens, {steps} steps", "dtype": dtype},
        {
            "first loss": expected[0],
            "last loss, peft dora": expected[-1],
            "last loss, accelerated": found[-1],
            "largest relative difference, 1e-6": 1e6 * max(differences),
        },
    )
