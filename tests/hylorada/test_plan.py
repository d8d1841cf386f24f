"""The memory planner: that a model without values counts as a real one, what a 4-bit base is worth, and its advice."""

import pytest
import torch
from transformers import OPTConfig

from hylorada.baselines import get_baseline_model
from hylorada.footprint import training_footprint
from hylorada.plan import nf4_bytes, plan


@pytest.fixture
def config(make_base):
    return make_base("llama").config


def test_a_config_counts_as_the_loaded_model(make_base, config):
    for method in ("hylorada", "full", "sparse"):
        real = get_baseline_model(method, make_base("llama"), gradient_checkpointing=False)
        added = real.adapter_parameters().values() if method == "hylorada" else []
        expected = training_footprint(real, added, 48, 2)
        found = plan(config, method, length=48, batch_size=2, dtype="fp32", checkpointing=False)
        assert found.footprint.at_peak.keys() >= {"weights"}
        assert (found.peak, found.footprint.stage) == (expected.peak, expected.stage)
        assert found.parameters == sum(parameter.numel() for parameter in real.parameters())
        assert found.trainable == sum(parameter.numel() for parameter in real.parameters() if parameter.requires_grad)


def test_memory_decides_what_fits_and_the_advice_lists_what_helps(config):
    options = {"length": 64, "batch_size": 4, "dtype": "fp32", "checkpointing": False, "s2_group_size": 32}
    found = plan(config, **options)
    assert found.fits is None
    tight = plan(config, **options, memory=found.peak - 1)
    assert tight.fits is False and plan(config, **options, memory=found.peak).fits is True
    others = dict(tight.alternatives())
    assert list(others)[-1] == "all of these"
    assert set(others) - {"all of these"} == {
        "gradient checkpointing",
        "bf16 weights",
        "shifted sparse attention",
        "half the batch",
        "an NF4 base",
    }
    assert others["all of these"].peak < others["gradient checkpointing"].peak < found.peak
    assert others["half the batch"].settings["batch_size"] == 2 and others["half the batch"].fits
    assert others["half the batch"].peak == plan(config, **{**options, "batch_size": 2}).peak
    assert others["bf16 weights"].footprint.lasting["weights"] * 2 == found.footprint.lasting["weights"]
    lines = tight.advice().splitlines()
    assert len(lines) == 3 + len(others) and lines[2].startswith("| nothing") and lines[2].endswith("no |")


def test_the_table_adds_up(config):
    found = plan(config, length=32)
    *rows, last = [line.split("|")[1:-1] for line in found.table().splitlines()[2:]]
    for column in (1, 2):
        numbers = [float(row[column].replace(",", "")) for row in rows]
        assert sum(numbers) == pytest.approx(float(last[column].replace(",", "")), abs=0.05 * len(rows))
    assert float(last[2].replace(",", "")) == pytest.approx(found.peak / 2**20, abs=0.06)


@pytest.mark.parametrize("shape", [(64, 64), (100, 96), (512, 576)])
def test_nf4_bytes_are_those_of_bitsandbytes(shape):
    functional = pytest.importorskip("bitsandbytes.functional")
    packed, state = functional.quantize_4bit(torch.randn(shape), quant_type="nf4", compress_statistics=True)
    parts = [packed, state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
    assert nf4_bytes(shape[0] * shape[1]) == sum(part.nbytes for part in parts)


def test_an_nf4_base_packs_every_linear_but_the_head(config):
    plain = plan(config, length=32, dtype="bf16")
    packed = plan(config, length=32, dtype="bf16", quantized_base="nf4")
    shapes = 2 * [(32, 32), (32, 32), (16, 32), (16, 32), (48, 32), (48, 32), (32, 48)]
    saved = sum(2 * rows * columns - nf4_bytes(rows * columns) for rows, columns in shapes)
    assert plain.footprint.lasting["weights"] - packed.footprint.lasting["weights"] == saved
    assert plain.peak - packed.peak == saved - 2 * 32 * 48


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "dtype must be one of fp32, bf16, fp16, got 'int8'"),
        ({"mixed_precision": "tf32"}, "mixed_precision must be one of"),
        ({"quantized_base": "int4"}, 'quantized_base must be None or "nf4"'),
        ({"quantized_base": "nf4", "method": "full"}, "keeps frozen; use quantized_base=None"),
        ({"length": 0}, "length must be at least 1"),
        ({"method": "prefix"}, "unknown method 'prefix'"),
    ],
)
def test_what_cannot_be_planned_is_refused(config, options, message):
    with pytest.raises(ValueError, match=message):
        plan(config, **({"length": 32} | options))


def test_a_length_beyond_a_position_table_is_refused(make_base):
    table = make_base("gpt2").config
    with pytest.raises(ValueError, match="position table has 128 places"):
        plan(table, length=129)
    with pytest.raises(ValueError, match="position table has 128 places"):
        # without a type the factor does nothing
        plan(table, length=256, rope_scaling_factor=2.0)
    opt = OPTConfig(hidden_size=32, ffn_dim=48, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=32)
    with pytest.raises(ValueError, match="position table has 32 places"):
        plan(opt, length=64)
    for method in ("full", "sparse", "baseline"):
        plan(table, method, length=256, rope_scaling_type="auto", rope_scaling_factor=2.0)
    longer = plan(table, length=256, rope_scaling_type="auto", rope_scaling_factor=2.0)
    assert longer.peak > plan(table, length=128).peak
