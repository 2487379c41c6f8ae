"""Hold a world against everything that training on it relies on, and say in words what is wrong and how to mend it."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from rustyrl.condition import parse_condition
from rustyrl.config import build_config
from rustyrl.errors import ContractError, UsageError
from rustyrl.figures import known_figures
from rustyrl_actors.catalog import GYM_PREFIX, EnvironmentSource, find_environment, find_world
from rustyrl_actors.environment import allocate_rows
from rustyrl_actors.testing import checks_episodes as episodes
from rustyrl_actors.testing import checks_rows as rows
from rustyrl_actors.testing.checks_episodes import GLOBAL_RANDOM
from rustyrl_actors.testing.speed import measure_speed
from rustyrl_actors.testing.subject import DoesNotApplyError, Subject, ViolationError
from rustyrl_actors.testing.trial import ActionDraws

__all__ = ["CHECKS", "Finding", "assert_conforms", "check_environment"]

TRIAL_S = 0.5  # what one trial may take, about
TRIAL_STEPS = (24, 400)  # at least, at most


class Finding(msgspec.Struct, frozen=True):
    """What one check found: ``passed`` is None where it does not apply to this kind of environment."""

    check: str
    passed: bool | None
    problem: str = ""
    remedy: str = ""


CHECKS: dict[str, Callable[[Subject], None]] = {
    "runs": rows.runs,
    "written rows": rows.writes_every_row,
    "stale references": rows.keeps_no_rows,
    "observations": rows.observes_within_its_space,
    "finite numbers": rows.gives_finite_numbers,
    "flags": rows.ends_with_flags,
    "metrics": rows.reports_its_metrics,
    "determinism": episodes.repeats_under_a_seed,
    "seeds": episodes.differs_between_seeds,
    "clean reset": episodes.resets_cleanly,
    "reset in the same step": episodes.resets_in_the_same_step,
    "independent slots": episodes.keeps_slots_apart,
    "independent worlds": episodes.keeps_worlds_apart,
    "saved state": episodes.goes_on_from_a_saved_state,
    "leaks": episodes.does_not_leak,
}


NEED_DETERMINISM = ("clean reset", "saved state", "independent slots", "independent worlds")  # they compare trials


def check_environment(
    env: str,
    env_config: Mapping[str, Any] | None = None,
    *,
    seed: int = 1,
    on_finding: Callable[[Finding], None] = lambda _: None,
) -> tuple[list[Finding], dict[str, float]]:
    """Run every check of `CHECKS` on an environment.

    Args:
        env: as ``rustyrl train`` takes it.
        env_config: ``slots`` and parameters, as ``--set env.NAME=VALUE`` gives them.
        seed: of the trials.
        on_finding: called with each finding as it is made.

    Returns:
        The findings, and the speed by part (see `measure_speed`; empty if it does not run).

    Raises:
        UsageError: there is no such environment.
    """
    if not env.startswith(GYM_PREFIX):
        find_world(env)
    findings: list[Finding] = []

    def note(finding: Finding) -> bool:
        findings.append(finding)
        on_finding(finding)
        return finding.passed is not False

    try:
        source = find_environment(env, env_config or {})
        _check_declared(source)
    except (UsageError, ContractError) as error:
        note(Finding("declaration", False, str(error), "mend the declaration of the world and check again"))
        return findings, {}
    except Exception as error:
        note(Finding("declaration", False, _told(error), "the world must be made without an error"))
        return findings, {}
    note(Finding("declaration", True))
    subject: Subject | None = None
    for name, check in CHECKS.items():
        try:
            if subject is None:
                subject = Subject(source, seed, _affordable_steps(source, seed))
            if name in NEED_DETERMINISM and any(GLOBAL_RANDOM in finding.problem for finding in findings):
                raise DoesNotApplyError("the global random generators were drawn from, so that nothing can be compared")
            check(subject)
            ok = note(Finding(name, True))
        except DoesNotApplyError as reason:
            ok = note(Finding(name, None, str(reason)))
        except Exception as error:
            ok = note(_finding(name, error))
        if name == "runs" and not ok:
            return findings, {}  # the rest would say the same
    try:
        return findings, measure_speed(source, seed)
    except Exception as error:
        note(_finding("speed", error))
        return findings, {}


def _finding(name: str, error: Exception) -> Finding:
    """What went wrong in a check, in words."""
    if isinstance(error, ViolationError):
        return Finding(name, False, error.problem, error.remedy)
    if isinstance(error, ContractError):
        return Finding(name, False, str(error), "mend what the message names")
    return Finding(name, False, _told(error), "the world must step without an error")


def assert_conforms(env: str, *, seed: int = 1, **env_config: Any) -> None:
    """Fail with every problem that `check_environment` finds; for test suites."""
    findings, _ = check_environment(env, env_config, seed=seed)
    problems = [f"{f.check}: {f.problem}\n    {f.remedy}" for f in findings if f.passed is False]
    if problems:
        raise AssertionError(f"{env} does not conform:\n" + "\n".join(problems))


def _check_declared(source: EnvironmentSource) -> None:
    """Conditions that name figures that exist, defaults that the configuration knows."""
    spec = source.spec
    build_config(spec.defaults)
    known = known_figures(spec)
    for where, texts in (("goal", spec.goal), ("evaluate_from", spec.evaluate_from)):
        for condition in map(parse_condition, texts):
            if condition.metric not in known:
                raise UsageError(f"{where} {condition} names no figure of this world; it has {', '.join(known)}")


def _affordable_steps(source: EnvironmentSource, seed: int) -> int:
    """How many steps a trial has: enough to see episodes end, few enough to be done soon."""
    environment, written = source.make(), allocate_rows(source.spec)
    try:
        environment.reset((seed, 0), written)
        draws = ActionDraws(source.spec, TRIAL_STEPS[0], seed)
        started = time.perf_counter()
        for t in range(TRIAL_STEPS[0]):
            environment.step(draws.at(t, written.action_mask), written)
        step_s = (time.perf_counter() - started) / TRIAL_STEPS[0]
    finally:
        environment.close()
    return int(min(max(TRIAL_S / step_s, TRIAL_STEPS[0]), TRIAL_STEPS[1]))


def _told(error: Exception) -> str:
    """An error with the line of the user's code that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "rustyrl_actors" not in frame.filename] or list(frames)
    place = f" ({own[-1].filename}, line {own[-1].lineno}, in {own[-1].name})" if own else ""
    notes = "".join(f"; {note}" for note in getattr(error, "__notes__", []))
    return f"{type(error).__name__}: {error}{place}{notes}"
