"""Side-by-side timing on a noisy machine: a round runs every contender once; only ratios within a round count."""

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Iterable

import torch


def paired_times(
    contenders: dict[str, Callable[[], None]],
    *,
    seconds: float,
    fewest: int = 12,
    most: int = 200,
    warmup: int = 2,
    processor: dict[str, list[float]] | None = None,
) -> dict[str, list[float]]:
    """Seconds of each call, by name; entry i of every list comes from the same round, whose order is random.

    After `warmup` rounds there are as many as fit into `seconds`, but at least `fewest` and at most `most`. On a GPU a
    call ends when the GPU is done. `processor` takes the processor's seconds, of all threads, in the same order:
    other threads are counted in ticks of some ms, so that only means over many rounds say something.
    """
    order = random.Random(0)
    names = list(contenders)
    times: dict[str, list[float]] = {name: [] for name in names}
    gc.collect()
    gc.disable()
    try:
        for _ in range(warmup):
            begun = time.perf_counter()
            _one_round(contenders, names)
        rounds = min(most, max(fewest, int(seconds / (time.perf_counter() - begun))))
        for _ in range(rounds):
            order.shuffle(names)
            for name, (elapsed, busy) in _one_round(contenders, names).items():
                times[name].append(elapsed)
                if processor is not None:
                    processor.setdefault(name, []).append(busy)
    finally:
        gc.enable()
    return times


def _one_round(contenders: dict[str, Callable[[], None]], names: list[str]) -> dict[str, tuple[float, float]]:
    elapsed = {}
    for name in names:
        _wait_for_gpu()
        start, busy = time.perf_counter(), time.process_time()
        contenders[name]()
        _wait_for_gpu()
        elapsed[name] = (time.perf_counter() - start, time.process_time() - busy)
    return elapsed


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
