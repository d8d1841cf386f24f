"""Side-by-side timing on a noisy machine: a round runs every contender once; only ratios within a round count."""

import gc
import math
import random
import statistics
import time
from collections.abc import Callable


def paired_times(
    contenders: dict[str, Callable[[], None]], *, rounds: int, warmup: int = 3, seed: int = 0
) -> dict[str, list[float]]:
    """Seconds of each call, by name; entry i of every list comes from the same round."""
    order = random.Random(seed)
    names = list(contenders)
    times: dict[str, list[float]] = {name: [] for name in names}
    gc.collect()
    gc.disable()
    try:
        for turn in range(warmup + rounds):
            order.shuffle(names)
            for name in names:
                start = time.perf_counter()
                contenders[name]()
                elapsed = time.perf_counter() - start
                if turn >= warmup:
                    times[name].append(elapsed)
    finally:
        gc.enable()
    return times


def median_ratio(times: dict[str, list[float]], numerator: str, denominator: str) -> float:
    """The median over rounds of numerator's time / denominator's."""
    return statistics.median(a / b for a, b in zip(times[numerator], times[denominator], strict=True))


def geometric_mean(values: list[float]) -> float:
    """exp of the mean logarithm."""
    return math.exp(statistics.fmean(math.log(value) for value in values))
