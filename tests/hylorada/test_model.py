"""HyLoRADAModel: identity at the start, gradients, causality, merging, counting, and refusals that change nothing."""

import copy
import logging

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from hylorada import HyLoRADAConfig, HyLoRADAModel, UnifiedLayer, get_lora_plus_param_groups
from hylorada.config import PRESETS
from hylorada.lora import adapted_layers

PLAIN = {"use_dora_magnitude": False, "use_blend": False, "position_bias_enabled": False}
METHODS = {
    "lora": PLAIN | {"use_rslora": False, "lora_init": "kaiming"},
    "rslora": PLAIN | {"lora_init": "kaiming"},
    "dora": PLAIN | {"use_rslora": False, "use_dora_magnitude": True, "lora_init": "kaiming"},
    "hylorada": {},
    "hylorada_delta": {"position_bias_target": "delta", "dora_norm_grad": True},
}


@pytest.fixture(params=METHODS)
def method(request):
    """The config fields of every method in turn."""
    return METHODS[request.param]


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize(("magnitude", "blend"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("position", [None, "output", "delta"])
def test_start_is_the_base_model(make_base, make_model, token_ids, family, rslora, magnitude, blend, position):
    model = make_model(
        family,
        start=True,
        use_rslora=rslora,
        use_dora_magnitude=magnitude,
        use_blend=blend,
        position_bias_enabled=position is not None,
        position_bias_target=position or "output",
        lora_init="orthogonal" if rslora else "kaiming",
    )
    expected = make_base(family)(token_ids).logits
    torch.testing.assert_close(model(token_ids).logits, expected, rtol=0, atol=4e-6 * expected.abs().max().item())


def test_start_in_bf16_is_the_base_model_within_rounding(make_base, make_model, token_ids, family, method):
    base = make_base(family, torch.bfloat16)
    expected = base(token_ids).logits
    found = make_model(family, torch.bfloat16, start=True, **method)(token_ids).logits
    truth = base.double()(token_ids).logits
    rounding = (expected - truth).abs().max().item()
    assert found.dtype == torch.bfloat16 and (found - truth).abs().max() <= 2 * rounding
    # the same token wherever the best is not a tie within rounding
    best = expected.float().topk(2).values
    clear = best[..., 0] - best[..., 1] > 2 * rounding
    assert clear.float().mean() > 0.5
    assert torch.equal(found.argmax(-1)[clear], expected.argmax(-1)[clear])


def test_every_trainable_parameter_gets_a_gradient(make_model, token_ids, family, method):
    start = make_model(family, start=True, **method)
    start(token_ids, labels=token_ids).loss.backward()
    trainable = {name for name, parameter in start.named_parameters() if parameter.requires_grad}
    with_gradient = {name for name, parameter in start.named_parameters() if parameter.grad is not None}
    assert trainable == with_gradient
    assert {parameter for parameter in start.parameters() if parameter.requires_grad} == set(
        start.adapter_parameters().values()
    )
    for name, parameter in start.adapter_parameters().items():
        if name.endswith("lora_b"):
            assert parameter.grad.abs().max() > 0, name

    later = make_model(family, **method)
    later(token_ids, labels=token_ids).loss.backward()
    for name, parameter in later.adapter_parameters().items():
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("position", [0, 5, 11])
def test_a_token_changes_nothing_before_it(make_model, token_ids, family, position):
    model = make_model(family)
    changed = token_ids.clone()
    changed[:, position] = 96
    before, after = model(token_ids).logits, model(changed).logits
    assert torch.equal(before[:, :position], after[:, :position])
    assert not torch.equal(before[:, position], after[:, position])


def test_a_layer_is_the_formula(make_model, method):
    layer = next(iter(adapted_layers(make_model("qwen2", torch.float64, **method)).values()))
    config = HyLoRADAConfig(**method)
    scale = 16.0 / (4**0.5 if config.use_rslora else 4)
    adapted = layer.weight + scale * layer.lora_b @ layer.lora_a
    if config.use_dora_magnitude:
        beta = torch.sigmoid(layer.residual_weight) if config.use_blend else 0
        adapted = ((1 - beta) * layer.magnitude / adapted.norm(dim=1) + beta).unsqueeze(1) * adapted
    torch.testing.assert_close(layer.merged_weight(), adapted, rtol=1e-12, atol=1e-12)


def test_training_lowers_the_loss_and_leaves_the_base_alone(make_base, make_model, token_ids):
    model = make_model("gpt2", start=True, gradient_checkpointing=True).train()
    optimizer = torch.optim.AdamW(get_lora_plus_param_groups(model, lr_lora=1e-2, lr_magnitude=1e-2, lr_position=1e-2))
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        losses.append(model(token_ids, labels=token_ids).loss)
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]
    untouched = dict(make_base("gpt2").named_parameters())
    found = dict(model.base_model.named_parameters())
    assert all(torch.equal(found[name], parameter) for name, parameter in untouched.items())


@pytest.mark.parametrize("name", ["lora", "dora", "hylorada"])
def test_merge_changes_nothing_and_unmerge_restores_every_bit(make_base, make_model, token_ids, family, name):
    model = make_model(family, **METHODS[name])
    mask = torch.ones_like(token_ids)
    mask[1, 9:] = 0
    expected = model(token_ids, attention_mask=mask).logits
    weights = {key: value.clone() for key, value in model.state_dict().items()}

    model.merge_lora_weights()
    model.merge_lora_weights()
    assert model.merged and not adapted_layers(model.base_model)
    assert [type(part) for part in model.base_model.modules()] == [type(part) for part in make_base(family).modules()]
    assert set(model.base_model.state_dict()) == set(make_base(family).state_dict())
    torch.testing.assert_close(model(token_ids, attention_mask=mask).logits, expected, rtol=1e-5, atol=1e-5)
    assert model.count_params()["trainable"] == (65 if name == "hylorada" else 0)

    model.unmerge_lora_weights()
    model.unmerge_lora_weights()
    assert model.state_dict().keys() == weights.keys()
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    assert torch.equal(model(token_ids, attention_mask=mask).logits, expected)
    model(token_ids, labels=token_ids).loss.backward()
    assert all(parameter.grad is not None for parameter in model.adapter_parameters().values())


def test_a_merged_bf16_model_stays_within_rounding(make_model, token_ids):
    model = make_model("llama", torch.bfloat16)
    expected = model(token_ids).logits.float()
    model.merge_lora_weights()
    assert (model(token_ids).logits.float() - expected).abs().max() < 0.03 * expected.abs().max()


def test_merge_without_the_base_weights_is_for_good(make_model, token_ids):
    model = make_model("llama")
    expected = model(token_ids).logits
    model.merge_lora_weights(keep_base=False)
    torch.testing.assert_close(model(token_ids).logits, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(RuntimeError, match="keep_base=False"):
        model.unmerge_lora_weights()


def test_unmerge_follows_the_model_into_train_mode(make_model):
    model = make_model("llama")
    model.merge_lora_weights()
    model.train()
    model.unmerge_lora_weights()
    assert all(module.training for module in model.modules())


def test_what_cannot_be_merged_is_refused_before_any_change(make_model, make_base, token_ids):
    delta = make_model("llama", position_bias_target="delta")
    expected = delta(token_ids).logits
    with pytest.raises(RuntimeError, match='position_bias_target="delta"'):
        delta.merge_lora_weights()
    assert torch.equal(delta(token_ids).logits, expected) and not delta.merged

    tied = make_model("gpt2", lora_target_modules=("c_attn", "lm_head"), **PLAIN)
    expected = tied(token_ids).logits
    with pytest.raises(RuntimeError, match="share the weight of lm_head"):
        tied.merge_lora_weights()
    assert torch.equal(tied(token_ids).logits, expected) and not tied.merged


def test_a_merge_that_fails_half_way_is_taken_back(make_model, token_ids, monkeypatch):
    model = make_model("llama")
    expected = model(token_ids).logits
    last = list(adapted_layers(model.base_model).values())[-1]
    monkeypatch.setattr(last, "merged_weight", lambda: (_ for _ in ()).throw(MemoryError("no memory")))
    with pytest.raises(MemoryError):
        model.merge_lora_weights()
    assert torch.equal(model(token_ids).logits, expected) and not model.merged


def test_a_layer_with_two_names_is_adapted_once(make_base, token_ids, tmp_path):
    base = make_base("llama")
    base.model.layers[1].mlp.gate_proj = base.model.layers[0].mlp.gate_proj
    untouched = copy.deepcopy(base)
    expected = base(token_ids).logits
    model = HyLoRADAModel(base, HyLoRADAConfig(lora_target_modules=("gate_proj",)))
    first, second = (layer.mlp.gate_proj for layer in model.base_model.model.layers)
    assert isinstance(first, UnifiedLayer) and first is second
    torch.testing.assert_close(model(token_ids).logits, expected)
    model.merge_lora_weights()
    assert type(base.model.layers[1].mlp.gate_proj) is nn.Linear
    model.unmerge_lora_weights()
    assert base.model.layers[1].mlp.gate_proj is first
    model.save_pretrained(tmp_path)
    loaded = HyLoRADAModel.from_pretrained(untouched, tmp_path)
    assert torch.equal(loaded(token_ids).logits, model(token_ids).logits)


def gpt2_on_meta(**fields):
    with torch.device("meta"):
        base = GPT2LMHeadModel(GPT2Config())
    base.tie_weights()
    return HyLoRADAModel(base, HyLoRADAConfig(**METHODS["lora"] | fields))


def test_gpt2_has_811008_trainable_parameters(capsys):
    model = gpt2_on_meta()
    counts = model.count_params()
    assert (counts["trainable"], counts["total"]) == (811_008, 124_439_808 + 811_008)
    assert (counts["lora_a"] + counts["lora_b"], counts["magnitude"], counts["position_bias"]) == (811_008, 0, 0)
    model.print_trainable_params()
    assert capsys.readouterr().out == "Trainable params: 811K / 125M (0.65%)\n"


def test_gpt2_with_landmarks_by_position_has_823809_trainable_parameters():
    model = gpt2_on_meta(landmark_enabled=True, landmark_position=True)
    counts = model.count_params()
    assert (counts["trainable"], counts["landmark"], counts["position_bias"]) == (823_809, 12_801, 0)
    assert gpt2_on_meta(landmark_enabled=True).count_params()["landmark"] == 12_289
    assert gpt2_on_meta(position_bias_enabled=True).count_params()["position_bias"] == 65


def test_counts_name_every_kind(make_model):
    counts = make_model("llama", lora_target_modules=("q_proj", "v_proj")).count_params()
    assert counts == {
        "total": counts["total"],
        "trainable": 1377,
        "lora_a": 2 * 2 * 4 * 32,
        "lora_b": 2 * 4 * (32 + 16),
        "magnitude": 2 * (32 + 16),
        "residual_weight": 4,
        "position_bias": 65,
        "daa": 0,
        "landmark": 0,
        "base": 0,
    } | {"trainable": 512 + 384 + 96 + 4 + 65}


def test_parameter_groups_hold_every_trainable_parameter_once(make_model):
    model = make_model("llama")
    base = model.base_model
    undecayed = [base.model.embed_tokens.weight, base.model.layers[0].input_layernorm.weight, base.model.norm.weight]
    for parameter in (base.lm_head.weight, *undecayed):
        parameter.requires_grad_(True)
    wrapped = nn.ModuleDict({"module": model})
    groups = {
        group["name"]: group
        for group in get_lora_plus_param_groups(
            wrapped, lr_lora=1.0, lr_magnitude=2.0, lr_position=3.0, weight_decay=0.1, lora_plus_ratio=16.0
        )
    }
    assert {name: (group["lr"], group["weight_decay"]) for name, group in groups.items()} == {
        "lora_a": (1.0, 0.1),
        "lora_b": (16.0, 0.1),
        "magnitude": (2.0, 0.0),
        "residual_weight": (2.0, 0.0),
        "position_bias": (3.0, 0.0),
        "base_undecayed": (1.0, 0.0),
        "base": (1.0, 0.1),
    }
    grouped = [parameter for group in groups.values() for parameter in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {parameter for parameter in model.parameters() if parameter.requires_grad}
    assert groups["base"]["params"] == [base.lm_head.weight]
    assert set(groups["base_undecayed"]["params"]) == set(undecayed)
    assert {parameter.numel() for parameter in groups["position_bias"]["params"]} == {64, 1}


@pytest.mark.parametrize(("family", "embeddings"), [("gpt2", "all"), ("llama", "tokens")])
def test_weight_decay_reaches_no_norm_bias_or_table(make_model, family, embeddings):
    """An optimizer step without gradients changes what decays, and nothing else. The head of gpt2 is tied."""
    model = make_model(family, train_norms=True, train_embeddings=embeddings, landmark_enabled=True, daa_enabled=True)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW(get_lora_plus_param_groups(model, weight_decay=0.5))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == {name for name in before if name.endswith((".lora_a", ".lora_b"))}


def test_parameter_groups_of_nothing_are_refused(make_model):
    model = make_model("llama", position_bias_enabled=False)
    model.merge_lora_weights()
    with pytest.raises(ValueError, match="no trainable parameters"):
        get_lora_plus_param_groups(model)


def test_the_model_stands_for_its_base(make_base, token_ids):
    base = make_base("llama")
    model = HyLoRADAModel(base)
    assert model.config is base.config and model.device == base.device and model.can_generate()
    assert model.hylorada_config == HyLoRADAConfig()
    labels = token_ids.masked_fill(token_ids < 30, -100)
    output = model(input_ids=token_ids, labels=labels, output_hidden_states=True)
    expected = make_base("llama")(input_ids=token_ids, labels=labels, output_hidden_states=True)
    assert torch.equal(output.loss, expected.loss) and len(output.hidden_states) == 3
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = model.no_such_thing


@pytest.mark.parametrize("training", [False, True])
def test_mode_is_the_base_models(make_base, token_ids, training):
    model = HyLoRADAModel(make_base("llama").train(training), HyLoRADAConfig(lora_dropout=0.5))
    assert all(module.training is training for module in model.modules())
    with torch.no_grad():
        for layer in adapted_layers(model.base_model).values():
            layer.lora_b.normal_()
    assert torch.equal(model(token_ids).logits, model(token_ids).logits) is not training


def checkpointed_layers(model):
    return [layer.gradient_checkpointing for layer in model.base_model.model.layers]


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.* is deprecated:FutureWarning")
def test_gradient_checkpointing_follows_the_config(make_base, monkeypatch, caplog):
    off = HyLoRADAConfig(gradient_checkpointing=False)
    assert checkpointed_layers(HyLoRADAModel(make_base("llama"))) == [True, True]
    assert checkpointed_layers(HyLoRADAModel(make_base("llama"), off)) == [False, False]
    enabled = make_base("llama")
    enabled.gradient_checkpointing_enable()
    assert checkpointed_layers(HyLoRADAModel(enabled, off)) == [True, True]
    unable = make_base("llama")
    monkeypatch.setattr(unable, "supports_gradient_checkpointing", False)
    assert checkpointed_layers(HyLoRADAModel(copy.deepcopy(unable), off)) == [False, False]
    assert caplog.messages == []
    assert checkpointed_layers(HyLoRADAModel(unable)) == [False, False]
    assert caplog.messages == [
        "gradient_checkpointing=True does nothing: LlamaForCausalLM does not support gradient checkpointing"
    ]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("q_proj",), {"model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"}),
        (("self_attn.q_proj",), {"model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"}),
        (("layers.1.mlp.up_proj",), {"model.layers.1.mlp.up_proj"}),
        (("model.layers.0.self_attn.k_proj",), {"model.layers.0.self_attn.k_proj"}),
    ],
)
def test_targets_match_by_suffix_or_dotted_path(make_model, names, expected):
    assert set(adapted_layers(make_model("llama", lora_target_modules=names).base_model)) == expected


def snapshot(base):
    """All that an adaptation changes: kinds of modules, hooks, values, and what is trainable."""
    modules = [
        (type(part), part.training, len(part._forward_pre_hooks), len(part._forward_hooks)) for part in base.modules()
    ]
    parameters = {name: (id(value), value.requires_grad, value.clone()) for name, value in base.named_parameters()}
    return modules, parameters


def assert_unchanged(base, before):
    modules, parameters = snapshot(base)
    assert modules == before[0] and parameters.keys() == before[1].keys()
    for name, (identity, trainable, value) in parameters.items():
        assert (identity, trainable) == before[1][name][:2] and torch.equal(value, before[1][name][2]), name


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        (
            {"lora_target_modules": ("query",)},
            ValueError,
            "named down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj",
        ),
        ({"lora_target_modules": ("proj",)}, ValueError, r"\('proj',\) match no linear layer of LlamaForCausalLM"),
        ({"lora_target_modules": ("self_attn",)}, ValueError, "match no linear layer"),
        ({"lora_target_modules": ("embed_tokens",)}, ValueError, "match no linear layer"),
        ({"lora_target_modules": ("q_proj", "lm_head")}, ValueError, "cannot scale the output head lm_head"),
        ({"landmark_enabled": True, "landmark_gate": "sequence_mean"}, ValueError, "LlamaForCausalLM is causal"),
        ({"train_embeddings": "positions"}, ValueError, "has no learned position table"),
    ],
)
def test_a_config_that_does_not_fit_changes_nothing(make_base, fields, error, message):
    base = make_base("llama")
    before = snapshot(base)
    with pytest.raises(error, match=message):
        HyLoRADAModel(base, HyLoRADAConfig(**fields))
    assert_unchanged(base, before)


def test_a_failure_while_building_changes_nothing(make_base, monkeypatch):
    base = make_base("llama")
    base.model.norm.requires_grad_(False)
    before = snapshot(base)
    build, built = UnifiedLayer.from_linear, []

    def fail_at_the_fifth(linear, *args, **kwargs):
        if len(built) == 4:
            raise MemoryError("no memory")
        built.append(build(linear, *args, **kwargs))
        return built[-1]

    monkeypatch.setattr(UnifiedLayer, "from_linear", fail_at_the_fifth)
    with pytest.raises(MemoryError):
        HyLoRADAModel(base)
    assert_unchanged(base, before)


def test_a_quantised_weight_is_refused(make_base):
    base = make_base("llama")
    projection = base.model.layers[1].self_attn.q_proj
    projection.weight = nn.Parameter(projection.weight.detach().to(torch.int8), requires_grad=False)
    before = snapshot(base)
    with pytest.raises(TypeError, match=r"torch.int8, not floating point"):
        HyLoRADAModel(base)
    assert_unchanged(base, before)


def test_an_adapted_model_is_refused(make_model):
    model = make_model("llama")
    for adapted in (model, model.base_model):
        with pytest.raises(ValueError, match="is adapted already"):
            HyLoRADAModel(adapted)
    model.merge_lora_weights()
    with pytest.raises(ValueError, match="is adapted already"):
        HyLoRADAModel(model.base_model)


def test_a_merged_model_without_position_bias_can_be_adapted_again(make_model, token_ids):
    model = make_model("llama", position_bias_enabled=False)
    model.merge_lora_weights(keep_base=False)
    expected = model(token_ids).logits
    torch.testing.assert_close(HyLoRADAModel(model.base_model)(token_ids).logits, expected)


@pytest.mark.parametrize(
    ("base", "config", "message"),
    [
        (nn.Linear(4, 4), HyLoRADAConfig(), "PreTrainedModel, got Linear"),
        ("gpt2", HyLoRADAConfig(), "PreTrainedModel, got str"),
        (nn.Linear(4, 4), {"lora_rank": 8}, "HyLoRADAConfig, got dict"),
    ],
)
def test_other_objects_are_refused(base, config, message):
    with pytest.raises(TypeError, match=message):
        HyLoRADAModel(base, config)


def test_a_model_without_matching_layers_names_its_own(make_base):
    with pytest.raises(ValueError, match="GPTNeoXForCausalLM; its linear layers are named dense, dense_4h_to_h"):
        HyLoRADAModel(make_base("gpt_neox"))


def test_only_names_that_the_user_gave_are_warned_about(make_base, caplog):
    with caplog.at_level(logging.WARNING, logger="hylorada"):
        HyLoRADAModel(make_base("llama"))
        assert not caplog.records
        HyLoRADAModel(make_base("llama"), HyLoRADAConfig(lora_target_modules=("q_proj", "qproj")))
        assert "['qproj'] match no linear layer" in caplog.text


@pytest.mark.parametrize(
    ("option", "value", "switch", "off"),
    [
        ("dora_norm_grad", True, "use_dora_magnitude", False),
        ("keep_scaled_weight", True, "use_dora_magnitude", False),
        ("position_num_buckets", 32, "position_bias_enabled", False),
        ("position_bucket", "log2", "position_bias_enabled", False),
        ("position_bias_target", "delta", "position_bias_enabled", False),
        ("num_landmarks", 3, "landmark_enabled", False),
        ("landmark_gate", "prefix_mean", "landmark_enabled", False),
        ("landmark_position", True, "landmark_enabled", False),
        ("s2_group_size", 512, "s2_attn_enabled", False),
        ("s2_shift_ratio", 0.25, "s2_attn_enabled", False),
        ("s2_sink_tokens", 4, "s2_attn_enabled", False),
        ("s2_shift_mode", "heads", "s2_attn_enabled", False),
        ("s2_eval", True, "s2_attn_enabled", False),
        ("daa_num_buckets", 8, "daa_enabled", False),
        ("rope_scaling_factor", 4.0, "rope_scaling_type", None),
        ("position_extension", "interpolate", "rope_scaling_type", None),
    ],
)
def test_an_option_whose_switch_is_off_is_warned_about(make_base, caplog, option, value, switch, off):
    HyLoRADAModel(make_base("llama"), HyLoRADAConfig(**{option: value, switch: off}))
    assert caplog.messages == [f"{option}={value!r} does nothing while {switch} is {off!r}"]


@pytest.mark.parametrize(
    "config",
    [
        HyLoRADAConfig(),
        HyLoRADAConfig(use_dora_magnitude=False),
        HyLoRADAConfig(position_bias_enabled=False),
        HyLoRADAConfig.for_context_length(512),
        *(HyLoRADAConfig.preset(name) for name in PRESETS),
    ],
)
def test_presets_are_not_warned_about(make_base, caplog, config):
    HyLoRADAModel(make_base("llama"), config)
    assert caplog.messages == []


@pytest.mark.parametrize("length", [512, 1024, 2048, 4096, 32768])
def test_a_context_length_leaves_no_option_idle(length):
    assert HyLoRADAConfig.for_context_length(length).idle_options() == {}


def test_two_models_of_one_config_are_independent(make_base, token_ids):
    config = HyLoRADAConfig()
    base = make_base("llama")
    first, second = HyLoRADAModel(copy.deepcopy(base), config), HyLoRADAModel(base, config)
    with torch.no_grad():
        for parameter in first.adapter_parameters().values():
            parameter.add_(0.1)
    torch.testing.assert_close(second(token_ids).logits, make_base("llama")(token_ids).logits)


def test_the_status_of_a_bf16_model_does_not_warn_of_norms_that_are_not_trained(make_model, caplog):
    model = make_model("llama", torch.bfloat16)
    assert model.get_component_status()["norms"]["parameters"] == 0 and not caplog.records


def test_the_norms_of_all_layers_are_made_together_after_a_change(make_model, token_ids, family, norms_made):
    model = make_model(family)
    layers = adapted_layers(model.base_model)
    # layers that have run, no others
    model(token_ids)
    with torch.no_grad():
        for layer in layers.values():
            layer.lora_b.add_(0.1)
    for _ in range(2):
        norms_made.clear()
        before = model(token_ids).logits
        model(token_ids)
        assert norms_made.are_together(len(layers))
        with torch.no_grad():
            for layer in layers.values():
                layer.lora_b.add_(0.1)
    assert not torch.equal(model(token_ids).logits, before)
    norms_made.clear()
    # one that is not the first is made by its layer
    list(layers.values())[-1].lora_b.data.add_(0.1)
    found = model(token_ids).logits
    assert norms_made.are_of(1)
    assert torch.equal(found, copy.deepcopy(model)(token_ids).logits)
