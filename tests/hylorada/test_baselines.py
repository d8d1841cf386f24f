"""Every method is the formula that its name promises."""

import math

import pytest
import torch
from torch.utils.data import DataLoader

from hylorada.baselines import METHODS, baseline_config, get_baseline_model
from hylorada.config import PRESETS
from hylorada.data import collate
from hylorada.lora import adapted_layers
from hylorada.model import HyLoRADAModel
from hylorada.sparse_mlp import SparseAdapter, find_mlp_outputs
from hylorada.trainer import HyLoRADATrainer, TrainingConfig

RANK, ALPHA = 4, 6.0
# of every family
LINEARS = ("q_proj", "v_proj", "c_attn", "query_key_value", "mlp.c_proj", "dense_4h_to_h", "down_proj", "fc2")


@pytest.fixture
def layer_of(make_base):
    """The first adapted linear of a method's model, with random adapters, in fp64."""

    def make(method):
        config = baseline_config(method, lora_rank=RANK, lora_alpha=ALPHA, lora_dropout=0.0)
        layer = next(iter(adapted_layers(HyLoRADAModel(make_base(dtype=torch.float64), config)).values()))
        generator = torch.Generator().manual_seed(4)
        with torch.no_grad():
            for parameter in (layer.lora_b, layer.magnitude, layer.residual_weight):
                if parameter is not None:
                    parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
        return layer

    return make


def expected_weight(layer, scale, beta):
    """W + s B A, its rows scaled to the learned magnitude, blended with itself by beta."""
    adapted = layer.weight + scale * layer.lora_b @ layer.lora_a
    if layer.magnitude is None:
        return adapted
    gain = (1 - beta) * layer.magnitude / adapted.norm(dim=1) + beta
    return gain[:, None] * adapted


@pytest.mark.parametrize(
    ("method", "scale", "has_magnitude", "has_blend"),
    [
        ("lora", ALPHA / RANK, False, False),
        ("rslora", ALPHA / math.sqrt(RANK), False, False),
        ("dora", ALPHA / RANK, True, False),
        ("lorada", ALPHA / RANK, False, False),
        ("longlora", ALPHA / RANK, False, False),
        ("hylorada", ALPHA / math.sqrt(RANK), True, True),
    ],
)
def test_method_is_its_formula(layer_of, method, scale, has_magnitude, has_blend):
    layer = layer_of(method)
    assert (layer.magnitude is not None, layer.residual_weight is not None) == (has_magnitude, has_blend)
    beta = torch.sigmoid(layer.residual_weight) if has_blend else 0.0
    torch.testing.assert_close(layer.merged_weight(), expected_weight(layer, scale, beta))


@pytest.mark.parametrize("method", METHODS)
def test_method_starts_as_the_base_model(make_base, token_ids, family, method):
    with torch.no_grad():
        expected = make_base(family)(token_ids).logits
        model = get_baseline_model(method, make_base(family), lora_dropout=0.0, lora_target_modules=LINEARS)
        torch.testing.assert_close(model(token_ids).logits, expected)


@pytest.mark.parametrize("method", METHODS)
def test_method_trains_what_it_says(make_base, method):
    base = make_base(dtype=torch.bfloat16)
    total = sum(parameter.numel() for parameter in base.parameters())
    model = get_baseline_model(method, base, lora_rank=3, lora_target_modules=("down_proj",))
    trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    # two layers, 48 features in and 32 out
    factors, outputs = 2 * 3 * (48 + 32), 2 * 32
    assert (
        sum(trained.values())
        == {
            "baseline": 0,
            "full": total,
            "sparse": 2 * (3 * 32 * 2 + 3),
            "lora": factors,
            "rslora": factors,
            "dora": factors + outputs,
            # a temperature and 32 distances for 4 heads of 2 layers
            "lorada": factors + 2 * 4 * 33,
            "longlora": factors + 97 * 32 + 5 * 32,
            "hylorada": factors + outputs + 2 + 65,
        }[method]
    )


@pytest.mark.parametrize("method", [name for name in METHODS if name != "baseline"])
def test_method_trains(make_base, family, method):
    """The loss falls, and every trainable parameter has a gradient in every step and moves in the end."""
    generator = torch.Generator().manual_seed(5)
    rows = [{"input_ids": torch.randint(3, 97, (24,), generator=generator).tolist()} for _ in range(2)]
    # a group of 8 tokens is not the method's, whose groups are longer than the texts of a test
    short = {"s2_group_size": 8} if method == "longlora" else {}
    options = {"lora_dropout": 0.0, "gradient_checkpointing": True, "max_sequence_length": 64}
    torch.manual_seed(1)
    model = get_baseline_model(method, make_base(family), lora_target_modules=LINEARS, **options, **short)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    start = {name: parameter.detach().clone() for name, parameter in trained.items()}
    optimizer = torch.optim.AdamW(trained.values(), lr=3e-2)
    without_gradient = []

    def watch(*_):
        without_gradient.extend(name for name, parameter in trained.items() if parameter.grad is None)

    optimizer.register_step_pre_hook(watch)
    loader = DataLoader(rows, batch_size=2, collate_fn=collate)
    config = TrainingConfig(num_epochs=16, mixed_precision="fp32", show_progress=False)
    losses = [step.loss for step in HyLoRADATrainer(model, loader, config=config, optimizer=optimizer).train().steps]
    assert losses[-1] < 0.98 * losses[0]
    assert without_gradient == []
    assert [name for name, parameter in trained.items() if torch.equal(parameter, start[name])] == []


def test_only_hylorada_has_a_position_bias():
    assert [name for name in PRESETS if baseline_config(name).position_bias_enabled] == ["hylorada"]


def test_only_lorada_and_longlora_change_the_attention():
    assert [name for name in PRESETS if baseline_config(name).daa_enabled] == ["lorada"]
    assert [name for name in PRESETS if baseline_config(name).s2_attn_enabled] == ["longlora"]
    assert baseline_config("longlora").s2_shift_mode == "heads"


@pytest.mark.parametrize("name", ["baseline", "full", "sparse"])
def test_the_other_methods_have_no_config(name):
    assert baseline_config(name, lora_rank=64) is None


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("method", ["full", "sparse"])
def test_the_other_methods_checkpoint_as_all_do(make_base, method, checkpointing):
    model = get_baseline_model(method, make_base(), gradient_checkpointing=checkpointing)
    assert model.is_gradient_checkpointing == checkpointing


def test_shared_fields_reach_every_method():
    for name in PRESETS:
        config = baseline_config(name, lora_rank=3, lora_target_modules=("c_attn",))
        assert (config.lora_rank, config.lora_target_modules) == (3, ("c_attn",))
    with pytest.raises(ValueError, match="lora_rank must be at least 1"):
        get_baseline_model("full", None, lora_rank=0)


def test_sparse_adapter_is_its_formula():
    torch.manual_seed(0)
    adapter = SparseAdapter(6, 5, 2, dtype=torch.float64)
    with torch.no_grad():
        adapter.up.normal_()
        adapter.scores.copy_(torch.tensor([0.1, 3.0, -1.0, 0.2, 0.0]))
    f = torch.randn(4, 6, dtype=torch.float64)
    units = torch.nn.functional.gelu(f @ adapter.down.T)
    expected = f + units[:, 1:4:2] @ adapter.up[:, 1:4:2].T
    torch.testing.assert_close(adapter(f), expected)
    assert adapter.mask().tolist() == [0, 1, 0, 1, 0]
    adapter(f).square().sum().backward()
    # a unit that is off has a way back
    assert (adapter.scores.grad != 0).all()
    assert (
        (adapter.down.grad.abs().sum(1) > 0).tolist()
        == (adapter.up.grad.abs().sum(0) > 0).tolist()
        == [
            False,
            True,
            False,
            True,
            False,
        ]
    )


def test_a_sparse_unit_that_is_off_comes_on():
    torch.manual_seed(0)
    adapter = SparseAdapter(1, 2, 1)
    with torch.no_grad():
        adapter.scores.copy_(torch.tensor([0.1, 0.0]))
        adapter.up.copy_(torch.tensor([[-1.0, 1.0]]))
        adapter.down.fill_(1.0)
    optimizer = torch.optim.SGD([adapter.scores], lr=0.1)
    for _ in range(20):
        optimizer.zero_grad()
        # the second unit lifts the output, the first lowers it
        (adapter(torch.ones(1, 1)) - 2).square().sum().backward()
        optimizer.step()
    assert adapter.mask().tolist() == [0, 1]


def test_sparse_adapters_stand_behind_every_mlp(make_base, family):
    assert len(find_mlp_outputs(make_base(family))) == 2


def test_sparse_adapters_refuse_what_does_not_fit():
    with pytest.raises(ValueError, match="active must be from 1 to units=4, got 5"):
        SparseAdapter(8, 4, 5)
    with pytest.raises(ValueError, match="sparse adapters found no MLP"):
        get_baseline_model("sparse", torch.nn.Sequential(torch.nn.Linear(2, 2)))


def test_unknown_method_is_named_with_the_known_ones():
    known = "baseline, full, sparse, lora, rslora, dora, lorada, longlora, hylorada"
    with pytest.raises(ValueError, match=f"unknown method 'qlora': use one of {known}"):
        baseline_config("qlora")


def test_method_cannot_be_turned_into_another():
    with pytest.raises(ValueError, match="'dora' decides use_rslora itself"):
        baseline_config("dora", use_rslora=True)
