"""Retrieval by depth: what the prompts say, what is counted, and models whose answers are known."""

import math
import random
import re

import pytest
import torch
from torch import nn

from hylorada import retrieval
from hylorada.evaluation import evaluate_lost_in_the_middle, evaluate_passkey, evidence_by_depth, position_perplexity
from hylorada.perplexity import evaluate_perplexity
from hylorada.retrieval import (
    KeyValueTask,
    best_subspan_em,
    by_depth,
    candidate_scores,
    key_value_retrieval,
)
from hylorada.statistics import bootstrap_interval

LETTERS = [letter * 2 for letter in "abcdefghijklmnopqrstuvwxyz"]
TASK = KeyValueTask(
    num_pairs=9,
    keys=LETTERS,
    values=[letters.upper() for letters in LETTERS],
    header="",
    pair="{key} {value}",
    separator=".",
    question="\n{key}",
    answer=" {value}",
)


class Reader(nn.Module):
    """Continues a text with what followed the first earlier place with its last two tokens, if that is in sight.

    sight(position, length) -> whether a position of a text of a length is read
    """

    def __init__(self, sight=lambda position, length: True):
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(()))
        self.sight = sight

    def forward(self, input_ids, cache=None, use_cache=False):
        known = cache.ids if cache is not None else input_ids[:, :0]
        ids = torch.cat([known, input_ids], 1)
        logits = torch.zeros(*input_ids.shape, 97)
        for row, text in enumerate(ids.tolist()):
            for place in range(known.shape[1], len(text)):
                logits[row, place - known.shape[1]] = self._next(text[: place + 1])
        return Output(logits=logits, cache=Texts(ids) if use_cache else None)

    def _next(self, text):
        logits = torch.zeros(97)
        for start in range(len(text) - 2):
            if text[start : start + 2] == text[-2:] and self.sight(start, len(text)):
                logits[text[start + 2]] = 10
                break
        return logits

    def generate(self, input_ids, attention_mask, max_new_tokens, **options):
        assert attention_mask.all() and not options["do_sample"]
        for _ in range(max_new_tokens):
            input_ids = torch.cat([input_ids, self(input_ids).logits[:, -1:].argmax(-1)], 1)
        return input_ids


class Output(dict):
    def __init__(self, **fields):
        super().__init__({name: value for name, value in fields.items() if value is not None})

    logits = property(lambda self: self["logits"])


class Texts:
    def __init__(self, ids):
        self.ids = ids

    def batch_repeat_interleave(self, repeats):
        self.ids = self.ids.repeat_interleave(repeats, 0)


def test_prompt_moves_only_the_pair_that_is_asked_for():
    task = KeyValueTask(num_pairs=3)
    pairs = [("k0", "v0"), ("k1", "v1"), ("k2", "v2")]
    assert task.prompt(pairs, 1) == (
        "Extract the value corresponding to the specified key in the JSON object below.\n\nJSON data:\n"
        '{"k1": "v1",\n "k0": "v0",\n "k2": "v2"}\n\nKey: "k0"\nCorresponding value:'
    )
    listed = [task.prompt(pairs, place).partition("{")[2].partition("}")[0] for place in range(3)]
    assert [text.replace('"', "").replace(",\n ", " ") for text in listed] == [
        "k0: v0 k1: v1 k2: v2",
        "k1: v1 k0: v0 k2: v2",
        "k1: v1 k2: v2 k0: v0",
    ]


@pytest.mark.parametrize("task", [KeyValueTask(num_pairs=20), TASK])
def test_pairs_are_distinct_and_seeded(task):
    pairs = task.sample(random.Random(1))
    assert len({key for key, _ in pairs}) == len({value for _, value in pairs}) == task.num_pairs
    assert pairs == task.sample(random.Random(1)) != task.sample(random.Random(2))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_pairs": 2}, "num_pairs must be at least 3"),
        ({"num_pairs": 4, "keys": list("abca")}, "keys must hold 4 different entries, got 3"),
    ],
)
def test_impossible_tasks_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        KeyValueTask(**fields)


def test_reader_of_everything_finds_every_value(tokenizer):
    found = key_value_retrieval(Reader(), tokenizer, 4, task=TASK, max_length=100)
    assert found["num_pairs"] == 9 and found["chance"] == 1 / 9
    for name in ("candidate_accuracy", "best_subspan_em"):
        assert found[name]["depths"] == [0, 0.25, 0.5, 0.75, 1]
        assert found[name]["mean"] == [1] * 5 and found[name]["interval"] == [[1, 1]] * 5
        assert found[name]["middle_gap"] == {"mean": 0, "interval": [0, 0]}


def test_reader_of_both_ends_is_lost_in_the_middle(tokenizer):
    reader = Reader(lambda position, length: position < 12 or position > length - 15)
    found = key_value_retrieval(reader, tokenizer, 4, task=TASK, max_length=100)
    for name in ("candidate_accuracy", "best_subspan_em"):
        assert found[name]["mean"] == [1, 0, 0, 0, 1]
        assert found[name]["worst_depth"] == 0.25
        assert found[name]["middle_gap"] == {"mean": 1, "interval": [1, 1]}


def test_model_that_reads_nothing_finds_nothing(tokenizer):
    # all candidates are equally likely, which is no hit
    found = key_value_retrieval(Reader(lambda *place: False), tokenizer, 3, task=TASK, max_length=100, num_depths=3)
    assert found["candidate_accuracy"]["mean"] == found["best_subspan_em"]["mean"] == [0, 0, 0]


def test_generation_can_be_left_out(tokenizer):
    found = key_value_retrieval(Reader(), tokenizer, 1, task=TASK, max_length=100, generate=False)
    assert found["best_subspan_em"] is None
    without = Reader()
    without.generate = None
    assert key_value_retrieval(without, tokenizer, 1, task=TASK, max_length=100) == found


CANDIDATES = [[5, 6, 7], [8], [9, 10, 11, 12, 13], [14, 15]]


def likelihood(model, prompt, candidate) -> float:
    with torch.no_grad():
        logits = model(torch.tensor([prompt + candidate])).logits[0].log_softmax(-1)
    return sum(logits[len(prompt) + i - 1, token].item() for i, token in enumerate(candidate))


def test_candidates_are_scored_as_in_one_text(make_base, family):
    model = make_base(family, torch.float64)
    prompt = [20, 21, 22, 23, 24, 25]
    with torch.no_grad():
        scores = candidate_scores(model, prompt, CANDIDATES)
    assert scores.tolist() == pytest.approx([likelihood(model, prompt, c) for c in CANDIDATES], rel=1e-5)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"landmark_enabled": True, "landmark_gate": "prefix_mean", "landmark_position": True},
        {"s2_attn_enabled": True, "s2_group_size": 4, "s2_eval": True},
        {"daa_enabled": True},
        {"rope_scaling_type": "yarn", "rope_scaling_factor": 2.0},
    ],
)
def test_adapted_models_score_candidates_as_in_one_text(make_model, fields):
    model = make_model(dtype=torch.float64, **fields).eval()
    prompt = list(range(20, 31))
    with torch.no_grad():
        scores = candidate_scores(model, prompt, CANDIDATES)
    assert scores.tolist() == pytest.approx([likelihood(model, prompt, c) for c in CANDIDATES], rel=1e-5)


def test_model_without_a_cache_is_named():
    class Forgetful(Reader):
        def forward(self, input_ids, use_cache):
            return super().forward(input_ids)

    with pytest.raises(ValueError, match="Forgetful returns none"):
        candidate_scores(Forgetful(), [5, 6], CANDIDATES)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_batches_of_prompts_are_continued_alike(make_base, tokenizer, batch_size):
    model = make_base(dtype=torch.float64)
    prompts = [list(range(10, 10 + n)) for n in (5, 9, 7, 8)]
    texts = retrieval._continuations(model, tokenizer, prompts, 6, batch_size)
    for prompt, text in zip(prompts, texts, strict=True):
        alone = model.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False)[0, len(prompt) :]
        assert text == tokenizer.decode(alone, skip_special_tokens=True)


def test_as_many_pairs_as_fit_are_listed(make_base, tokenizer):
    model = make_base(max_position_embeddings=2000)
    for max_length in (600, 900):
        found = key_value_retrieval(model, tokenizer, 1, max_length=max_length, num_depths=3, generate=False)
        # a UUID has 36 characters, of which this tokenizer makes as many tokens
        assert 0.8 * max_length < found["tokens"] <= max_length
    with pytest.raises(ValueError, match="no room for three pairs of UUIDs: give at least") as refused:
        key_value_retrieval(model, tokenizer, 2, max_length=300)
    least = int(re.search(r"at least (\d+)", str(refused.value))[1])
    found = key_value_retrieval(model, tokenizer, 1, max_length=least, num_depths=3, generate=False)
    assert found["num_pairs"] == 3


def test_prompts_that_are_too_long_are_refused(make_base, tokenizer):
    with pytest.raises(ValueError, match=r"take \d+ tokens, more than max_length=50"):
        key_value_retrieval(make_base(), tokenizer, 1, task=TASK, max_length=50)
    longer = KeyValueTask(num_pairs=26, keys=LETTERS, values=LETTERS)
    with pytest.raises(ValueError, match=r"the model knows 128 positions"):
        key_value_retrieval(make_base("gpt2"), tokenizer, 1, task=longer, max_length=500)


PROSE = ["It was the best of times, it was the worst of times. " * 6, "It was the age of wisdom. " * 4]


def test_evidence_moves_and_nothing_else_does(make_base, tokenizer, monkeypatch):
    rows = []

    def watched(model, given, *options):
        rows.extend(given)
        return [1.0 * len(row["input_ids"]) for row in given], [1] * len(given)

    monkeypatch.setattr(retrieval, "window_losses", watched)
    found = evidence_by_depth(make_base(max_position_embeddings=300), PROSE, tokenizer, 3, max_length=250)
    assert len(rows) == 3 * 7 and found["nll"]["mean"] == [250] * 5
    for sample in range(3):
        *moved, without, oracle = [tokenizer.decode(row["input_ids"]) for row in rows[7 * sample : 7 * sample + 7]]
        evidence, _, question = oracle.partition("What is")
        evidence = evidence.removesuffix("\n")
        text = without.partition("\nWhat is")[0]
        assert text in "".join(PROSE) and evidence.startswith("\nThe secret number of ")
        for depth, full in zip(found["nll"]["depths"], moved, strict=True):
            cut = round(depth * len(text))
            assert full == text[:cut] + evidence + text[cut:] + "\nWhat is" + question
        for row in rows[7 * sample : 7 * sample + 7]:
            predicted = [i for i, label in enumerate(row["labels"]) if label != -100]
            # " 12345": one token a character, at the end
            assert predicted == list(range(len(row["input_ids"]) - 6, len(row["input_ids"])))


def test_loss_of_evidence_is_that_of_its_answer(make_base, tokenizer, monkeypatch):
    model = make_base(dtype=torch.float64, max_position_embeddings=300)
    rows, real = [], retrieval.window_losses
    monkeypatch.setattr(
        retrieval, "window_losses", lambda model, given, *o: rows.extend(given) or real(model, given, *o)
    )
    found = evidence_by_depth(model, PROSE, tokenizer, 2, max_length=200, num_depths=3, batch_size=2)
    by_hand = [-likelihood(model, row["input_ids"][:-6], row["input_ids"][-6:]) / 6 for row in rows]
    first, second = by_hand[:5], by_hand[5:]
    means = [(a + b) / 2 for a, b in zip(first, second, strict=True)]
    assert found["nll"]["mean"] == pytest.approx(means[:3], rel=1e-5)
    assert found["no_evidence"]["mean"] == pytest.approx(means[3], rel=1e-5)
    assert found["oracle"]["mean"] == pytest.approx(means[4], rel=1e-5)


@pytest.mark.parametrize("max_length", [100, 5000])
def test_evidence_without_room_or_text_is_refused(make_base, tokenizer, max_length):
    with pytest.raises(ValueError, match=rf"max_length={max_length} leaves -?\d+ tokens .* holds \d+"):
        evidence_by_depth(make_base(max_position_embeddings=9000), PROSE, tokenizer, 1, max_length=max_length)


@pytest.fixture
def digits(tokenizer):
    """The tokenizer, with digits in place of capital letters."""

    class Digits:
        pad_token_id = eos_token_id = 2

        def __call__(self, text, **options):
            return tokenizer(text.translate(str.maketrans("0123456789", "ABCDEFGHIJ")), **options)

        def batch_decode(self, ids, **options):
            texts = tokenizer.batch_decode(ids, **options)
            return [text.translate(str.maketrans("ABCDEFGHIJ", "0123456789")) for text in texts]

    return Digits()


class Finder(nn.Module):
    """Generates the number of a passkey that stands in what it reads of a text, tokens[start(length):]."""

    def __init__(self, start):
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(()))
        self.start = start

    def generate(self, input_ids, max_new_tokens, **options):
        rows = []
        for ids in input_ids.tolist():
            # the digits' ids are those of the capital letters A to J
            digits = [39 <= token <= 48 for token in ids]
            places = range(self.start(len(ids)), len(ids) - 4)
            number = next((ids[i : i + 5] for i in places if all(digits[i : i + 5])), [])
            rows.append(ids + (number + [3] * max_new_tokens)[:max_new_tokens])
        return torch.tensor(rows)


def test_passkey_is_found_where_the_model_reads(digits):
    assert [digits(d)["input_ids"] for d in "09"] == [[39], [48]]
    found = evaluate_passkey(Finder(lambda length: 0), digits, 3, max_length=1000)
    assert found["accuracy"]["mean"] == [1] * 5 and found["tokens"] == 1000
    found = evaluate_passkey(Finder(lambda length: length // 2), digits, 3, max_length=1000)
    assert found["accuracy"]["mean"] == [0, 0, 1, 1, 1] or found["accuracy"]["mean"] == [0, 0, 0, 1, 1]


def test_passkey_needs_room_and_a_generator(make_base, digits):
    with pytest.raises(ValueError, match="max_length=150 leaves no room"):
        evaluate_passkey(Finder(lambda length: 0), digits, 1, max_length=150)
    with pytest.raises(TypeError, match=r"Linear has no generate\(\)"):
        evaluate_passkey(nn.Linear(2, 2), digits, 1)


def test_position_perplexity_is_that_of_the_positions(make_base, tokenizer):
    model = make_base(dtype=torch.float64)
    texts = [PROSE[0][:50], PROSE[1][:33]]
    found = position_perplexity(model, texts, tokenizer, 20, num_bins=4, batch_size=3)
    assert found["start"] == [1, 5, 10, 15]
    tokens = [tokenizer(text)["input_ids"] for text in texts]
    windows = [ids[i : i + 20] for ids in tokens for i in range(0, len(ids) - 1, 20)]
    for start, end, count, perplexity in zip(
        found["start"], [*found["start"][1:], 20], found["tokens"], found["perplexity"], strict=True
    ):
        losses = [
            -likelihood(model, w[:place], [w[place]]) for w in windows for place in range(start, min(end, len(w)))
        ]
        assert count == len(losses)
        assert perplexity == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)
    total = sum(n * math.log(p) for n, p in zip(found["tokens"], found["perplexity"], strict=True))
    _, loss = evaluate_perplexity(model, texts, tokenizer, 20)
    assert total / sum(found["tokens"]) == pytest.approx(loss, rel=1e-6)


def test_bins_that_no_text_reaches_are_left_out(make_base, tokenizer):
    found = position_perplexity(make_base(), ["abcdef"], tokenizer, 41, num_bins=4)
    assert found["start"] == [1] and found["tokens"] == [5]


def test_middle_gap_is_positive_where_the_middle_is_worse():
    accuracy = [[1.0, 0.5, 0.0, 0.5, 1.0], [1.0, 1.0, 1.0, 1.0, 0.0]]
    depths = [0, 0.25, 0.5, 0.75, 1]
    found = by_depth(depths, accuracy)
    assert found["mean"] == [1, 0.75, 0.5, 0.75, 0.5] and found["worst_depth"] == 0.5
    assert found["middle_gap"] == {"mean": 0.25, "interval": list(bootstrap_interval([1.0, -0.5]))}
    assert found["interval"][2] == list(bootstrap_interval([0.0, 1.0]))
    losses = by_depth(depths, accuracy, higher_is_better=False)
    assert losses["worst_depth"] == 0 and losses["middle_gap"]["mean"] == -0.25
    # of seven depths, the third to the fifth are the middle
    seven = by_depth([i / 6 for i in range(7)], [[1.0, 1.0, 0.0, 0.3, 0.0, 1.0, 1.0]])
    assert seven["middle_gap"]["mean"] == pytest.approx(0.9)


@pytest.mark.parametrize(
    ("text", "answer", "hit"),
    [(" The 12345.", "12345", 1), ("12 345", "12345", 0), ("AB-cd!", "ab cd", 1), ("", "x", 0)],
)
def test_answer_is_found_within_the_text(text, answer, hit):
    assert best_subspan_em(text, answer) == hit


def test_results_repeat_by_seed_and_modes_are_restored(make_model, tokenizer):
    model = make_model(lora_dropout=0.5).train()
    options = {"task": TASK, "max_length": 250, "num_depths": 3}
    first = evaluate_lost_in_the_middle(model, PROSE, tokenizer, 2, **options)
    assert model.training and all(module.training for module in model.modules())
    assert (
        evaluate_lost_in_the_middle(model, iter(PROSE), tokenizer, 2, batch_size=3, **options)["key_value"]
        == (first["key_value"])
    )
    assert evaluate_lost_in_the_middle(model, PROSE, tokenizer, 2, **options) == first
    assert evaluate_lost_in_the_middle(model, PROSE, tokenizer, 2, seed=1, **options) != first
    assert sorted(first) == ["evidence", "key_value", "position_perplexity"]


@pytest.mark.parametrize(
    ("options", "message"),
    [({"num_samples": 0}, "num_samples must be at least 1"), ({"num_depths": 2}, "num_depths must be at least 3")],
)
def test_impossible_samples_are_refused(tokenizer, options, message):
    with pytest.raises(ValueError, match=message):
        key_value_retrieval(Reader(), tokenizer, **{"num_samples": 1, "task": TASK, "max_length": 100} | options)
