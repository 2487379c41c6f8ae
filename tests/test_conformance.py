"""The conformance kit finds every planted fault, under the right name and with a remedy, and none in sound worlds."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from clusters import WORLDS
from worlds.arena import Arena

from rustyrl_actors.testing import CHECKS, Finding, assert_conforms, check_environment, conformance
from rustyrl_actors.testing.trial import ActionDraws

EXAMPLES = Path(__file__).parent.parent / "examples"
COLUMN, OBJECT = f"{WORLDS}/faulty.py:ColumnWalk", f"{WORLDS}/faulty.py:ObjectWalk"
ARENA = f"{WORLDS}/arena.py:{Arena.__name__}"
STEPS = 40
AGAIN = {
    "clean reset",
    "saved state",
    "independent slots",
    "independent worlds",
}  # all that compares a trial with another


class Fault(msgspec.Struct, frozen=True):
    """check: the one that finds it; says, remedy: patterns; also: other checks that it cannot but fail."""

    check: str
    says: str
    remedy: str
    also: frozenset[str] = frozenset()


def fault(check: str, says: str, remedy: str, *also: str) -> Fault:
    return Fault(check, says, remedy, frozenset(also))


BOTH = {
    "outside its space": fault(
        "observations",
        r"^observation 'main'\[1\] of slot \d at step 3 is [67]\.\d+, its space goes from -5.0 to 5.0$",
        "widen the bounds of the observation_space",
    ),
    "not a number": fault(
        "finite numbers", r"^observation 'main' of slot 0 at step 3 is nan$", "find what divides by zero"
    ),
    "not a number at the limit": fault("finite numbers", r"final observation 'main'", "find what divides by zero"),
    "infinite reward": fault("finite numbers", r"^reward of slot \d at step 2 is -?inf$", "find what divides by zero"),
    "dies at once": fault("flags", "every episode terminates in its first step", "condition that sets agent.termin"),
    "infinite metric": fault("metrics", "^the episode metric 'distance' is inf$", "report NaN where"),
    "global random": fault(
        "determinism",
        r"gave other numbers \(the global random generator of Python or numpy was drawn from\): reward of slot 0 at "
        r"step 0: -\d.\d+ against -\d.\d+$",
        "draw from the rng that reset",
        *AGAIN,
    ),
    "numpy's global random": fault(
        "determinism", r"gave other numbers \(the global random generator", "can say global_random = True", *AGAIN
    ),
    "clock": fault("determinism", r"gave other numbers: .* of slot 0 at step", "do not look at the clock", *AGAIN),
    "shared state": fault(
        "independent worlds",
        r"a second world .* changed the first: .* slot \d at step \d",
        "module globals or class attributes",
    ),
    "keeps state": fault(
        "clean reset",
        r"used before gave other numbers .*: reward of slot 0 at step 0:",
        "put back everything",
        "saved state",
    ),
    "does not reset": fault(
        "reset in the same step", "is still its last one: the world was not reset", r"reset\(\) must start", *AGAIN
    ),
    "leaves a number unwritten": fault(
        "written rows",
        r"^what stood in memory before a step shows through: observation 'main'\[\d\] of slot 0 at step 0: ",
        r"observe\(\) must write every number",
        "observations",
    ),
    "keeps a row": fault(
        "stale references",
        r"^(reward|observation 'main') of step 0 was changed by a later step",
        "keep copies of what you need",
        "clean reset",  # what is kept is a row of the trial before
        "saved state",
    ),
    "ignores the seed": fault("seeds", "two seeds gave the same numbers in every step", "from the rng that reset"),
    "unknown goal": fault(
        "declaration", r"^goal sucess_rate>=0.9 names no figure of this world; it has .*distance_mean$", "declaration"
    ),
    "float64": fault("declaration", "this Box is float64, give it dtype=np.float32", "mend the declaration"),
    "discrete observation": fault("declaration", "Discrete.5.; expected .*one-hot", "mend the declaration"),
    "forgets a number": fault(
        "saved state",
        r"^a world that went on from its saved state gave other numbers: .* of slot \d at step 19",
        r"save_state\(\) must give everything",
    ),
    "crashes": fault(
        "runs",
        r"^ZeroDivisionError: the world fell over \(.*faulty.py, line \d+, in process\); raised in world .*, tick 3",
        "the world must step without an error",
    ),
    "allows nothing": fault(
        "runs",
        r"slot \d, tick 3 .*field action_mask\['main'\]: expected at least one choice that is allowed, got none$",
        "mend what the message names",
    ),
}
COLUMN_FAULTS = {
    **BOTH,
    "vanishes": fault(
        "flags", r"^the agent in slot 0 is gone at step 2, and its episode had not ended$", "set terminated"
    ),
    "replaces the reward": fault(
        "runs", r"field reward: expected the array that was there, .*agent.reward\[:\] = ", "mend what the message"
    ),
    "slots meet": fault(
        "independent slots",
        r"other actions in slot 0 changed what happens elsewhere: .* of slot [12] at step",
        "let every row of the arrays depend on that row alone",
    ),
    "resets all rows": fault(
        "independent slots",
        r"changed .*: observation 'main'\[\d\] of slot [12] at step",
        "must touch the rows it is given and no",
    ),
    "observes in another order": fault(
        "reset in the same step",
        r"observation 'main' of slot [02] differs between observe\(rows\) after a reset and observe\(all\)",
        r"let observe\(rows\) write for exactly these rows",
        "independent slots",
    ),
    "observes the first rows": fault("independent slots", r"observation 'main'\[\d\] of slot [12] at step", "observe"),
}
OBJECT_FAULTS = {
    **BOTH,
    "vanishes": fault(
        "runs", r"slot 0, tick 3 .*the entity was deleted, or lost its Agent, while its episode went on", "mend what"
    ),
    "is cut and not observed": fault(
        "written rows",
        r"shows through: .*final observation 'main' of slot",
        r"observe\(\) must write every number",
        "observations",
    ),
}
FAULTS = [
    *((COLUMN, name, found) for name, found in COLUMN_FAULTS.items()),
    *((OBJECT, name, found) for name, found in OBJECT_FAULTS.items()),
]


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trials of a few steps, no measurement, and no thousand episodes: what is planted shows at once."""
    monkeypatch.setattr(conformance, "TRIAL_STEPS", (STEPS, STEPS))
    monkeypatch.setattr(conformance, "measure_speed", lambda *_: {"env_sps": 1.0})
    monkeypatch.delitem(CHECKS, "leaks")


@pytest.fixture
def hoard() -> Iterator[None]:
    """Let go of what leaked."""
    yield
    import faulty  # as the kit imported it

    faulty.HOARD.clear()


def failed(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.check: finding for finding in findings if finding.passed is False}


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize(
    ("world", "name", "expected"), FAULTS, ids=[f"{world.rpartition(':')[2]}-{name}" for world, name, _ in FAULTS]
)
def test_a_planted_fault_is_found_by_the_check_that_is_meant_for_it(world: str, name: str, expected: Fault) -> None:
    findings, speed = check_environment(world, {"fault": name})
    found = failed(findings)
    assert expected.check in found, f"passed; found were {list(found.values())}"
    assert found.keys() <= {expected.check} | expected.also
    finding = found[expected.check]
    assert re.search(expected.says, finding.problem), finding.problem
    assert re.search(expected.remedy, finding.remedy), finding.remedy
    assert len(finding.remedy.split()) >= 5
    if expected.check in ("declaration", "runs"):
        assert findings[-1] is finding  # the rest would say the same
        assert speed == {}


@pytest.mark.usefixtures("hoard")
@pytest.mark.parametrize("world", [COLUMN, OBJECT], ids=["column", "object"])
@pytest.mark.parametrize("name", ["leaks objects", "leaks arrays"])
def test_a_leak_is_found(world: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conformance, "CHECKS", {check: CHECKS[check] for check in ("runs", "leaks")})
    monkeypatch.setattr(conformance, "TRIAL_STEPS", (STEPS, STEPS))
    monkeypatch.setattr(conformance, "measure_speed", lambda *_: {})
    findings, _ = check_environment(world, {"fault": name})
    assert list(failed(findings)) == ["leaks"]
    told = re.fullmatch(r"1000 resets left (-?\d+) objects and (-?\d+) MiB behind", findings[-1].problem)
    assert told is not None, findings[-1].problem
    objects, mebibytes = map(int, told.groups())
    assert objects >= 900 if name == "leaks objects" else mebibytes >= 64
    assert "delete what an episode created" in findings[-1].remedy


def test_every_check_has_a_planted_fault() -> None:
    planted = {expected.check for _, _, expected in FAULTS} | {"leaks"}
    assert planted == {"declaration", *CHECKS}


@pytest.mark.parametrize(("world", "slots"), [(COLUMN, 3), (OBJECT, 2)], ids=["column", "object"])
def test_a_sound_world_passes_every_check_and_its_speed_is_told(world: str, slots: int) -> None:
    heard: list[Finding] = []
    findings, speed = check_environment(world, {"slots": slots}, on_finding=heard.append)
    assert [finding.check for finding in findings] == ["declaration", *CHECKS]
    assert heard == findings
    assert not failed(findings)
    expected = [] if world == COLUMN else ["independent slots"]
    assert [finding.check for finding in findings if finding.passed is None] == expected
    assert speed["env_sps"] > 100
    parts = [speed[f"{part}_us"] for part in ("tick", "observe", "reset", "framework")]
    assert all(part > 0 for part in parts)
    assert sum(parts) == pytest.approx(speed["step_us"], abs=0.01)


PASS: dict[str, dict[str, Any]] = {
    "cartpole": {},
    "cartpole-object": {},
    "gym:CartPole-v1": {"slots": 2},
    f"{EXAMPLES}/point.py:Point": {"slots": 4},
    f"{EXAMPLES}/doors.py:Doors": {"slots": 4},
    f"{EXAMPLES}/catapult.py:Catapult": {"slots": 4},
}


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize(("world", "settings"), PASS.items(), ids=[world.rpartition("/")[2] for world in PASS])
def test_our_own_worlds_conform(world: str, settings: dict[str, Any]) -> None:
    assert_conforms(world, **settings)


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize(
    "settings",
    [{"unrest": 0.1}, {"unrest": 0.1, "ticks": 3}, {"fighters": 2}],
    ids=["restless", "several ticks", "empty slots"],
)
@pytest.mark.parametrize("seed", [1, 2])
def test_a_game_of_several_agents_that_come_and_go_conforms(settings: dict[str, Any], seed: int) -> None:
    assert_conforms(ARENA, seed=seed, **settings)


@pytest.mark.usefixtures("short")
def test_assert_conforms_lists_every_problem_and_its_remedy() -> None:
    with pytest.raises(AssertionError) as caught:
        assert_conforms(COLUMN, fault="clock", slots=2)
    said = str(caught.value)
    assert said.startswith(f"{COLUMN} does not conform:\ndeterminism: the same seed and the same actions gave other")
    assert "\n    draw from the rng that reset() gets" in said
    assert "\nindependent worlds: a second world" in said


@pytest.mark.usefixtures("short")
def test_what_does_not_apply_says_why() -> None:
    findings, _ = check_environment("gym:CartPole-v1", {"slots": 2})
    skipped = {finding.check: finding.problem for finding in findings if finding.passed is None}
    assert skipped.keys() == {
        "observations",
        "metrics",
        "seeds",
        "reset in the same step",
        "independent slots",
        "saved state",
    }
    assert all(len(reason.split()) >= 3 for reason in skipped.values())
    findings, _ = check_environment(COLUMN, {"slots": 1})
    assert [f.problem for f in findings if f.passed is None] == ["a world has one slot"]


@pytest.mark.usefixtures("short")
def test_an_error_in_the_making_of_a_world_is_a_problem_of_its_declaration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "unmade.py").write_text(
        "class Unmade:\n    def __init__(self, slots, parameters):\n        self.slots = slots / 0\n"
        "    def build(self): ...\n    def reset(self, rows, rng): ...\n    def observe(self, rows): ...\n"
    )
    findings, speed = check_environment(f"{tmp_path}/unmade.py:Unmade")
    [finding] = findings
    assert finding.check == "declaration"
    assert re.search(r"^ZeroDivisionError: .*unmade.py, line 3, in __init__\)$", finding.problem)
    assert speed == {}


def test_trials_try_every_choice_and_the_ends_of_every_range() -> None:
    from rustyrl_actors.catalog import find_environment

    spec = find_environment(f"{EXAMPLES}/catapult.py:Catapult", {"slots": 4}).spec
    draws = ActionDraws(spec, STEPS, 1)
    actions = [draws.at(t, {}) for t in range(STEPS)]
    forces = [action["force"] for action in actions]
    assert {float(force) for t in range(6, STEPS, 7) for force in forces[t].ravel()} == {-1.0, 1.0}
    assert len({float(force) for force in forces[0].ravel()} - {-1.0, 1.0}) == 4
    assert {int(sling) for action in actions for sling in action["sling"]} == {0, 1, 2}


@pytest.mark.usefixtures("short")
def test_a_metric_that_worlds_share_does_not_pass() -> None:
    found, _ = check_environment(f"{WORLDS}/shared.py:SharedScore")
    findings = {finding.check: finding for finding in found if finding.passed is False}
    assert any("episode metric 'distance' of slot" in finding.problem for finding in findings.values())
