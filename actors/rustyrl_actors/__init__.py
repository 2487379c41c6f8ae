"""Worlds, numpy inference and recording: everything that an actor, or a shipped game, needs. Never torch."""

from rustyrl.spec import MetricSpec
from rustyrl_actors.agent import Agent
from rustyrl_actors.draws import SlotDraws
from rustyrl_actors.environment import Environment, StepRows, TimeStep
from rustyrl_actors.gym_world import WorldEnv, WorldVectorEnv, register_worlds
from rustyrl_actors.inference import Policy
from rustyrl_actors.processor import PolicyProcessor
from rustyrl_actors.world import ColumnWorld, NoParameters, ObjectWorld, World, WorldInfo

__all__ = [
    "Agent",
    "ColumnWorld",
    "Environment",
    "MetricSpec",
    "NoParameters",
    "ObjectWorld",
    "Policy",
    "PolicyProcessor",
    "SlotDraws",
    "StepRows",
    "TimeStep",
    "World",
    "WorldEnv",
    "WorldInfo",
    "WorldVectorEnv",
]

register_worlds()
