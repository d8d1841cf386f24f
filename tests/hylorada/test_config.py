"""HyLoRADAConfig: defaults, round trips, the choice by context length, refusals."""

import dataclasses
import json
import subprocess
import sys

import pytest

from hylorada import HyLoRADAConfig
from hylorada.baselines import baseline_config
from hylorada.config import PRESETS


def test_defaults_are_those_of_the_documented_call():
    written_out = HyLoRADAConfig(
        lora_rank=8,
        lora_alpha=16.0,
        lora_dropout=0.05,
        lora_target_modules=("q_proj", "k_proj", "v_proj", "o_proj", "c_attn", "c_proj"),
        use_dora_magnitude=True,
        position_bias_enabled=True,
        position_num_buckets=64,
        landmark_enabled=False,
        num_landmarks=8,
        s2_attn_enabled=False,
        s2_group_size=2048,
        s2_shift_ratio=0.5,
        s2_sink_tokens=0,
        train_embeddings=False,
        train_norms=False,
        rope_scaling_type=None,
        rope_scaling_factor=1.0,
        gradient_checkpointing=True,
        mixed_precision="bf16",
        max_sequence_length=32768,
    )
    assert written_out == HyLoRADAConfig()


@pytest.mark.parametrize("max_length", [512, 2048, 8192])
def test_the_adaptive_call_of_the_documentation_runs(max_length):
    is_long = max_length >= 2048
    config = HyLoRADAConfig(
        lora_rank=8,
        lora_alpha=16,
        position_bias_enabled=is_long,
        landmark_enabled=is_long,
        s2_attn_enabled=(max_length >= 4096),
        rope_scaling_factor=max_length / 1024,
        train_embeddings=(max_length > 1024),
        train_norms=(max_length >= 4096),
    )
    assert (config.rope_scaling_factor, type(config.lora_alpha)) == (max_length / 1024, float)


def test_round_trip_through_json_keeps_every_field():
    config = HyLoRADAConfig(
        lora_rank=16,
        lora_target_modules=["a", "b.c"],
        train_embeddings="positions",
        s2_group_size="auto",
        use_blend=False,
    )
    assert HyLoRADAConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert set(config.to_dict()) == {field.name for field in dataclasses.fields(config)}


@pytest.mark.parametrize("suffix", ["yaml", "yml", "json"])
def test_round_trip_through_a_file_keeps_every_field(tmp_path, suffix):
    config = HyLoRADAConfig(
        lora_alpha=1e-5,
        lora_target_modules=["on", "b.c"],
        train_embeddings="positions",
        rope_scaling_type="yarn",
        rope_scaling_factor=4,
        use_blend=False,
    )
    path = tmp_path / f"config.{suffix}"
    config.save(path)
    assert HyLoRADAConfig.load(path) == config
    HyLoRADAConfig().save(str(path))
    assert HyLoRADAConfig.load(str(path)) == HyLoRADAConfig()


def test_a_file_may_hold_a_few_fields(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("lora_alpha: 2e1  # twice the default rank and more\nlora_target_modules: [q_proj]\n")
    assert HyLoRADAConfig.load(path) == HyLoRADAConfig(lora_alpha=20.0, lora_target_modules=("q_proj",))


def test_a_scaled_weight_of_a_trained_norm_is_refused():
    with pytest.raises(ValueError, match="keep_scaled_weight=True keeps what dora_norm_grad=True makes anew"):
        HyLoRADAConfig(keep_scaled_weight=True, dora_norm_grad=True)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.toml", "", "ends in .yaml, .yml or .json, got"),
        ("a.yaml", "lora_rank: [", "a.yaml cannot be read: it is no YAML"),
        ("a.json", "{", "a.json cannot be read: "),
        ("a.yaml", "", "must hold fields and their values, such as lora_rank: 8, got None"),
        ("a.json", "[8]", r"must hold fields and their values, such as lora_rank: 8, got \[8\]"),
        ("a.yaml", "lora_rnak: 8", "did you mean 'lora_rank'"),
        ("a.yaml", "lora_rank: 0", "lora_rank must be at least 1, got 0"),
    ],
)
def test_a_file_that_is_no_config_is_refused(tmp_path, name, text, message):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        HyLoRADAConfig.load(path)


def test_a_config_is_not_saved_under_an_unknown_suffix(tmp_path):
    with pytest.raises(ValueError, match=r"ends in \.yaml, \.yml or \.json"):
        HyLoRADAConfig().save(tmp_path / "config.txt")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_the_method_and_overrides_win(name):
    assert HyLoRADAConfig.preset(name) == HyLoRADAConfig(**PRESETS[name]) == baseline_config(name)
    assert HyLoRADAConfig.preset(name, use_rslora=True, lora_rank=3).lora_rank == 3
    assert HyLoRADAConfig.preset(name, use_rslora=True).use_rslora


def test_presets_differ_and_an_unknown_one_is_refused():
    assert len({str(HyLoRADAConfig.preset(name)) for name in PRESETS}) == len(PRESETS)
    with pytest.raises(
        ValueError, match="no preset 'qlora'; use one of lora, rslora, dora, lorada, longlora, hylorada"
    ):
        HyLoRADAConfig.preset("qlora")


def test_config_cannot_be_changed_but_replaced():
    config = HyLoRADAConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.lora_rank = 0
    assert dataclasses.replace(config, lora_rank=32).lora_rank == 32
    with pytest.raises(ValueError, match="lora_rank"):
        dataclasses.replace(config, lora_rank=-1)


@pytest.mark.parametrize(
    ("max_length", "position", "landmark", "s2", "embeddings", "norms", "rope", "factor"),
    [
        (512, False, False, False, False, False, None, 1.0),
        (1024, False, False, False, False, False, None, 1.0),
        (1536, False, False, False, True, False, "auto", 1.5),
        (2048, True, True, False, True, False, "auto", 2.0),
        (4096, True, True, True, True, True, "auto", 4.0),
        (8192, True, True, True, True, True, "auto", 8.0),
    ],
)
def test_context_length_chooses_the_components(max_length, position, landmark, s2, embeddings, norms, rope, factor):
    config = HyLoRADAConfig.for_context_length(max_length)
    assert (config.position_bias_enabled, config.landmark_enabled, config.s2_attn_enabled) == (position, landmark, s2)
    assert (config.train_embeddings, config.train_norms) == (embeddings, norms)
    assert (config.rope_scaling_type, config.rope_scaling_factor) == (rope, factor)
    assert config.max_sequence_length == max_length


def test_context_length_knows_the_models_own_length_and_overrides_win():
    config = HyLoRADAConfig.for_context_length(8192, model_max_length=32768, landmark_enabled=False, lora_rank=32)
    assert (config.rope_scaling_type, config.rope_scaling_factor, config.train_embeddings) == (None, 1.0, False)
    assert (config.landmark_enabled, config.s2_attn_enabled, config.lora_rank) == (False, True, 32)
    with pytest.raises(ValueError, match="max_length must be at least 1, got 0"):
        HyLoRADAConfig.for_context_length(0)


def test_landmarks_that_know_positions_need_some():
    options = {"position_bias_enabled": False, "landmark_enabled": True, "landmark_position": True}
    assert HyLoRADAConfig(**options, max_sequence_length=17)
    with pytest.raises(ValueError, match="max_sequence_length must exceed 16 with landmark_position=True, got 16"):
        HyLoRADAConfig(**options, max_sequence_length=16)


@pytest.mark.parametrize(
    ("field", "value", "error", "message"),
    [
        ("lora_rank", 0, ValueError, "at least 1, got 0"),
        ("lora_rank", -3, ValueError, "at least 1, got -3"),
        ("lora_rank", 8.0, TypeError, "whole number, got 8.0"),
        ("lora_rank", True, TypeError, "whole number, got True"),
        ("lora_alpha", 0, ValueError, "positive"),
        ("lora_alpha", float("nan"), ValueError, "positive"),
        ("lora_alpha", "16", TypeError, r"a number \(positive and finite\), got '16'"),
        ("lora_dropout", 1.0, ValueError, r"in \[0, 1\), got 1.0"),
        ("lora_dropout", -0.1, ValueError, r"in \[0, 1\), got -0.1"),
        ("lora_target_modules", "q_proj", TypeError, "single string 'q_proj'"),
        ("lora_target_modules", (), ValueError, "at least one name"),
        ("lora_target_modules", ("q_proj", ""), ValueError, "non-empty"),
        ("lora_target_modules", 3, TypeError, "sequence of names"),
        ("lora_init", "gaussian", ValueError, "'orthogonal', 'kaiming', got 'gaussian'"),
        ("use_blend", 1, TypeError, "True or False, got 1"),
        ("position_bucket", "linear", ValueError, "'log', 'log2', got 'linear'"),
        ("position_num_buckets", 3, ValueError, "position_num_buckets >= 4"),
        ("max_sequence_length", 16, ValueError, "exceed a quarter of position_num_buckets=64"),
        ("position_bias_target", "input", ValueError, "'output', 'delta'"),
        ("landmark_gate", None, ValueError, "'token'"),
        ("s2_group_size", "half", TypeError, "a whole number or \"auto\", got 'half'"),
        ("s2_group_size", 0, ValueError, "at least 1"),
        ("s2_shift_ratio", 1.5, ValueError, r"in \[0, 1\)"),
        ("s2_sink_tokens", -1, ValueError, "at least 0"),
        ("train_embeddings", 1, ValueError, "False, True, 'positions'"),
        ("rope_scaling_type", "ntk", ValueError, "'linear', 'dynamic', 'yarn'"),
        ("rope_scaling_factor", 0.0, ValueError, "positive"),
        ("position_extension", "repeat", ValueError, "'tile', 'interpolate', got 'repeat'"),
        ("mixed_precision", "fp8", ValueError, "'bf16', 'fp16', 'fp32', got 'fp8'"),
    ],
)
def test_bad_values_are_refused_by_name(field, value, error, message):
    with pytest.raises(error, match=f"{field}.*{message}|{message}"):
        HyLoRADAConfig(**{field: value})


def test_scaling_down_is_refused():
    with pytest.raises(ValueError, match="rope_scaling_factor must be at least 1 with rope_scaling_type='yarn'"):
        HyLoRADAConfig(rope_scaling_type="yarn", rope_scaling_factor=0.5)


def test_unknown_fields_are_refused_with_a_suggestion():
    with pytest.raises(ValueError, match="no field 'lora_ranks'; did you mean 'lora_rank'"):
        HyLoRADAConfig.from_dict({"lora_ranks": 8})


def test_importing_the_package_does_not_load_torch():
    code = "import sys, hylorada; hylorada.HyLoRADAConfig(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
