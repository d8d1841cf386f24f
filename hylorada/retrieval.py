"""Finding one fact in a long context, by its depth: key-value retrieval, evidence in running text, passkeys."""

from __future__ import annotations

import itertools
import math
import random
import string
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm

from .data import IGNORED_LABEL, pad_token_id, special_tokens
from .perplexity import (
    batch_losses,
    check_learned_positions,
    evaluation_mode,
    evaluation_windows,
    token_row,
    window_losses,
)
from .position import CACHE_ARGUMENTS
from .statistics import bootstrap_interval

# the longest list of Liu et al. (2023)
_MOST_PAIRS = 300
# a generated answer may begin with a quote or a space
_SPARE_TOKENS = 4
_PLACES = ("Athens", "Berlin", "Cairo", "Dublin", "Geneva", "Havana", "Lisbon", "London", "Madrid", "Moscow", "Paris")


@dataclass(frozen=True)
class KeyValueTask:
    """A list of random pairs, and a question for the value of one of them (Liu et al. 2023, "Lost in the Middle").

    num_pairs: K; a guess among the values is right once in K times
    keys, values: what to draw from, without repetition; None: random UUIDs
    header, pair, separator, question, answer: the text, in str.format's notation with key and value;
        header + pairs joined by separator + question is what the model reads, answer what it should say
    """

    num_pairs: int = 75
    keys: Sequence[str] | None = None
    values: Sequence[str] | None = None
    header: str = "Extract the value corresponding to the specified key in the JSON object below.\n\nJSON data:\n{{"
    pair: str = '"{key}": "{value}"'
    separator: str = ",\n "
    question: str = '}}\n\nKey: "{key}"\nCorresponding value:'
    answer: str = ' "{value}"'

    def __post_init__(self) -> None:
        if self.num_pairs < 3:
            raise ValueError(f"num_pairs must be at least 3 (a first, a middle, a last), got {self.num_pairs}")
        for name in ("keys", "values"):
            pool = getattr(self, name)
            if pool is not None and len(set(pool)) < self.num_pairs:
                raise ValueError(f"{name} must hold {self.num_pairs} different entries, got {len(set(pool))}")

    def sample(self, generator: random.Random) -> list[tuple[str, str]]:
        """Draw num_pairs pairs; the first is the one to ask for."""
        keys, values = self._draw(self.keys, generator), self._draw(self.values, generator)
        return list(zip(keys, values, strict=True))

    def prompt(self, pairs: Sequence[tuple[str, str]], place: int) -> str:
        """The text with the first pair at a place among the others, whose order does not depend on it."""
        (key, value), *others = pairs
        listed = [*others[:place], (key, value), *others[place:]]
        lines = (self.pair.format(key=key, value=value) for key, value in listed)
        return self.header.format() + self.separator.join(lines) + self.question.format(key=key)

    def _draw(self, pool: Sequence[str] | None, generator: random.Random) -> list[str]:
        if pool is None:
            return [str(uuid.UUID(int=generator.getrandbits(128), version=4)) for _ in range(self.num_pairs)]
        return generator.sample(sorted(set(pool)), self.num_pairs)


def key_value_retrieval(
    model: nn.Module,
    tokenizer: Any,
    num_samples: int = 100,
    *,
    max_length: int = 1024,
    task: KeyValueTask | None = None,
    num_depths: int = 5,
    batch_size: int = 1,
    generate: bool = True,
    seed: int = 0,
    show_progress: bool = False,
) -> dict[str, Any]:
    """Return how often a model finds a value by its key, by the depth of the pair in the list.

    Every sample is one list of pairs and one question; only the place of the pair that is asked for changes.

    candidate_accuracy: how often the right value is the likeliest of the K values (sums of log p); a guess has 1/K
    best_subspan_em: how often the greedy continuation contains the right value; None with generate=False, or for a
        model without `generate`
    Each is a `by_depth`.

    task: default: UUIDs, as many pairs as fit into max_length, at most 300
    num_depths: places of the pair, evenly spread from the first (depth 0) to the last (depth 1)
    batch_size: prompts in one call of `generate`; the K values are one batch
    """
    depths = _depths(num_depths, num_samples)
    task = _fitting_task(tokenizer, max_length) if task is None else task
    generate = generate and callable(getattr(model, "generate", None))
    candidate_hits: list[list[float]] = []
    generated_hits: list[list[float]] = []
    generator = random.Random(seed)
    longest = 0
    with evaluation_mode(model), torch.no_grad():
        for _ in tqdm(range(num_samples), "key-value retrieval", disable=not show_progress, leave=False):
            pairs = task.sample(generator)
            prompts = [
                _with_prefix(task.prompt(pairs, int(depth * (task.num_pairs - 1))), tokenizer) for depth in depths
            ]
            answers = [_plain(task.answer.format(key=key, value=value), tokenizer) for key, value in pairs]
            new_tokens = max(map(len, answers)) + _SPARE_TOKENS
            longest = max(longest, max(map(len, prompts)) + new_tokens)
            _check_length(model, longest, max_length)
            scores = [candidate_scores(model, prompt, answers) for prompt in prompts]
            # an answer that is as likely as the right one counts against it
            candidate_hits.append([float((score[0] > score[1:]).all()) for score in scores])
            if generate:
                texts = _continuations(model, tokenizer, prompts, new_tokens, batch_size)
                generated_hits.append([best_subspan_em(text, pairs[0][1]) for text in texts])
    return {
        "num_pairs": task.num_pairs,
        "num_samples": num_samples,
        "tokens": longest,
        "chance": 1 / task.num_pairs,
        "candidate_accuracy": by_depth(depths, candidate_hits, seed=seed),
        "best_subspan_em": by_depth(depths, generated_hits, seed=seed) if generate else None,
    }


def candidate_scores(model: nn.Module, prompt: Sequence[int], candidates: Sequence[Sequence[int]]) -> Tensor:
    """Return log p(candidate | prompt) of every candidate, (K,), fp32. The prompt runs once: its cache is repeated."""
    device = next(model.parameters()).device
    output = model(input_ids=torch.tensor([prompt], device=device), use_cache=True)
    tokens = pad_sequence([torch.tensor(candidate) for candidate in candidates], True, IGNORED_LABEL).to(device)
    logits = output.logits[:, -1:].float().expand(len(candidates), -1, -1)
    if tokens.shape[1] > 1:
        name = next((name for name in CACHE_ARGUMENTS if name in list(output.keys())), None)
        if name is None:
            raise ValueError(f"candidates are scored from a cache, and {type(model).__name__} returns none")
        output[name].batch_repeat_interleave(len(candidates))
        # what pads a candidate stands behind all that is read of it
        rest = model(input_ids=tokens[:, :-1].clamp(min=0), use_cache=True, **{name: output[name]}).logits
        logits = torch.cat([logits, rest.float()], 1)
    scores = logits.log_softmax(-1).gather(-1, tokens.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return scores.masked_fill(tokens == IGNORED_LABEL, 0).sum(-1)


def evidence_by_depth(
    model: nn.Module,
    dataset: Iterable[str | Mapping[str, Any]],
    tokenizer: Any,
    num_samples: int = 100,
    *,
    max_length: int = 1024,
    num_depths: int = 5,
    batch_size: int = 1,
    seed: int = 0,
    show_progress: bool = False,
) -> dict[str, Any]:
    """Return the loss of a fixed answer to a fixed question, by the depth of the evidence in running text.

    A sample is a stretch of text out of dataset, a sentence that tells a number, and at the end a question for it;
    everything together has max_length tokens. Only the place of the sentence changes: depth 0 is before the text,
    depth 1 after it.

    nll: mean -log p a token of the answer, a `by_depth`
    no_evidence: the same without the sentence, the worst that a reader does; oracle: with the sentence and no text
    """
    depths = _depths(num_depths, num_samples)
    text = [token for row in dataset for token in token_row(row, tokenizer)[0]]
    prefix, _ = special_tokens(tokenizer)
    generator = random.Random(seed)
    rows = []
    for _ in range(num_samples):
        place, number = generator.choice(_PLACES), f"{generator.randrange(10**5):05d}"
        evidence = _plain(f"\nThe secret number of {place} is {number}.\n", tokenizer)
        question = _plain(f"\nWhat is the secret number of {place}? The secret number of {place} is", tokenizer)
        answer = _plain(f" {number}", tokenizer)
        room = max_length - len(prefix) - len(evidence) - len(question) - len(answer)
        if room < 1 or room > len(text):
            raise ValueError(
                f"max_length={max_length} leaves {room} tokens for the text around the evidence, and dataset holds "
                f"{len(text)}: give another max_length, or more text"
            )
        start = generator.randrange(len(text) - room + 1)
        distractor = text[start : start + room]
        cuts = [round(depth * room) for depth in depths]
        contexts = [distractor[:cut] + evidence + distractor[cut:] for cut in cuts]
        for context in [*contexts, distractor, evidence]:
            known = [*prefix, *context, *question]
            rows.append({"input_ids": known + answer, "labels": [IGNORED_LABEL] * len(known) + answer})

    check_learned_positions(model, max_length)
    sums, counts = window_losses(model, rows, tokenizer, batch_size, show_progress)
    losses = [total / count for total, count in zip(sums, counts, strict=True)]
    samples = [losses[i : i + num_depths + 2] for i in range(0, len(losses), num_depths + 2)]
    return {
        "num_samples": num_samples,
        "tokens": max_length,
        "nll": by_depth(depths, [sample[:num_depths] for sample in samples], higher_is_better=False, seed=seed),
        "no_evidence": _mean_with_interval([sample[-2] for sample in samples], seed),
        "oracle": _mean_with_interval([sample[-1] for sample in samples], seed),
    }


def evaluate_passkey(
    model: nn.Module,
    tokenizer: Any,
    num_samples: int = 20,
    *,
    max_length: int = 1024,
    num_depths: int = 5,
    batch_size: int = 1,
    seed: int = 0,
    show_progress: bool = False,
) -> dict[str, Any]:
    """Return how often a model repeats a number hidden in a repetitive text of max_length tokens, by its depth.

    accuracy: how often the greedy continuation contains it, a `by_depth` (Mohtashami and Jaggi 2023)
    """
    if not callable(getattr(model, "generate", None)):
        raise TypeError(f"a passkey is generated, and {type(model).__name__} has no generate()")
    depths = _depths(num_depths, num_samples)
    head = "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it.\n"
    filler = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
    question = "What is the pass key? The pass key is"
    new_tokens = len(_plain(" 00000", tokenizer)) + _SPARE_TOKENS
    generator = random.Random(seed)
    hits = []
    with evaluation_mode(model), torch.no_grad():
        for _ in tqdm(range(num_samples), "passkeys", disable=not show_progress, leave=False):
            key = f"{generator.randrange(10**4, 10**5)}"
            needle = f"The pass key is {key}. Remember it. {key} is the pass key.\n"
            fixed = len(_with_prefix(head + needle + question, tokenizer)) + new_tokens
            once = len(_plain(filler, tokenizer))
            repeats = (max_length - fixed) // once
            if repeats < 1:
                raise ValueError(
                    f"max_length={max_length} leaves no room for text around a pass key: give at least {fixed + once}"
                )
            cuts = [round(depth * repeats) for depth in depths]
            prompts = [
                _with_prefix(head + filler * cut + needle + filler * (repeats - cut) + question, tokenizer)
                for cut in cuts
            ]
            _check_length(model, max(map(len, prompts)) + new_tokens, max_length)
            texts = _continuations(model, tokenizer, prompts, new_tokens, batch_size)
            hits.append([best_subspan_em(text, key) for text in texts])
    return {"num_samples": num_samples, "tokens": max_length, "accuracy": by_depth(depths, hits, seed=seed)}


def position_perplexity(
    model: nn.Module,
    dataset: Iterable[str | Mapping[str, Any]],
    tokenizer: Any = None,
    max_length: int = 1024,
    *,
    num_bins: int = 8,
    batch_size: int = 1,
    show_progress: bool = False,
) -> dict[str, list]:
    """Return the perplexity of running text by the position of the predicted token in its window.

    It falls with the position for every model that reads its context, wherever a fact stands: no measure of retrieval.
    start: first position of each bin; tokens: predicted in it; perplexity. Bins without a token are left out.
    """
    if not 1 <= num_bins < max_length:
        raise ValueError(f"num_bins must lie between 1 and max_length - 1 = {max_length - 1}, got {num_bins}")
    rows = evaluation_windows(model, dataset, tokenizer, max_length)
    sums, counts = torch.zeros(max_length - 1, dtype=torch.float64), torch.zeros(max_length - 1, dtype=torch.long)
    for losses, predicted in batch_losses(model, rows, tokenizer, batch_size, show_progress):
        sums[: losses.shape[1]] += losses.double().sum(0)
        counts[: losses.shape[1]] += predicted.sum(0)
    edges = [1 + i * (max_length - 1) // num_bins for i in range(num_bins + 1)]
    bins = [(start, slice(start - 1, end - 1)) for start, end in itertools.pairwise(edges)]
    bins = [(start, part) for start, part in bins if counts[part].sum()]
    return {
        "start": [start for start, _ in bins],
        "tokens": [int(counts[part].sum()) for _, part in bins],
        "perplexity": [float((sums[part].sum() / counts[part].sum()).exp()) for _, part in bins],
    }


def evaluate_lost_in_the_middle(
    model: nn.Module,
    dataset: Iterable[str | Mapping[str, Any]],
    tokenizer: Any,
    num_samples: int = 100,
    *,
    max_length: int = 1024,
    task: KeyValueTask | None = None,
    num_depths: int = 5,
    batch_size: int = 1,
    generate: bool = True,
    seed: int = 0,
    show_progress: bool = False,
) -> dict[str, Any]:
    """Return what a model finds at which depth of its context: key_value, evidence and position_perplexity.

    They are `key_value_retrieval`, `evidence_by_depth` and `position_perplexity`, which say what the arguments mean.

    model: an adapted model or any causal language model of transformers; left in the mode that it was in
    dataset: as `evaluate_perplexity` takes it: the text around the evidence, and the running text
    """
    dataset = list(dataset)
    shared: dict[str, Any] = {
        "max_length": max_length,
        "num_depths": num_depths,
        "batch_size": batch_size,
        "seed": seed,
        "show_progress": show_progress,
    }
    return {
        "key_value": key_value_retrieval(model, tokenizer, num_samples, task=task, generate=generate, **shared),
        "evidence": evidence_by_depth(model, dataset, tokenizer, num_samples, **shared),
        "position_perplexity": position_perplexity(
            model, dataset, tokenizer, max_length, batch_size=batch_size, show_progress=show_progress
        ),
    }


def by_depth(
    depths: Sequence[float], samples: Sequence[Sequence[float]], *, higher_is_better: bool = True, seed: int = 0
) -> dict[str, Any]:
    """Summarize samples x depths: the mean by depth, the worst depth, and what the middle loses against the ends.

    depths, mean, interval: one entry a depth; an interval is the 95 % bootstrap interval over samples
    worst_depth: where the mean is worst
    middle_gap: how much worse the mean over the depths in [1/3, 2/3] is than that of the first and the last, with its
        interval; the same samples stand at every depth
    """
    columns = [_mean_with_interval(column, seed) for column in zip(*samples, strict=True)]
    means = [column["mean"] for column in columns]
    sign = 1 if higher_is_better else -1
    middle = [i for i, depth in enumerate(depths) if 1 / 3 <= depth <= 2 / 3]
    gaps = [sign * ((row[0] + row[-1]) / 2 - sum(row[i] for i in middle) / len(middle)) for row in samples]
    return {
        "depths": list(depths),
        "mean": means,
        "interval": [column["interval"] for column in columns],
        "worst_depth": depths[min(range(len(depths)), key=lambda i: sign * means[i])],
        "middle_gap": _mean_with_interval(gaps, seed),
    }


def best_subspan_em(text: str, answer: str) -> float:
    """1 where the text contains the answer, but for case, punctuation, articles and white space; else 0."""
    return float(_normalized(answer) in _normalized(text))


def _normalized(text: str) -> str:
    words = "".join(" " if letter in string.punctuation else letter for letter in text.lower()).split()
    return " ".join(word for word in words if word not in ("a", "an", "the"))


def _mean_with_interval(values: Sequence[float], seed: int) -> dict[str, Any]:
    return {"mean": sum(values) / len(values), "interval": list(bootstrap_interval(values, seed=seed))}


def _depths(count: int, num_samples: int) -> list[float]:
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, got {num_samples}")
    if count < 3:
        raise ValueError(f"num_depths must be at least 3 (a first, a middle, a last), got {count}")
    return [i / (count - 1) for i in range(count)]


def _fitting_task(tokenizer: Any, max_length: int) -> KeyValueTask:
    def length(pairs: int) -> int:
        task = KeyValueTask(num_pairs=pairs)
        return len(_with_prefix(task.prompt(task.sample(random.Random(0)), 0), tokenizer))

    fixed = 2 * length(3) - length(6)
    a_pair = (length(9) - length(3)) / 6
    # a value once more as the answer, and a twentieth in reserve: UUIDs differ in their number of tokens
    count = min(_MOST_PAIRS, int((0.95 * max_length - fixed) / a_pair) - 1)
    if count < 3:
        raise ValueError(
            f"max_length={max_length} has no room for three pairs of UUIDs: give at least "
            f"{math.ceil((fixed + 4 * a_pair) / 0.95)}, or a task of shorter pairs"
        )
    return KeyValueTask(num_pairs=count)


def _plain(text: str, tokenizer: Any) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def _with_prefix(text: str, tokenizer: Any) -> list[int]:
    return [*special_tokens(tokenizer)[0], *_plain(text, tokenizer)]


def _check_length(model: nn.Module, tokens: int, max_length: int) -> None:
    if tokens > max_length:
        raise ValueError(f"a prompt and its answer take {tokens} tokens, more than max_length={max_length}")
    check_learned_positions(model, tokens)


def _continuations(
    model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], new_tokens: int, batch_size: int
) -> list[str]:
    """Return the greedy continuations of prompts; batches are padded on the left."""
    device = next(model.parameters()).device
    padding = pad_token_id(tokenizer)
    texts: list[str] = []
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        longest = max(map(len, batch))
        ids = torch.tensor([[padding] * (longest - len(prompt)) + list(prompt) for prompt in batch], device=device)
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in batch], device=device)
        output = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=new_tokens,
            do_sample=False,
            num_beams=1,
            pad_token_id=padding,
        )
        texts += tokenizer.batch_decode(output[:, longest:], skip_special_tokens=True)
    return texts
