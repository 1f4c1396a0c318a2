"""The most devices with which something holds, found with few questions."""

from __future__ import annotations

from collections.abc import Callable


def most_that_hold(holds: Callable[[int], bool], good: int, probe: int, most: int, resolution: float) -> int:
    """The most that holds, to `resolution` of it or one device, if more never hold where fewer do not.

    `good` holds (0: nothing is known), `probe` is asked first, and no more than `most` are tried. From there it goes up
    by half each time (twofold where nothing was known), or down by half, then bisects.
    """
    bad = most + 1
    factor = 1.5 if good else 2.0
    while good < bad - 1 and probe < bad:
        if holds(probe):
            good, probe = probe, round(factor * probe) + 1
        else:
            bad = probe
    while not good and bad > 1:  # began too high
        probe = bad // 2
        good, bad = (probe, bad) if holds(probe) else (0, probe)
    while bad - good > max(1, resolution * good):
        middle = (good + bad) // 2
        good, bad = (middle, bad) if holds(middle) else (good, middle)
    return good
