"""Wind for E slots: a steady part and a few waves, drawn once an episode and evaluated for all slots together.

A turbulence with a given spectrum is a sum of cosines with random phases (Shinozuka and Jan, 'Digital Simulation of
Random Processes and Its Applications', 1972). Here all waves of a slot are equally large and their rates are drawn
from the spectrum instead, one from each of its parts of equal power. The spectrum is the longitudinal one of Dryden's
model (MIL-F-8785C, 1980, 3.7.1.2): power 1 / (1 + (rate L / V)^2), so that the correlation over a lag of s seconds is
exp(-s V / L), of an Ornstein-Uhlenbeck process. Scale L: the height, as the low-altitude model has it for the
vertical (3.7.3.1), for all axes, which is brisk for the horizontal ones; V: the largest speed of the air.
"""

from __future__ import annotations

from dataclasses import dataclass

import esper
import numpy as np
from numpy.typing import NDArray

from rustyrl_actors.draws import SlotDraws
from rustyrl_actors.worlds.quadrotor import Wind, columns

__all__ = ["GustProcessor", "Gusts", "blow", "calm_gusts", "draw_gusts"]

Floats = NDArray[np.float32]

WAVES = 3
SCALE_M = 5.0  # L: about the middle of the heights that are flown at
FASTEST = 0.95  # of the spectrum's power; the rest is quicker than 12.7 V / L and moves no airframe
VERTICAL = 0.63  # of a wave, at most, over horizontal: sigma_w / sigma_u is 0.52, that of the low-altitude model at 5 m
MAXIMUM = 1 - 2.0**-20  # rounding keeps within the largest speed


@dataclass(slots=True)
class Gusts:
    """The wind of an episode as a function of its time.

    age_s: `[E]` s since the episode began
    steady: `[E, 3]` m/s
    wave: `[E, 3, WAVES]` m/s, direction and size of each
    rate: `[E, WAVES]` rad/s; phase: `[E, WAVES]` rad
    """

    age_s: Floats
    steady: Floats
    wave: Floats
    rate: Floats
    phase: Floats


def calm_gusts(slots: int) -> Gusts:
    """No wind at all."""
    waves = np.zeros((slots, WAVES), np.float32)
    return Gusts(
        np.zeros(slots, np.float32), columns(slots, 3), np.zeros((slots, 3, WAVES), np.float32), waves, waves.copy()
    )


def draw_gusts(gusts: Gusts, rows: NDArray[np.intp], rng: SlotDraws, largest_m_s: float) -> None:
    """Draw the wind of a new episode for these rows.

    The steady part is horizontal and from nothing to ``largest_m_s``; the waves have the rest, so that steady part and
    waves, whatever their phases, never exceed ``largest_m_s`` together.
    """
    drawn = rng.random(2 + 4 * WAVES)
    steady, bearing = drawn[:, 0], 2 * np.pi * drawn[:, 1 : 2 + WAVES]
    climb, share, phase = np.split(drawn[:, 2 + WAVES :], 3, axis=1)
    largest = MAXIMUM * largest_m_s
    gusts.age_s[rows] = 0.0
    gusts.steady[rows, 0] = largest * steady * np.cos(bearing[:, 0])
    gusts.steady[rows, 1] = largest * steady * np.sin(bearing[:, 0])
    wave = np.stack([np.cos(bearing[:, 1:]), np.sin(bearing[:, 1:]), VERTICAL * (2 * climb - 1)], axis=1)
    wave /= np.linalg.norm(wave, axis=1, keepdims=True)
    gusts.wave[rows] = (largest / WAVES * (1 - steady))[:, None, None] * wave
    share = (np.arange(WAVES) + share) * (FASTEST / WAVES)
    gusts.rate[rows] = largest_m_s / SCALE_M * np.tan(np.pi / 2 * share)
    gusts.phase[rows] = 2 * np.pi * phase


def blow(gusts: Gusts, wind: Wind) -> None:
    """Write the wind of this moment into ``wind.velocity``."""
    swing = np.cos(gusts.rate * gusts.age_s[:, None] + gusts.phase)
    np.einsum("eik,ek->ei", gusts.wave, swing, out=wind.velocity)
    wind.velocity += gusts.steady


class GustProcessor(esper.Processor):
    """Lets the wind blow: one value for each control step."""

    def __init__(self, step_s: float) -> None:
        self._step_s = np.float32(step_s)

    def process(self) -> None:
        """Write the wind of this step, then let time pass."""
        for _, (gusts, wind) in esper.get_components(Gusts, Wind):
            blow(gusts, wind)
            gusts.age_s += self._step_s
