"""What changes while a run goes on: at its start, on the way, at its end and beyond, and what is refused."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from rustyrl.config import PPOConfig, build_config
from rustyrl.errors import UsageError
from rustyrl.launch import _check_ppo
from rustyrl_learner.schedule import scheduled

ENDS = {"clip": (0.3, 0.1), "entropy": (0.02, 0.0), "gamma": (0.99, 0.999)}
CHANGING = PPOConfig(
    learning_rate=4e-4,
    schedule="linear",
    **{name: start for name, (start, _) in ENDS.items()},
    **{f"{name}_end": end for name, (_, end) in ENDS.items()},
)


@pytest.mark.parametrize(("progress", "share"), [(0.0, 0.0), (0.25, 0.25), (0.5, 0.5), (1.0, 1.0), (1.7, 1.0)])
def test_everything_goes_to_its_end_in_even_steps_and_stays_there(progress: float, share: float) -> None:
    now = scheduled(CHANGING, progress, learning_rate=123.0)
    for name, (start, end) in ENDS.items():
        assert getattr(now, name) == pytest.approx(start + share * (end - start), rel=1e-12), name
    assert now.learning_rate == pytest.approx(4e-4 * (1 - share), rel=1e-12)


@pytest.mark.parametrize("name", ENDS)
def test_at_its_start_and_end_each_is_exactly_what_was_asked_for(name: str) -> None:
    assert getattr(scheduled(CHANGING, 0.0, 1.0), name) == ENDS[name][0]
    for progress in (1.0, 2.0):
        assert getattr(scheduled(CHANGING, progress, 1.0), name) == pytest.approx(ENDS[name][1], abs=1e-17)
    assert scheduled(CHANGING, 0.0, 1.0).learning_rate == 4e-4
    assert scheduled(CHANGING, 1.0, 1.0).learning_rate == 0.0


@pytest.mark.parametrize("progress", [0.0, 0.3, 1.0, 5.0])
def test_minus_1_leaves_a_setting_alone(progress: float) -> None:
    for name, (start, _) in ENDS.items():
        ppo = msgspec.structs.replace(CHANGING, **{f"{name}_end": -1})
        assert getattr(scheduled(ppo, progress, 1.0), name) == start
    plain = PPOConfig(schedule="constant")
    assert scheduled(plain, progress, 1.0) == plain


@pytest.mark.parametrize("name", ENDS)
def test_an_end_of_0_is_an_end(name: str) -> None:
    ppo = msgspec.structs.replace(CHANGING, **{f"{name}_end": 0})
    assert getattr(scheduled(ppo, 0.5, 1.0), name) == pytest.approx(ENDS[name][0] / 2)
    assert getattr(scheduled(ppo, 1.0, 1.0), name) == 0.0


@pytest.mark.parametrize("progress", [0.0, 0.3, 1.0])
def test_the_rate_is_the_one_to_go_on_with_where_it_follows_the_kl_and_the_first_where_it_is_constant(
    progress: float,
) -> None:
    for schedule, expected in (("kl", 7e-5), ("constant", 4e-4)):
        ppo = msgspec.structs.replace(CHANGING, schedule=schedule)
        assert scheduled(ppo, progress, 7e-5).learning_rate == expected


def test_nothing_else_changes() -> None:
    changed = {"learning_rate", *ENDS}
    now, before = (msgspec.structs.asdict(ppo) for ppo in (scheduled(CHANGING, 0.4, 1.0), CHANGING))
    assert {name for name in now if now[name] != before[name]} == changed


@pytest.mark.parametrize(
    ("changes", "total_steps", "refusal"),
    [
        ({"clip_end": 0.1}, 0, r"ppo\.clip_end needs run\.total_steps"),
        ({"entropy_end": 0.0}, 0, r"ppo\.entropy_end needs run\.total_steps"),
        ({"gamma_end": 0.999}, 0, r"ppo\.gamma_end needs run\.total_steps"),
        ({"schedule": "linear"}, 0, r"ppo\.schedule 'linear' needs run\.total_steps"),
        ({"clip_end": -0.1}, 1000, r"ppo\.clip_end is -0\.1, expected -1"),
        ({"entropy_end": -0.5}, 1000, r"ppo\.entropy_end is -0\.5, expected -1"),
        ({"gamma_end": -0.99}, 1000, r"ppo\.gamma_end is -0\.99, expected -1"),
        ({"weight_decay": 0.01}, 1000, r"ppo\.weight_decay is for ppo\.optimizer 'adamw', this is 'adam'"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(changes: dict[str, Any], total_steps: int, refusal: str) -> None:
    with pytest.raises(UsageError, match=refusal):
        _check_ppo(PPOConfig(**changes), total_steps)


def test_settings_that_go_together_are_not() -> None:
    _check_ppo(PPOConfig(), 0)
    _check_ppo(CHANGING, 1000)
    _check_ppo(PPOConfig(optimizer="adamw", weight_decay=0.01), 0)
    _check_ppo(PPOConfig(clip_end=-1, entropy_end=-1, gamma_end=-1, schedule="kl"), 0)


@pytest.mark.parametrize(("key", "value"), [("clip_end", -1.5), ("entropy_end", -2), ("gamma_end", 1.1)])
def test_ends_outside_their_range_are_refused(key: str, value: float) -> None:
    with pytest.raises(UsageError, match=key):
        build_config({"ppo": {key: value}})
