"""Landmarks, longer texts, trained embeddings and norms as parts of one model: start, files, merges, decoding."""

import copy
from collections import Counter

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from hylorada import HyLoRADAConfig, HyLoRADAModel, get_lora_plus_param_groups
from hylorada.data import collate
from hylorada.lora import adapted_layers
from hylorada.position_table import PositionTable, find_position_table
from hylorada.rope import RopeScaling, find_rotary_modules
from hylorada.trainer import HyLoRADATrainer, TrainingConfig
from tests.hylorada.conftest import FAMILIES

EVERYTHING = {
    "landmark_enabled": True,
    "landmark_gate": "prefix_mean",
    "landmark_position": True,
    "train_embeddings": "all",
    "train_norms": True,
}
LONGER = {"rope_scaling_type": "auto", "rope_scaling_factor": 2.0}
GROUPS = {"s2_attn_enabled": True, "s2_group_size": 16, "s2_eval": True, "s2_sink_tokens": 2, "daa_enabled": True}
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def long_ids(length=140):
    return torch.randint(3, 97, (2, length), generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("longer", [False, True])
def test_start_is_the_base_model(make_model, make_base, family, token_ids, longer):
    base = make_base(family)
    if longer and find_rotary_modules(base):
        # which RoPE scaling changes at once
        RopeScaling(base, "linear", 2.0).apply()
    found = make_model(family, start=True, **EVERYTHING, **(LONGER if longer else {}))(token_ids).logits
    torch.testing.assert_close(found, base(token_ids).logits, rtol=1e-5, atol=1e-5)


def test_every_trainable_parameter_has_a_gradient_and_is_saved(make_model, family):
    model = make_model(family, **EVERYTHING, **LONGER).train()
    ids = long_ids(256)
    model(ids, labels=ids).loss.backward()
    own = {id(parameter) for parameter in model.adapter_parameters().values()}
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (id(parameter) in own), name
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    counts = model.count_params()
    assert counts["trainable"] == sum(value for kind, value in counts.items() if kind not in ("total", "trainable"))
    assert counts["landmark"] == 2 * 8 * 32 + 1 + 64 * 8 and counts["base"] > 97 * 32
    groups = {group["name"]: sum(p.numel() for p in group["params"]) for group in get_lora_plus_param_groups(model)}
    assert groups["landmark"] == counts["landmark"] and groups["base_undecayed"] == counts["base"]


# every part of the method at once; beside groups the attention learns its temperature only
ALL_PARTS = EVERYTHING | {"s2_attn_enabled": True, "s2_group_size": 8, "daa_enabled": True, "daa_num_buckets": 0}


@pytest.mark.parametrize("start", [True, False])
def test_every_part_gets_a_gradient_in_every_step_of_a_run(make_model, family, start):
    model = make_model(family, start=start, gradient_checkpointing=True, **ALL_PARTS, **LONGER)
    rows = [{"input_ids": row.tolist()} for row in long_ids(24).repeat(2, 1)]
    optimizer = torch.optim.AdamW(get_lora_plus_param_groups(model))
    without_gradient = []

    def watch(*_):
        own = model.adapter_parameters()
        without_gradient.append([name for name, parameter in own.items() if parameter.grad is None])

    optimizer.register_step_pre_hook(watch)
    loader = DataLoader(rows, batch_size=1, collate_fn=collate)
    options = {"gradient_accumulation_steps": 2, "num_epochs": 2, "mixed_precision": "fp32", "show_progress": False}
    result = HyLoRADATrainer(model, loader, config=TrainingConfig(**options), optimizer=optimizer).train()
    assert len(result.steps) == 4 and without_gradient == [[]] * 4


def steps_with_every_part(model, samples):
    """The gradients of three steps and the parameters behind them, on the `samples` of the texts."""
    trained = {name.removeprefix("module."): p for name, p in model.named_parameters() if p.requires_grad}
    # AdamW would divide what is zero but for rounding by its own size
    optimizer = torch.optim.SGD(trained.values(), lr=0.1)
    found = {}
    for step in range(3):
        ids = torch.randint(3, 97, (4, 20), generator=torch.Generator().manual_seed(step))[samples]
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        found |= {f"gradient {step} of {name}": parameter.grad.clone() for name, parameter in trained.items()}
        optimizer.step()
    return found | {name: parameter.detach().clone() for name, parameter in trained.items()}


def data_parallel_steps(rank, options):
    # the processes share the memory of what they are given
    model = copy.deepcopy(options["model"])
    # a parameter without a gradient is an error at its second step
    model = torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=False)
    return steps_with_every_part(model, slice(rank, None, 2))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_two_processes_train_every_part_as_one_does(make_model, tmp_path, family):
    from tests.kernels.test_distributed import in_processes

    def model():
        return make_model(family, dtype=torch.float64, **ALL_PARTS, **LONGER).train()

    expected = steps_with_every_part(model(), slice(None))
    first, second = in_processes(data_parallel_steps, tmp_path, {"model": model()})
    assert first.keys() == second.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(first[name], second[name]), name
        # the position bias, the landmarks and what is fp32 inside of the model keep the digits of fp32
        torch.testing.assert_close(first[name], value, rtol=1e-5, atol=1e-7, msg=lambda text, name=name: name + text)


def test_status_names_every_part(make_model):
    model = make_model(**ALL_PARTS, **LONGER)
    status, counts = model.get_component_status(), model.count_params()
    assert sum(part["parameters"] for part in status.values()) == counts["trainable"]
    states = {name: part["state"] for name, part in status.items()}
    assert states == dict.fromkeys(status, "on") | {"s2_attention": "training"}
    assert status["landmark"]["parameters"] == counts["landmark"]
    assert status["norms"]["parameters"] == 5 * 32
    assert status["embeddings"] == {
        "state": "on",
        "parameters": counts["base"] - 5 * 32,
        "options": {"train_embeddings": "all"},
        "details": {"tied": {}},
    }
    assert status["rope_scaling"]["options"] == LONGER | {"position_extension": "tile"}
    assert status["rope_scaling"]["details"] == {"method": "linear", "original_length": 128, "target_length": 256}
    assert status["lora"]["options"]["lora_rank"] == 4
    # an option has one place
    options = [option for part in status.values() for option in part["options"]]
    assert len(options) == len(set(options))
    model.merge_lora_weights()
    status = model.get_component_status()
    merged = {name: part["parameters"] for name, part in status.items() if part["state"] == "merged"}
    assert merged == {"lora": 0, "dora": 0, "blend": 0}
    assert status["position_bias"]["state"] == "on" and status["position_bias"]["parameters"] == 65


@pytest.mark.parametrize("reload", [None, "adapter", "merged", "merged alone"])
@pytest.mark.parametrize("extension", ["tile", "interpolate"])
def test_status_says_how_a_table_is_longer_and_what_is_tied(make_model, make_base, tmp_path, extension, reload):
    model = make_model("gpt2", train_embeddings="all", position_extension=extension, **LONGER)
    if reload is not None:
        if reload != "adapter":
            model.merge_lora_weights()
        expected = model(long_ids()).logits
        model.save_pretrained(tmp_path)
        model = HyLoRADAModel.from_pretrained(None if reload == "merged alone" else make_base("gpt2"), tmp_path)
        assert torch.equal(model(long_ids()).logits, expected)
    status = model.get_component_status()
    assert status["rope_scaling"]["details"] == {"method": extension, "original_length": 128, "target_length": 256}
    assert status["embeddings"]["details"] == {"tied": {"transformer.wte.weight": ["lm_head.weight"]}}


def test_a_table_is_extended_as_the_config_says(make_model, make_base):
    for extension in ("tile", "interpolate"):
        base, model = make_base("gpt2"), make_model("gpt2", start=True, position_extension=extension, **LONGER)
        PositionTable(base, 2.0, extension).apply()
        found = find_position_table(model.base_model).weight
        assert torch.equal(found, find_position_table(base).weight)
        assert torch.equal(found[128], found[0]) == (extension == "tile")


@pytest.mark.parametrize("kind", ["auto", "linear"])
def test_a_rotary_model_has_no_table_to_stretch(make_base, kind):
    fields = {"rope_scaling_type": kind, "rope_scaling_factor": 2.0, "position_extension": "interpolate"}
    with pytest.raises(ValueError, match=r"position_extension='interpolate' is for learned position tables"):
        HyLoRADAModel(make_base("llama"), HyLoRADAConfig(**fields))


@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn"])
def test_a_merged_model_keeps_its_rope_scaling(make_model, make_base, tmp_path, kind):
    model = make_model("llama", rope_scaling_type=kind, rope_scaling_factor=2.0)
    model.merge_lora_weights()
    expected, details = model(long_ids()).logits, model.get_component_status()["rope_scaling"]["details"]
    assert details == {"method": kind, "original_length": 128, "target_length": 256}
    model.save_pretrained(tmp_path)
    for base in (None, make_base("llama")):
        loaded = HyLoRADAModel.from_pretrained(base, tmp_path)
        assert torch.equal(loaded(long_ids()).logits, expected)
        assert loaded.get_component_status()["rope_scaling"]["details"] == details
    # transformers alone reads the frequencies too
    (found,), (expected,) = map(find_rotary_modules, (AutoModelForCausalLM.from_pretrained(tmp_path), model.base_model))
    # "dynamic" has raised its base for the long text
    assert torch.equal(found.inv_freq, expected.original_inv_freq)


@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn"])
def test_a_kind_of_rope_scaling_is_refused_without_rope(make_base, kind):
    with pytest.raises(ValueError, match=f"rope_scaling_type='{kind}': GPT2LMHeadModel has no rotary position"):
        HyLoRADAModel(make_base("gpt2"), HyLoRADAConfig(rope_scaling_type=kind, rope_scaling_factor=2.0))


# max_length -> the parts beside the adapted linears
PARTS_OF_LENGTHS = {
    512: set(),
    2048: {"position_bias", "landmark", "embeddings", "rope_scaling"},
    4096: {"position_bias", "landmark", "embeddings", "rope_scaling", "s2_attention", "norms"},
    16384: {"position_bias", "landmark", "embeddings", "rope_scaling", "s2_attention", "norms"},
}


@pytest.mark.parametrize("length", PARTS_OF_LENGTHS)
def test_a_context_length_becomes_the_parts_of_a_model(make_base, family, length):
    base = make_base(family, **{"n_positions" if family == "gpt2" else "max_position_embeddings": 1024})
    config = HyLoRADAConfig.for_context_length(length, 1024, lora_target_modules=FAMILIES[family][2])
    status = HyLoRADAModel(base, config).get_component_status()
    linears = {"lora", "dora", "blend"}
    assert {name for name, part in status.items() if part["state"] != "off"} - linears == PARTS_OF_LENGTHS[length]
    expected = {}
    if length > 1024:
        method = "tile" if family in ("gpt2", "opt") else "linear" if length <= 8192 else "yarn"
        expected = {"method": method, "original_length": 1024, "target_length": length}
    assert status["rope_scaling"]["details"] == expected


def test_status_of_a_plain_adapter(make_model):
    model = make_model(**{**HyLoRADAConfig.preset("lora").to_dict(), "lora_rank": 4, "use_blend": True})
    status = model.get_component_status()
    assert {name for name, part in status.items() if part["state"] != "off"} == {"lora"}
    assert status["lora"]["parameters"] == model.count_params()["trainable"] > 0
    assert all(part["parameters"] == 0 for name, part in status.items() if name != "lora")


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize(
    "attention", [{}, {**GROUPS, "daa_num_buckets": 0}, {"daa_enabled": True}], ids=["plain", "groups", "distances"]
)
def test_a_loaded_model_computes_the_same(make_model, make_base, family, tmp_path, merge, attention):
    model = make_model(family, **EVERYTHING, **LONGER, **attention)
    ids = long_ids()
    expected = model(ids).logits
    if merge:
        model.merge_lora_weights()
        torch.testing.assert_close(model(ids).logits, expected, **CLOSE)
        expected = model(ids).logits
    model.save_pretrained(tmp_path)
    loaded = HyLoRADAModel.from_pretrained(make_base(family), tmp_path)
    assert torch.equal(loaded(ids).logits, expected)
    assert loaded.hylorada_config == model.hylorada_config
    own, counts = load_file(tmp_path / "adapter.safetensors"), model.count_params()
    # trained parameters of the base are in the full model of a merge already
    assert sum(tensor.numel() for tensor in own.values()) == counts["trainable"] - (counts["base"] if merge else 0)
    if merge:
        loaded = HyLoRADAModel.from_pretrained(None, tmp_path)
        assert torch.equal(loaded(ids).logits, expected)
        loaded.save_pretrained(tmp_path)
        assert torch.equal(HyLoRADAModel.from_pretrained(make_base(family), tmp_path)(ids).logits, expected)
    else:
        model.merge_lora_weights()
        model.unmerge_lora_weights()
        assert torch.equal(model(ids).logits, expected)


class Operations(TorchDispatchMode):
    """Counts what is computed; views cost nothing."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.counts[function.overloadpacket] += not function.is_view
        return function(*args, **(kwargs or {}))


def operations(model, ids):
    with torch.no_grad(), Operations() as counter:
        model(ids)
    return +counter.counts


def test_what_is_merged_costs_nothing(make_model, make_base, family, token_ids):
    base, trained = make_base(family), {"train_embeddings": "all", "train_norms": True}
    model = make_model(family, position_bias_enabled=False, **trained)
    assert operations(model, token_ids) != operations(base, token_ids)
    model.merge_lora_weights()
    assert operations(model, token_ids) == operations(base, token_ids)
    assert [type(part) for part in model.base_model.modules()] == [type(part) for part in base.modules()]


@pytest.mark.parametrize(
    ("fields", "module", "most"),
    [
        # the scale is made once and then multiplies the input of every linear
        ({"position_bias_enabled": True}, "position_bias", lambda linears: linears + 16),
        ({"position_bias_enabled": False, "landmark_enabled": True}, "landmark", lambda _: 16),
    ],
    ids=["position_bias", "landmark"],
)
def test_what_cannot_be_merged_stays_as_one_thin_module(make_model, make_base, family, token_ids, fields, module, most):
    base = make_base(family)
    model = make_model(family, **fields)
    linears = len(adapted_layers(model))
    model.merge_lora_weights()
    assert [name for name, _ in model.named_children() if name != "base_model"] == [module]
    assert [type(part) for part in model.base_model.modules()] == [type(part) for part in base.modules()]
    added = operations(model, token_ids) - operations(base, token_ids)
    assert 0 < added.total() <= most(linears)


class WideResults(TorchDispatchMode):
    """Counts the fp32 results that are as large as the hidden states."""

    def __init__(self, numbers):
        super().__init__()
        self.numbers, self.count = numbers, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.dtype == torch.float32:
            self.count += result.numel() >= self.numbers
        return result


@torch.no_grad()
def test_a_merged_position_bias_makes_no_fp32_copies_of_bf16_states(make_model, make_base, family, token_ids):
    counts = []
    model = make_model(family, dtype=torch.bfloat16)
    model.merge_lora_weights()
    for runs in (make_base(family, torch.bfloat16), model):
        with WideResults(32 * token_ids.numel()) as wide:
            runs(token_ids)
        counts.append(wide.count)
    assert counts[0] == counts[1]


@pytest.mark.parametrize("beams", [1, 3])
def test_generation_past_the_original_length(make_model, family, beams):
    model = make_model(family, **EVERYTHING, **LONGER)
    ids = long_ids(124)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    ids = ids.masked_fill(mask == 0, 2)
    options = {"max_new_tokens": 8, "do_sample": False, "num_beams": beams, "eos_token_id": None}
    cached = model.generate(ids, attention_mask=mask, **options)
    assert torch.equal(cached, model.generate(ids, attention_mask=mask, use_cache=False, **options))


@torch.no_grad()
def test_all_components_together_are_causal_and_decode_as_they_run(make_model, family):
    # the distance bias of Direct Attention Adaptation and groups are two attentions
    model = make_model(family, **EVERYTHING, **LONGER, **GROUPS, daa_num_buckets=0)
    ids = long_ids(150)
    full = model(ids).logits
    changed = ids.clone()
    changed[:, 90] = (changed[:, 90] + 1) % 97
    assert torch.equal(model(changed).logits[:, :90], full[:, :90])
    output = model(ids[:, :100], use_cache=True)
    pieces = [output.logits]
    for start, stop in ((100, 101), (101, 130), (130, 150)):
        output = model(ids[:, start:stop], past_key_values=output.past_key_values)
        pieces.append(output.logits)
    torch.testing.assert_close(torch.cat(pieces, 1), full, **CLOSE)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_no_gradient(make_model, family, reentrant):
    model = make_model(family, **EVERYTHING, **LONGER, **GROUPS, daa_num_buckets=0).train()
    ids = long_ids(150)

    def gradients():
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        return {name: parameter.grad.clone() for name, parameter in model.adapter_parameters().items()}

    expected = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for name, gradient in gradients().items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-6)


def test_a_failure_leaves_the_base_as_it_was(make_base, monkeypatch):
    for family in ("gpt2", "llama"):
        base = make_base(family)
        config, before = base.config.to_dict(), {name: value.clone() for name, value in base.state_dict().items()}
        rotary = find_rotary_modules(base)

        def fail(*_):
            raise MemoryError

        monkeypatch.setattr("hylorada.model.enable_checkpointing", fail)
        with pytest.raises(MemoryError):
            HyLoRADAModel(base, HyLoRADAConfig(**EVERYTHING, **LONGER))
        assert base.config.to_dict() == config and find_rotary_modules(base) == rotary
        assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())
        assert not any(module._forward_hooks for module in base.modules())


def test_a_tied_weight_cannot_be_trained_and_adapted(make_base):
    fields = {
        "train_embeddings": "tokens",
        "position_bias_enabled": False,
        "lora_target_modules": ("c_attn", "lm_head"),
    }
    with pytest.raises(
        ValueError, match=r"trains transformer.wte.weight, also the weight of the adapted layer lm_head"
    ):
        HyLoRADAModel(make_base("gpt2"), HyLoRADAConfig(**fields))


def test_table_length(make_model):
    assert find_position_table(make_model("gpt2", **LONGER).base_model).num_embeddings == 256
