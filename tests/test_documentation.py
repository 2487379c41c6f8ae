"""What the documents say is what the code does."""

from __future__ import annotations

import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import esper
import numpy as np

from rustyrl.weights import decode_weights
from rustyrl_actors import Agent, Policy, PolicyProcessor
from rustyrl_actors.catalog import find_environment
from rustyrl_actors.environment import allocate_rows

ROOT = Path(__file__).parent.parent


def without_decimals(text: str) -> list[str]:
    """Names, shapes and bytes; numbers with decimals or exponents may differ between machines."""
    return [re.sub(r"-?\d+\.\d+|\d+e[-+]\d+", "#", line).rstrip() for line in text.strip().splitlines()]


def test_architecture_shows_what_the_walk_prints():
    done = subprocess.run([sys.executable, ROOT / "docs" / "walk.py"], capture_output=True, text=True, check=True)
    shown = (ROOT / "docs" / "architecture.md").read_text().split("<!-- walk -->\n```\n")[1].split("```")[0]
    assert without_decimals(shown) == without_decimals(done.stdout)


def test_straight_line_table_names_functions_that_exist():
    rows = re.findall(r"^\| \d+ \|[^|]*\| `([^`]+)` \| (.*) \|$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert len(rows) == 11
    for path, names in rows:
        assert (ROOT / path).is_file()
        package = path.removeprefix("actors/").removeprefix("learner/").removesuffix(".py").replace("/", ".")
        module = importlib.import_module(package)
        for name in re.findall(r"`\.?([A-Za-z_.]+)", names):
            holders = [module, *(v for _, v in inspect.getmembers(module, inspect.isclass))]
            parts = name.split(".")
            if parts[0] == "gae":
                parts = parts[1:]
            assert any(hasattr(holder, parts[0]) for holder in holders), (path, name)
            if len(parts) == 2:
                assert hasattr(getattr(module, parts[0]), parts[1]), (path, name)


def test_policy_processor_acts_as_the_policy_does():
    from rustyrl.spec import ActionSpec, ArraySpec
    from rustyrl.weights import PolicySpec, Weights, encode_weights, weights_layout

    spec = PolicySpec(
        (ArraySpec("main", (3,), "float32"),),
        (ActionSpec("box", "main", shape=(2,), low=(-0.1, -0.1), high=(0.1, 0.1)),),
        (8,),
        "tanh",
        normalize=False,
    )
    rng = np.random.default_rng(0)
    arrays = {name: rng.normal(size=shape).astype(np.float32) for name, shape in weights_layout(spec).items()}
    weights = decode_weights(encode_weights(Weights(spec, arrays)))
    observation = rng.normal(size=(5, 3)).astype(np.float32)
    expected = np.zeros((5, 2), np.float32)
    policy = Policy(weights, 5)
    policy.act({"main": observation}, None, {"main": expected})
    esper.switch_world("game")
    agent = Agent(observation=observation)
    esper.create_entity(agent)
    esper.add_processor(PolicyProcessor(weights))
    esper.process()
    esper.switch_world("default")
    esper.delete_world("game")
    np.testing.assert_array_equal(agent.action, np.clip(expected, -0.1, 0.1))
    assert np.abs(expected).max() > 0.1


def test_configuration_page_is_what_the_configuration_says():
    command = [sys.executable, ROOT / "docs" / "configuration.py"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (ROOT / "docs" / "configuration.md").read_text() == done.stdout
    assert "`ppo.gamma`" in done.stdout


def test_example_world_runs():
    source = find_environment(f"{ROOT}/examples/point.py:Point", {"slots": 8, "thrust": 2.0})
    environment, rows = source.make(), allocate_rows(source.spec)
    environment.reset((1,), rows)
    ended = 0
    for _ in range(200):
        goal = rows.observation["main"][:, :2] - rows.observation["main"][:, 2:]
        step = environment.step({"main": np.clip(goal, -1, 1)}, rows)
        ended += 0 if step.episodes is None else len(step.episodes.slot)
    environment.close()
    assert ended == 8
    assert step.episodes.metrics["final_distance"].max() < 0.1  # a damped push to the goal gets there
