"""Worlds, numpy inference and recording: everything that an actor, or a shipped game, needs. Never torch."""

from rustyrl.spec import MetricSpec
from rustyrl_actors.agent import Agent
from rustyrl_actors.environment import Environment, StepRows, TimeStep
from rustyrl_actors.inference import Policy
from rustyrl_actors.processor import PolicyProcessor
from rustyrl_actors.world import World, WorldInfo

__all__ = [
    "Agent",
    "Environment",
    "MetricSpec",
    "Policy",
    "PolicyProcessor",
    "StepRows",
    "TimeStep",
    "World",
    "WorldInfo",
]
