"""Side-by-side timing on a noisy machine: a round runs every contender once; only ratios within a round count."""

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from typing import TypeAlias

import torch

# what is timed, whole or in parts
Contender: TypeAlias = Callable[[], None] | Sequence[Callable[[], None]]


def paired_times(
    contenders: dict[str, Contender],
    *,
    seconds: float,
    fewest: int = 12,
    most: int = 200,
    warmup: int = 2,
    processor: dict[str, list[float]] | None = None,
) -> dict[str, list[float]]:
    """Seconds of each call, by name; entry i of every list comes from the same round, whose order is random.

    A contender that is long is given in parts, as many as the others have: their first parts run side by side, then
    their second ones. So what the machine does meanwhile hits all of them; their times are those of all parts.
    After `warmup` rounds there are as many as fit into `seconds`, but at least `fewest` and at most `most`. On a GPU a
    call ends when the GPU is done. `processor` takes the processor's seconds, of all threads, in the same order:
    other threads are counted in ticks of some ms, so that only means over many rounds say something.
    """
    order = random.Random(0)
    times: dict[str, list[float]] = {name: [] for name in contenders}
    gc.collect()
    gc.disable()
    try:
        for _ in range(warmup):
            begun = time.perf_counter()
            _one_round(contenders, order)
        rounds = min(most, max(fewest, int(seconds / (time.perf_counter() - begun))))
        for _ in range(rounds):
            for name, (elapsed, busy) in _one_round(contenders, order).items():
                times[name].append(elapsed)
                if processor is not None:
                    processor.setdefault(name, []).append(busy)
    finally:
        gc.enable()
    return times


def _one_round(contenders: dict[str, Contender], order: random.Random) -> dict[str, tuple[float, float]]:
    parts = {name: [given] if callable(given) else given for name, given in contenders.items()}
    spent = {name: (0.0, 0.0) for name in parts}
    for together in zip(*parts.values(), strict=True):
        calls = list(zip(parts, together, strict=True))
        order.shuffle(calls)
        for name, call in calls:
            _wait_for_gpu()
            start, busy = time.perf_counter(), time.process_time()
            call()
            _wait_for_gpu()
            elapsed, occupied = spent[name]
            spent[name] = elapsed + time.perf_counter() - start, occupied + time.process_time() - busy
    return spent


def _wait_for_gpu() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def median_ratio(times: dict[str, list[float]], numerator: str, denominator: str) -> float:
    """The median over rounds of numerator's time / denominator's."""
    return statistics.median(a / b for a, b in zip(times[numerator], times[denominator], strict=True))


def ratio_spread(times: dict[str, list[float]], numerator: str, denominator: str) -> float:
    """Half of the range that nine in ten of the rounds' ratios have.

    That of the middle half, which says how sure a median of so many rounds is, is too narrow for another run: memory
    lies elsewhere then.
    """
    ratios = [a / b for a, b in zip(times[numerator], times[denominator], strict=True)]
    if len(ratios) == 1:
        return 0.0
    twentieths = statistics.quantiles(ratios, n=20, method="inclusive")
    return (twentieths[-1] - twentieths[0]) / 2


def geometric_mean(values: Iterable[float]) -> float:
    """exp of the mean logarithm."""
    return math.exp(statistics.fmean(math.log(value) for value in values))
