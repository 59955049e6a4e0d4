"""Times functions in turn, so that a machine that slows down or speeds up favours none of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping


def interleaved_medians(
    functions: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    advance: Callable[[], None] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Median seconds of each function, called A B A B after one call of each that is not timed.

    Args:
        functions: what to time, by name. A function that starts work on a GPU must wait for it.
        rounds: timed calls of each; odd numbers have one median call.
        advance: called after every round, the untimed one included.
        clock: seconds now.

    Raises:
        ValueError: no functions, or `rounds` is less than 1.
    """
    if not functions:
        raise ValueError("functions must hold at least one function to time, got none")
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    for function in functions.values():
        function()
    advance()
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            start = clock()
            function()
            seconds[name].append(clock() - start)
        advance()
    return {name: statistics.median(values) for name, values in seconds.items()}
