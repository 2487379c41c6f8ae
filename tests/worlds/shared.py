"""A world whose metric is a class attribute, which every game in the process adds to."""

from __future__ import annotations

import esper
import numpy as np
from worlds.faulty import ObjectWalk

from rustyrl_actors.agent import Agent


class SharedScore(ObjectWalk):
    """Counts the observations of all games together."""

    score = 0

    def reset(self, rng: np.random.Generator) -> None:
        super().reset(rng)
        for _, agent in esper.get_component(Agent):
            agent.episode_metrics["distance"] = 0.0

    def observe(self) -> None:
        super().observe()
        SharedScore.score += 1
        for _, agent in esper.get_component(Agent):
            agent.episode_metrics["distance"] = float(SharedScore.score)
