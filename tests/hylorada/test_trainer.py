"""The training loop against plain loops, bit-for-bit repetition, and its refusals."""

import copy
import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset
from transformers import Trainer, TrainingArguments

from hylorada.data import collate
from hylorada.evaluation import mean_loss
from hylorada.trainer import _SCHEDULERS, HyLoRADATrainer, TrainingConfig

LENGTHS = [12, 5, 9, 2, 16, 7, 11, 3, 8]


@pytest.fixture
def rows():
    """Rows of different lengths, so that batches hold padding and different numbers of tokens."""
    generator = torch.Generator().manual_seed(2)
    return [{"input_ids": torch.randint(3, 97, (length,), generator=generator).tolist()} for length in LENGTHS]


def loader(rows, batch_size, shuffle=False):
    return DataLoader(rows, batch_size=batch_size, shuffle=shuffle, collate_fn=collate)


def config(**fields):
    return TrainingConfig(**{"mixed_precision": "fp32", "show_progress": False} | fields)


def trainable(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def sgd(model, lr=0.5):
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)


def plain_loop(model, rows, groups, lr=0.5):
    """Gradient descent on each group's mean loss over its tokens, one row at a time: no padding, no batches."""
    optimizer = sgd(model, lr)
    losses = []
    for group in groups:
        total, tokens = 0.0, 0
        for i in group:
            ids = torch.tensor([rows[i]["input_ids"]])
            log_probabilities = model(ids).logits[:, :-1].log_softmax(-1)
            total = total - log_probabilities.gather(-1, ids[:, 1:, None]).sum()
            tokens += ids.shape[1] - 1
        optimizer.zero_grad()
        (total / tokens).backward()
        optimizer.step()
        losses.append((total / tokens).item())
    return losses


def assert_same_parameters(actual, expected, **tolerance):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


@pytest.mark.parametrize(("batch_size", "accumulation"), [(1, 4), (2, 2), (4, 1)])
def test_training_equals_a_plain_loop(make_model, rows, batch_size, accumulation):
    # 9 rows: two groups of 4, and a last one of a single row that steps too
    model, reference = make_model(dtype=torch.float64), make_model(dtype=torch.float64)
    before = trainable(model)
    losses = plain_loop(reference, rows, [(0, 1, 2, 3), (4, 5, 6, 7), (8,)])
    result = HyLoRADATrainer(
        model,
        loader(rows, batch_size),
        config=config(gradient_accumulation_steps=accumulation, max_grad_norm=None, lr_scheduler="constant"),
        optimizer=sgd(model),
    ).train()

    assert [record.tokens for record in result.steps] == [24, 33, 7]
    assert [record.loss for record in result.steps] == pytest.approx(losses, rel=1e-6)
    # the loss is taken in fp32
    assert_same_parameters(trainable(model), trainable(reference), rtol=1e-5, atol=1e-6)
    assert all(
        (before[name] - value).abs().max() > 1e-4 for name, value in trainable(model).items() if "table" not in name
    )


def test_whole_models_train_too(make_base, rows):
    model, reference = make_base("gpt2", torch.float64), make_base("gpt2", torch.float64)
    plain_loop(reference, rows, [range(9)], lr=0.1)
    HyLoRADATrainer(
        model,
        loader(rows, 3),
        config=config(gradient_accumulation_steps=3, max_grad_norm=None),
        optimizer=sgd(model, lr=0.1),
    ).train()
    assert_same_parameters(trainable(model), trainable(reference), rtol=1e-5, atol=1e-6)


def run_with_dropout(make_model, rows, seed, **fields):
    model = make_model(start=True, lora_dropout=0.3)
    # whatever state the process is in
    torch.seed()
    result = HyLoRADATrainer(
        model, loader(rows, 2, shuffle=True), config=config(num_epochs=2, learning_rate=1e-2, seed=seed, **fields)
    ).train()
    return [record.loss for record in result.steps], [record.tokens for record in result.steps], trainable(model)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_seed_repeats_bit_for_bit(make_model, rows, precision):
    losses, tokens, parameters = run_with_dropout(make_model, rows, seed=3, mixed_precision=precision)
    again_losses, again_tokens, again = run_with_dropout(make_model, rows, seed=3, mixed_precision=precision)
    assert (losses, tokens) == (again_losses, again_tokens)
    assert_same_parameters(again, parameters, rtol=0, atol=0)


def test_another_seed_orders_the_data_differently(make_model, rows):
    assert run_with_dropout(make_model, rows, seed=3)[1] != run_with_dropout(make_model, rows, seed=4)[1]


def test_epochs_order_the_data_differently(make_model, rows):
    tokens = run_with_dropout(make_model, rows, seed=3)[1]
    assert len(tokens) == 10 and tokens[:5] != tokens[5:]


def test_order_of_the_data_does_not_depend_on_the_model(make_model, rows):
    orders = []
    # dropout draws random numbers between the epochs
    for fields in ({"lora_dropout": 0.3}, {"use_dora_magnitude": False, "use_blend": False}):
        model = make_model(**fields)
        result = HyLoRADATrainer(model, loader(rows, 2, shuffle=True), config=config(num_epochs=2, seed=5)).train()
        orders.append([record.tokens for record in result.steps])
    assert orders[0] == orders[1]


def test_bf16_computes_in_bf16_and_keeps_adapters_in_fp32(make_model, rows):
    losses = {}
    for precision in ("fp32", "bf16"):
        model = make_model()
        fields = config(mixed_precision=precision, learning_rate=1e-2)
        result = HyLoRADATrainer(model, loader(rows, 3), config=fields).train()
        losses[precision] = [record.loss for record in result.steps]
        assert all(p.dtype == torch.float32 for p in model.parameters())
    # bf16 has 8 bits: its losses are near the fp32 ones, and not the same
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=2**-6)
    assert losses["bf16"] != losses["fp32"]


def test_fp16_trains_under_a_loss_scale(make_model, rows):
    losses = {}
    for precision in ("fp32", "fp16"):
        model = make_model()
        result = HyLoRADATrainer(
            model, loader(rows, 3), config=config(mixed_precision=precision, learning_rate=2e-3, num_epochs=4)
        ).train()
        losses[precision] = [record.loss for record in result.steps]
        assert all(p.dtype == torch.float32 and p.isfinite().all() for p in model.parameters())
    # fp16 has 11 bits; at higher rates the two runs drift apart however little they differ
    assert losses["fp16"] == pytest.approx(losses["fp32"], rel=2**-6)


def test_precision_is_inherited_unless_the_training_says_otherwise(make_base, make_model, rows):
    batches = loader(rows, 3)
    adapted = make_model(mixed_precision="bf16")
    assert HyLoRADATrainer(adapted, batches, config=config(mixed_precision=None)).precision == "bf16"
    assert HyLoRADATrainer(adapted, batches, config=config(mixed_precision="fp32")).precision == "fp32"
    assert HyLoRADATrainer(make_base(), batches, config=config(mixed_precision=None)).precision == "fp32"


def test_forward_of_the_model_is_left_alone(make_model, rows):
    model = make_model()
    HyLoRADATrainer(model, loader(rows, 3), config=config(mixed_precision="bf16")).train()
    assert "forward" not in vars(model)
    ids = torch.tensor([rows[0]["input_ids"]])
    with torch.no_grad():
        torch.testing.assert_close(copy.deepcopy(model)(ids).logits, model(ids).logits, rtol=0, atol=0)


def test_dropout_acts_while_training(make_model, rows):
    losses = []
    for dropout in (0.0, 0.5):
        model = make_model(lora_dropout=dropout).eval()
        losses.append(HyLoRADATrainer(model, loader(rows, 9), config=config()).train().steps[0].loss)
    assert losses[0] != pytest.approx(losses[1], rel=1e-5)


def test_frozen_weights_stay(make_model, rows):
    model = make_model(start=True)
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    HyLoRADATrainer(model, loader(rows, 3), config=config(learning_rate=0.1, weight_decay=0.5)).train()
    after = dict(model.named_parameters())
    assert frozen and all(torch.equal(after[name], value) for name, value in frozen.items())


def test_evaluation_after_each_epoch_and_at_the_end(make_model, rows):
    model = make_model()
    evaluation = loader(rows[:4], 2)
    fields = config(max_steps=8, learning_rate=1e-2)
    result = HyLoRADATrainer(model, loader(rows, 3), evaluation, config=fields).train()
    assert sorted(result.eval_losses) == [3, 6, 8]
    assert result.eval_losses[8] == mean_loss(model, evaluation)
    assert result.eval_losses[3] > result.eval_losses[8]
    assert not any(module.training for module in model.modules())


def test_eval_steps_decides_when_to_evaluate(make_model, rows):
    model = make_model()
    fields = config(max_steps=5, eval_steps=2)
    result = HyLoRADATrainer(model, loader(rows, 3), loader(rows[:2], 2), config=fields).train()
    assert sorted(result.eval_losses) == [2, 4, 5]


def test_learning_rate_warms_up_and_decays(make_model, rows):
    model = make_model()
    fields = config(max_steps=8, learning_rate=0.8, warmup_ratio=0.25)
    result = HyLoRADATrainer(model, loader(rows, 3), config=fields, optimizer=None).train()
    expected = [0, 0.4, *(0.8 * (8 - step) / 6 for step in range(2, 8))]
    assert [record.learning_rate for record in result.steps] == pytest.approx(expected)


def test_magnitudes_and_positions_have_their_own_rates(make_model, rows):
    model = make_model()
    before = trainable(model)
    rates = {"learning_rate": 1e-3, "magnitude_learning_rate": 2e-3, "position_learning_rate": 4e-3}
    fields = config(max_steps=1, lr_scheduler="constant", max_grad_norm=None, **rates)
    HyLoRADATrainer(model, loader(rows, 9), config=fields).train()

    # Adam's first step is the rate itself, whatever the gradient
    for name, value in trainable(model).items():
        moved = (value - before[name]).abs().max().item()
        kind = "magnitude" if "magnitude" in name else "position" if "position" in name else "learning"
        if "residual_weight" not in name:
            assert moved == pytest.approx(
                rates["learning_rate" if kind == "learning" else f"{kind}_learning_rate"], rel=1e-2
            ), name


def test_weight_decay_shrinks_what_has_no_gradient(make_model, rows):
    model = make_model(start=True)
    before = trainable(model)
    fields = config(max_steps=1, learning_rate=1e-2, weight_decay=0.5, lr_scheduler="constant")
    HyLoRADATrainer(model, loader(rows, 9), config=fields).train()
    # with B at 0, A has no gradient in the first step
    shrunk = {name: value * (1 - 1e-2 * 0.5) for name, value in before.items() if "lora_a" in name}
    assert_same_parameters({name: trainable(model)[name] for name in shrunk}, shrunk)


def test_gradients_are_clipped_to_the_norm(make_model, rows):
    model = make_model()
    before = trainable(model)
    fields = config(max_steps=1, max_grad_norm=1e-3, lr_scheduler="constant")
    result = HyLoRADATrainer(model, loader(rows, 9), config=fields, optimizer=sgd(model, lr=1.0)).train()
    moved = torch.cat([(value - before[name]).flatten() for name, value in trainable(model).items()]).norm().item()
    assert result.steps[0].grad_norm > 1e-2
    assert moved == pytest.approx(1e-3, rel=1e-2)


class Endless(IterableDataset):
    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return itertools.cycle(self.rows)


def test_data_without_length_needs_max_steps(make_model, rows):
    batches = DataLoader(Endless(rows), batch_size=2, collate_fn=collate)
    with pytest.raises(ValueError, match=r"no length.*max_steps"):
        HyLoRADATrainer(make_model(), batches, config=config()).train()
    assert len(HyLoRADATrainer(make_model(), batches, config=config(max_steps=7)).train().steps) == 7


def test_exploding_loss_stops_before_the_update(make_model, rows):
    model = make_model()
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "lora_b" in name).fill_(torch.nan)
    before = trainable(model)
    with pytest.raises(RuntimeError, match=r"step 1 has the loss nan.*learning rate"):
        HyLoRADATrainer(model, loader(rows, 3), config=config()).train()
    assert_same_parameters(trainable(model), before, rtol=0, atol=0, equal_nan=True)


def test_batches_without_labels_to_learn_are_refused(make_model):
    rows = [{"input_ids": [3, 4, 5], "labels": [-100] * 3}]
    with pytest.raises(ValueError, match="no token to learn from"):
        HyLoRADATrainer(make_model(), loader(rows, 1), config=config()).train()


def test_one_batch_without_labels_in_a_group_is_fine(make_model, rows):
    silent = {"input_ids": [3, 4, 5], "labels": [-100] * 3}
    losses = []
    for data in ([rows[0], silent], [rows[0]]):
        fields = config(gradient_accumulation_steps=2)
        losses.append(HyLoRADATrainer(make_model(), loader(data, 1), config=fields).train().steps[0].loss)
    assert losses[0] == losses[1]


def test_empty_data_is_refused(make_model):
    with pytest.raises(ValueError, match="yields no batch"):
        HyLoRADATrainer(make_model(), loader([], 1), config=config(max_steps=3)).train()


def test_model_without_trainable_parameters_is_refused(make_base, rows):
    with pytest.raises(ValueError, match="no trainable parameter"):
        HyLoRADATrainer(make_base().requires_grad_(False), loader(rows, 3), config=config()).train()


def test_rates_of_adapters_need_an_adapted_model(make_base, rows):
    with pytest.raises(ValueError, match="adapted by HyLoRADAModel"):
        HyLoRADATrainer(make_base(), loader(rows, 3), config=config(magnitude_learning_rate=1e-3)).train()


def test_batch_size_of_config_and_dataloader_must_agree(make_model, rows):
    with pytest.raises(ValueError, match=r"per_device_batch_size is 1.*batches of 3"):
        HyLoRADATrainer(make_model(), loader(rows, 3), config=config(per_device_batch_size=1))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_epochs", 0),
        ("gradient_accumulation_steps", 0),
        ("max_steps", 0),
        ("learning_rate", 0.0),
        ("max_grad_norm", -1.0),
        ("weight_decay", -0.1),
        ("warmup_ratio", 1.0),
        ("mixed_precision", "int8"),
        ("lr_scheduler", "sawtooth"),
        ("lr_scheduler", "cosine_with_min_lr"),
        ("lr_scheduler", "cosine_warmup_with_min_lr"),
        ("learning_rate", float("inf")),
        ("position_learning_rate", float("nan")),
        ("weight_decay", float("inf")),
        ("seed", -1),
        ("seed", 2**32),
    ],
)
def test_bad_values_are_named(field, value):
    with pytest.raises(ValueError, match=f"{field} must be .*{value}"):
        TrainingConfig(**{field: value})


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("num_epochs", 1.5, "a whole number"),
        ("num_epochs", "3", "a whole number"),
        ("num_epochs", None, "a whole number"),
        ("num_epochs", True, "a whole number"),
        ("max_steps", 2.5, "a whole number"),
        ("gradient_accumulation_steps", 1.5, "a whole number"),
        ("seed", 0.5, "a whole number"),
        ("learning_rate", "2e-4", r"a number \(positive and finite\)"),
        ("learning_rate", None, r"a number \(positive and finite\)"),
        ("weight_decay", "0", r"a number \(0 or more and finite\)"),
        ("warmup_ratio", "0", r"a number \(in \[0, 1\)\)"),
    ],
)
def test_values_of_other_kinds_are_named(field, value, allowed):
    with pytest.raises(TypeError, match=f"^{field} must be {allowed}, got {value!r}$"):
        TrainingConfig(**{field: value})


@pytest.mark.parametrize("name", _SCHEDULERS)
def test_every_accepted_schedule_can_be_built(make_model, rows, name):
    has_warmup = name != "constant"
    fields = config(max_steps=2, lr_scheduler=name, warmup_ratio=0.5 if has_warmup else 0.0)
    result = HyLoRADATrainer(make_model(), loader(rows, 3), config=fields).train()
    assert [record.learning_rate for record in result.steps] == ([0.0, 2e-4] if has_warmup else [2e-4, 2e-4])


def test_options_that_would_do_nothing_are_refused(make_model, rows):
    with pytest.raises(ValueError, match=r'warmup_ratio=0\.1: lr_scheduler="constant" has no warm-up; use "constant_w'):
        TrainingConfig(lr_scheduler="constant", warmup_ratio=0.1)
    with pytest.raises(ValueError, match=r"^eval_steps=2 needs an eval_dataloader$"):
        HyLoRADATrainer(make_model(), loader(rows, 3), config=config(eval_steps=2))
    bare = make_model(use_dora_magnitude=False, position_bias_enabled=False)
    for rate, part in (("magnitude_learning_rate", "magnitude or residual_weight"), ("position_learning_rate", "pos")):
        with pytest.raises(ValueError, match=f"^{rate}=0.001, but the model trains no {part}"):
            HyLoRADATrainer(bare, loader(rows, 3), config=config(**{rate: 1e-3})).train()


def test_seed_examples_run_as_written(make_model, rows):
    train_config = TrainingConfig(
        num_epochs=3,
        learning_rate=2e-4,
        per_device_batch_size=1,
        gradient_accumulation_steps=16,
        mixed_precision="bf16",
    )
    trainer = HyLoRADATrainer(
        model=make_model(), train_dataloader=loader(rows, 1), eval_dataloader=loader(rows[:2], 1), config=train_config
    )
    assert len(trainer.train().steps) == 3


def test_trainer_of_transformers_trains_the_same_model(make_model, rows, tmp_path):
    """Its loop is another one: equal where all rows are one batch."""
    ours, theirs = make_model(), make_model()
    fields = config(max_steps=3, lr_scheduler="constant", max_grad_norm=None)
    HyLoRADATrainer(ours, loader(rows, len(rows)), config=fields, optimizer=sgd(ours)).train()
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=3,
        per_device_train_batch_size=len(rows),
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    Trainer(
        model=theirs, args=arguments, train_dataset=rows, data_collator=collate, optimizers=(sgd(theirs), None)
    ).train()
    assert_same_parameters(trainable(theirs), trainable(ours), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("padded", [False, True])
def test_trl_trains_the_same_model(make_model, tokenizer, tmp_path, padded):
    """Its loss is over the same tokens, so that its steps are ours."""
    pytest.importorskip("trl")
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from hylorada.integrations.trl import prepare_sft

    rows = [{"input_ids": list(range(3, 3 + length))} for length in ((5, 9, 7, 12) if padded else (9,) * 4)]
    parts = {"position_bias_enabled": True, "landmark_enabled": True}
    ours, theirs = make_model(**parts), make_model(**parts)
    fields = config(max_steps=5, lr_scheduler="constant", max_grad_norm=None)
    result = HyLoRADATrainer(ours, loader(rows, 4), config=fields, optimizer=sgd(ours)).train()
    arguments = SFTConfig(
        output_dir=str(tmp_path),
        max_steps=5,
        per_device_train_batch_size=4,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        max_length=64,
        use_cpu=True,
        bf16=False,
    )
    trainer = SFTTrainer(
        model=theirs,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        optimizers=(sgd(theirs), None),
    )
    prepare_sft(trainer).train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses == pytest.approx([record.loss for record in result.steps], rel=1e-4)
    assert losses[-1] < losses[0]
    assert_same_parameters(trainable(theirs), trainable(ours), rtol=1e-4, atol=1e-5)


class Constant(torch.nn.Module):
    """Predicts every token with the same three probabilities, proportional to 1, 2 and 3."""

    def __init__(self):
        super().__init__()
        self.scores = torch.nn.Parameter(torch.tensor([1.0, 2.0, 3.0]).log())

    def forward(self, input_ids, **_):
        return SimpleNamespace(logits=self.scores.expand(*input_ids.shape, 3))


def test_loss_and_gradient_are_those_of_a_computation_by_hand():
    # predicted: 2 | 1 0 (its 2 is masked) | 2 2, of lengths that the batch pads
    rows = [{"input_ids": [0, 2]}, {"input_ids": [1, 2, 1, 0], "labels": [1, -100, 1, 0]}, {"input_ids": [0, 2, 2]}]
    model = Constant()
    fields = config(gradient_accumulation_steps=2, max_grad_norm=None, lr_scheduler="constant")
    result = HyLoRADATrainer(model, loader(rows, 2), config=fields, optimizer=sgd(model, lr=1.0)).train()
    # -log of 1/2, 1/3, 1/6, 1/2, 1/2
    assert result.steps[0].loss == pytest.approx(math.log(2 * 3 * 6 * 2 * 2) / 5)
    assert result.steps[0].tokens == 5 and len(result.steps) == 1
    # the probabilities less the parts that the five tokens have: 1/6 - 1/5, 1/3 - 1/5, 1/2 - 3/5
    gradient = torch.tensor([-1 / 30, 2 / 15, -1 / 10])
    torch.testing.assert_close(model.scores.detach(), torch.tensor([1.0, 2.0, 3.0]).log() - gradient)
    assert result.steps[0].grad_norm == pytest.approx(gradient.norm().item())
