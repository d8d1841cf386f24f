"""Perplexity and comparisons of models against hand-computed values."""

import json
import math

import pytest
import torch

from hylorada import HyLoRADAConfig, HyLoRADAModel
from hylorada.evaluation import (
    KeyValueTask,
    compare_models,
    evaluate_lost_in_the_middle,
    evaluate_passkey,
    evaluate_perplexity,
    mean_loss,
    run_full_evaluation,
)
from hylorada.statistics import bootstrap_interval

TEXTS = ["In the beginning", "was the word, and it was good.", "so"]


def loss_by_hand(model, sequences) -> float:
    """Mean of -log p over every token but a sequence's first; one sequence at a time, so that nothing is padded."""
    losses = []
    for sequence in sequences:
        with torch.no_grad():
            log_probabilities = model(torch.tensor([sequence])).logits[0].log_softmax(-1)
        losses += [-log_probabilities[i, token].item() for i, token in enumerate(sequence[1:])]
    return sum(losses) / len(losses)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_perplexity_is_weighted_by_tokens(make_base, tokenizer, family, batch_size):
    model = make_base(family, torch.float64)
    tokens = [tokenizer(text)["input_ids"] for text in TEXTS]
    sequences = [sequence[i : i + 8] for sequence in tokens for i in range(0, len(sequence), 8)]
    assert len({len(sequence) for sequence in sequences}) > 2

    perplexity, loss = evaluate_perplexity(model, TEXTS, tokenizer, max_length=8, batch_size=batch_size)

    # the logits are evaluated in fp32
    assert loss == pytest.approx(loss_by_hand(model, sequences), rel=1e-6)
    assert perplexity == pytest.approx(math.exp(loss), rel=1e-12)


def test_loss_is_not_the_mean_over_texts(make_base, tokenizer):
    model = make_base(dtype=torch.float64)
    _, loss = evaluate_perplexity(model, TEXTS, tokenizer)
    each = [evaluate_perplexity(model, [text], tokenizer)[1] for text in TEXTS]
    weights = [len(text) - 1 for text in TEXTS]
    assert loss == pytest.approx(sum(w * x for w, x in zip(weights, each, strict=True)) / sum(weights), rel=1e-6)
    assert loss != pytest.approx(sum(each) / len(each), rel=1e-4)


def test_texts_and_rows_are_the_same_data(make_base, tokenizer):
    model = make_base()
    ids = [tokenizer(text)["input_ids"] for text in TEXTS]
    expected = evaluate_perplexity(model, TEXTS, tokenizer)
    assert evaluate_perplexity(model, [{"text": text} for text in TEXTS], tokenizer) == expected
    assert evaluate_perplexity(model, [{"input_ids": row} for row in ids]) == expected
    assert evaluate_perplexity(model, [{"input_ids": torch.tensor(row)} for row in ids]) == expected


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_of_rows_changes_nothing(make_base, tokenizer, side):
    model = make_base()
    rows = []
    for ids in (tokenizer(text)["input_ids"] for text in TEXTS):
        padding, real = [2] * (40 - len(ids)), [1] * len(ids)
        hidden = [0] * len(padding)
        left = side == "left"
        rows.append(
            {
                "input_ids": padding + ids if left else ids + padding,
                "attention_mask": hidden + real if left else real + hidden,
            }
        )
    assert evaluate_perplexity(model, rows, tokenizer) == evaluate_perplexity(model, TEXTS, tokenizer)


@pytest.mark.parametrize("padded", [[5, 6, 7, 8, 2, 2], [2, 2, 5, 6, 7, 8]])
def test_padding_in_a_batch_is_not_predicted(make_base, padded):
    model = make_base(dtype=torch.float64)
    real = torch.tensor([padded]) != 2
    positions = (real.cumsum(-1) - 1).clamp(min=0)
    batch = {"input_ids": torch.tensor([padded]), "attention_mask": real.long(), "position_ids": positions}
    assert mean_loss(model, [batch]) == pytest.approx(loss_by_hand(model, [[5, 6, 7, 8]]), rel=1e-6)


def test_ignored_labels_do_not_count(make_base):
    model = make_base(dtype=torch.float64)
    ids = [5, 6, 7, 8, 9]
    _, loss = evaluate_perplexity(model, [{"input_ids": ids, "labels": [-100, -100, -100, 8, 9]}])
    with torch.no_grad():
        log_probabilities = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    assert loss == pytest.approx(-(log_probabilities[2, 8] + log_probabilities[3, 9]).item() / 2, rel=1e-6)


def test_adapted_model_starts_with_the_perplexity_of_its_base(make_base, make_model, tokenizer):
    expected = evaluate_perplexity(make_base(), TEXTS, tokenizer)
    assert evaluate_perplexity(make_model(start=True), TEXTS, tokenizer) == pytest.approx(expected, rel=1e-6)


def test_modes_are_restored(make_base, tokenizer):
    model = make_base().train()
    model.lm_head.eval()
    before = [module.training for module in model.modules()]
    evaluate_perplexity(model, TEXTS, tokenizer)
    assert [module.training for module in model.modules()] == before


def test_dropout_is_off(make_base, make_model, tokenizer):
    model = make_model(lora_dropout=0.5)
    expected = evaluate_perplexity(model, TEXTS, tokenizer)
    assert evaluate_perplexity(model.train(), TEXTS, tokenizer) == expected


def test_overflow_is_infinite(make_base, tokenizer):
    model = make_base()
    model.lm_head.weight.data *= 1e5
    perplexity, loss = evaluate_perplexity(model, TEXTS, tokenizer)
    assert perplexity == math.inf and math.isfinite(loss)


@pytest.mark.parametrize(
    ("dataset", "options", "message"),
    [
        ([], {}, "no token to predict"),
        (["a", ""], {}, "no token to predict"),
        ([{"content": "text"}], {}, "'text' or 'input_ids'.*content"),
        ([{"input_ids": [3, 4], "labels": [3]}], {}, "2 input_ids, 1 labels"),
        ([{"input_ids": [[3, 4]]}], {}, r"one dimension.*\(1, 2\)"),
        (TEXTS, {"max_length": 1}, "max_length must be at least 2"),
        (TEXTS, {"batch_size": 0}, "batch_size must be at least 1"),
        (TEXTS, {"max_length": 8, "stride": 8}, r"stride must lie between 1 and max_length - 1 = 7, got 8"),
        (TEXTS, {"max_length": 8, "stride": 0}, "stride must lie between 1 and max_length - 1 = 7, got 0"),
        ([{"input_ids": [3, 4], "position_ids": [0, 1]}], {}, "packed of several documents"),
    ],
)
def test_bad_input_is_named(make_base, tokenizer, dataset, options, message):
    with pytest.raises(ValueError, match=message):
        evaluate_perplexity(make_base(), dataset, tokenizer, **options)


def test_texts_need_a_tokenizer(make_base):
    with pytest.raises(ValueError, match="pass tokenizer="):
        evaluate_perplexity(make_base(), TEXTS)


def test_windows_beyond_learned_positions_are_refused(make_base, tokenizer):
    with pytest.raises(ValueError, match=r"129 tokens.*128 positions"):
        evaluate_perplexity(make_base("gpt2"), ["a" * 129], tokenizer)


@pytest.mark.parametrize(("stride", "batch_size"), [(1, 4), (3, 1), (7, 3)])
def test_sliding_windows_predict_every_token_once_with_their_context(make_base, tokenizer, stride, batch_size):
    model = make_base(dtype=torch.float64)
    losses = []
    for ids in (tokenizer(text)["input_ids"] for text in TEXTS):
        for target in range(1, len(ids)):
            # the first window reaches to 8; then one begins at every multiple of stride
            start = 0 if target < 8 else stride * -(-(target - 7) // stride)
            assert target - start >= min(target, 8 - stride) and target - start < 8
            losses.append(loss_of_token(model, ids[start:target], ids[target]))
    _, loss = evaluate_perplexity(model, TEXTS, tokenizer, max_length=8, stride=stride, batch_size=batch_size)
    assert loss == pytest.approx(sum(losses) / len(losses), rel=1e-6)


def loss_of_token(model, context, token) -> float:
    with torch.no_grad():
        return -model(torch.tensor([context])).logits[0, -1].log_softmax(-1)[token].item()


def test_sliding_windows_skip_ignored_labels(make_base):
    model = make_base(dtype=torch.float64)
    ids, labels = list(range(5, 17)), [-100] * 9 + [14, -100, 16]
    _, loss = evaluate_perplexity(model, [{"input_ids": ids, "labels": labels}], max_length=6, stride=2)
    by_hand = [loss_of_token(model, ids[4:9], 14), loss_of_token(model, ids[6:11], 16)]
    assert loss == pytest.approx(sum(by_hand) / 2, rel=1e-6)


def test_models_are_compared_window_by_window(make_base, make_model, tokenizer):
    models = {"base": make_base(dtype=torch.float64), "adapted": make_model(dtype=torch.float64)}
    found = compare_models(models, TEXTS, tokenizer, max_length=8, batch_size=2)

    for name, model in models.items():
        perplexity, loss = evaluate_perplexity(model, TEXTS, tokenizer, max_length=8)
        assert found["models"][name]["loss"] == pytest.approx(loss, rel=1e-6)
        assert found["models"][name]["perplexity"] == pytest.approx(perplexity, rel=1e-6)

    tokens = [tokenizer(text)["input_ids"] for text in TEXTS]
    windows = [ids[i : i + 8] for ids in tokens for i in range(0, len(ids) - 1, 8)]
    differences = [loss_by_hand(models["adapted"], [w]) - loss_by_hand(models["base"], [w]) for w in windows]
    weights = [len(window) - 1 for window in windows]
    assert found["windows"] == len(windows) and found["tokens"] == sum(weights)
    difference = found["models"]["adapted"]["loss_difference"]
    mean = sum(w * d for w, d in zip(weights, differences, strict=True)) / sum(weights)
    assert difference["mean"] == pytest.approx(mean, rel=1e-5)
    assert difference["interval"] == pytest.approx(bootstrap_interval(differences, weights), rel=1e-5)
    assert found["compared_with"] == "base" and "loss_difference" not in found["models"]["base"]


def test_equal_models_differ_by_nothing(make_base, tokenizer):
    found = compare_models({"a": make_base(), "b": make_base()}, iter(TEXTS), tokenizer)
    assert found["models"]["b"]["loss_difference"] == {"mean": 0, "interval": [0, 0]}


def test_comparison_needs_two_models(make_base, tokenizer):
    with pytest.raises(ValueError, match=r"at least 2 models, got \['a'\]"):
        compare_models({"a": make_base()}, TEXTS, tokenizer)


LETTERS = [letter * 2 for letter in "abcdefghijklmnopqrstuvwxyz"]
TASK = KeyValueTask(
    num_pairs=4, keys=LETTERS, values=LETTERS, header="", pair="{key} {value}", question="\n{key}", answer=" {value}"
)


def test_full_evaluation_is_its_parts(make_base, tokenizer):
    config = HyLoRADAConfig(lora_rank=4, lora_target_modules=("q_proj",), max_sequence_length=400)
    model = HyLoRADAModel(make_base(max_position_embeddings=512), config)
    dataset = ["It was the best of times, it was the worst of times. " * 12]
    found = run_full_evaluation(
        model=model, test_dataset=iter(dataset), tokenizer=tokenizer, config=config, num_samples=1, task=TASK, seed=3
    )
    assert found["max_length"] == 400
    assert found["config"] == config.to_dict()
    assert found["parameters"] == {name: model.count_params()[name] for name in ("total", "trainable")}
    assert (found["perplexity"], found["loss"]) == evaluate_perplexity(model, dataset, tokenizer, 400)
    shared = {"max_length": 400, "seed": 3}
    assert found["lost_in_the_middle"] == evaluate_lost_in_the_middle(model, dataset, tokenizer, 1, task=TASK, **shared)
    assert found["passkey"] == evaluate_passkey(model, tokenizer, 1, **shared)
    json.dumps(found)


def test_full_evaluation_reads_no_further_than_the_model(make_base, tokenizer):
    model = make_base(max_position_embeddings=300)
    found = run_full_evaluation(model, ["It was the best of times. " * 20], tokenizer, num_samples=1, task=TASK)
    assert found["max_length"] == 300 and found["config"] is None
