"""Perplexity against hand-computed values."""

import math

import pytest
import torch

from hylorada.evaluation import evaluate_perplexity, mean_loss

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
