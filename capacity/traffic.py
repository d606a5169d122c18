"""The loads that are simulated: images a second, each second."""

from collections.abc import Callable

import numpy as np

from capacity.measured import Floats

DAY = 86_400


def ramp(peak: float) -> Floats:
    """From a tenth of the peak to all of it in ten minutes, ten minutes of that, and back."""
    shape: Floats = np.interp(np.arange(2700.0), [0, 120, 720, 1320, 1920, 2700], [0.1, 0.1, 1, 1, 0.1, 0.1])
    return shape * peak


def spike(peak: float) -> Floats:
    """From a quarter of the peak to all of it within a second, for ten minutes."""
    seconds = np.arange(1800.0)
    return np.where((seconds >= 300) & (seconds < 900), 1.0, 0.25) * peak


def day(peak: float) -> Floats:
    """A day from midnight: a tenth of the peak at four in the morning, the peak at eight in the evening, with minutes
    that are up to some 15% off, and at noon a wave of a third more within five minutes that goes in twenty."""
    seconds = np.arange(float(DAY))
    hours = [0, 4, 9, 12, 14, 17, 20, 24]
    shape: Floats = np.interp(seconds / 3600, hours, [0.45, 0.1, 0.5, 0.6, 0.55, 0.7, 0.9, 0.45])
    # Minutes that remember the ones before (an autoregression of the first order), the same every day.
    random, noise, minutes = np.random.default_rng(1), 0.0, []
    for _ in range(DAY // 60 + 1):
        noise = 0.9 * noise + random.normal(0, 0.02)
        minutes.append(1 + noise)
    shape *= np.interp(seconds, 60 * np.arange(len(minutes)), minutes)
    wave = np.interp(seconds, [43_200, 43_500, 44_700], [0, 1, 0], left=0, right=0)
    shape *= 1 + wave / 3
    return shape / float(shape.max()) * peak


LOADS: dict[str, Callable[[float], Floats]] = {"ramp": ramp, "spike": spike, "day": day}
