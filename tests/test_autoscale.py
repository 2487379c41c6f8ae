"""How many actors a run is to have, tried on simulated machines over simulated hours."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rustyrl import autoscale
from rustyrl.autoscale import AutoScale, Reading, parse_range
from rustyrl.errors import UsageError

HOUR_S = 3600.0
STEPS = 200  # an update's


class Machine:
    """Learner and actors that work side by side; every update ends with a reading.

    collect: env steps per second that so many actors make, at a time
    update_s: what the learner needs for an update
    noise: deviation of an update's duration, as a ratio
    """

    def __init__(
        self,
        collect: Callable[[int, float], float],
        update_s: float = 0.05,
        noise: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.collect, self.update_s, self.noise = collect, update_s, noise
        self.rng = random.Random(seed)
        self.now = self.waited_s = self.spent_s = 0.0
        self.version = self.steps = 0
        self.counts: list[tuple[float, int]] = []  # since when there are so many

    def update(self, actors: int) -> Reading:
        """Train once with so many actors."""
        duration = max(STEPS / self.collect(actors, self.now), self.update_s) * max(0.3, self.rng.gauss(1, self.noise))
        self.now += duration
        self.version += 1
        self.steps += STEPS
        self.waited_s += max(0.0, duration - self.update_s)
        self.spent_s += duration
        return self.reading(actors)

    def reading(self, present: int) -> Reading:
        return Reading(self.now, self.version, self.steps, self.waited_s, self.spent_s, present)

    def run(self, scale: AutoScale, actors: int, hours: float) -> int:
        """Let the number of actors follow; returns the last."""
        self.counts = self.counts or [(self.now, actors)]
        end = self.now + hours * HOUR_S
        while self.now < end:
            reading = self.update(actors)
            wanted = scale.decide(actors, reading)
            if wanted is not None:
                assert scale.lowest <= wanted <= scale.highest
                actors = wanted
                self.counts.append((self.now, actors))
        return actors

    def first_at(self, actors: int, *others: int) -> float:
        """When there were so many first, or one of these counts, in minutes."""
        return next(at for at, count in self.counts if count in (actors, *others)) / 60

    def changes(self, since_hours: float = 0.0) -> int:
        return sum(at > since_hours * HOUR_S for at, _ in self.counts[1:])

    def share_of_time(self, good: Callable[[int], bool], since_hours: float = 0.0) -> float:
        """The part of the time with a good number of actors."""
        since = since_hours * HOUR_S
        ends = [*(at for at, _ in self.counts[1:]), self.now]
        spans = [(max(0.0, end - max(at, since)), n) for (at, n), end in zip(self.counts, ends, strict=True)]
        return sum(span for span, n in spans if good(n)) / (self.now - since)


def up_to(most: int, each: float = 100.0) -> Callable[[int, float], float]:
    """Actors help up to so many: those beyond find no core."""
    return lambda actors, _: each * min(actors, most)


@pytest.mark.parametrize("start", [1, 16])
@pytest.mark.parametrize("most", [1, 2, 4, 7, 13])
def test_as_many_are_found_as_help_and_kept(most, start):
    machine = Machine(up_to(most, each=max(40.0, 400.0 / most)))
    assert machine.run(AutoScale(1, 16), start, hours=3) == most
    assert machine.first_at(most) < 10
    assert machine.share_of_time(lambda n: n == most, since_hours=0.25) > 0.9
    assert machine.changes(since_hours=2) <= 2 * 9  # each of four moves is tried, and undone, once an hour at most


def test_many_are_found_as_soon_as_few():
    """Each step is a part of what there is; beyond fifteen a count is found to an eighth."""
    machine = Machine(up_to(60, each=15.0))
    machine.run(AutoScale(1, 200), 2, hours=2)
    assert machine.first_at(*range(54, 67)) < 10
    assert machine.share_of_time(lambda n: 54 <= n <= 66, since_hours=0.25) > 0.9


def test_actors_that_hinder_each_other_are_sent_away_again():
    machine = Machine(lambda actors, _: 100.0 * (actors if actors <= 6 else max(1, 12 - actors)))
    assert machine.run(AutoScale(1, 16), 1, hours=3) == 6
    assert machine.share_of_time(lambda n: n == 6, since_hours=0.25) > 0.85


@pytest.mark.parametrize(("lowest", "start"), [(1, 1), (1, 8), (3, 8)])
def test_where_more_never_help_there_are_as_few_as_may_be(lowest, start):
    machine = Machine(lambda actors, _: 100.0)
    assert machine.run(AutoScale(lowest, 8), start, hours=6) == lowest
    assert machine.first_at(lowest) < 5
    assert machine.share_of_time(lambda n: n == lowest, since_hours=0.1) > 0.97


@pytest.mark.parametrize("start", [1, 16])
def test_a_learner_that_hardly_waits_gets_no_more_and_loses_who_is_too_many(start):
    machine = Machine(lambda actors, _: 100.0 * actors, update_s=0.4)  # five feed it
    assert machine.run(AutoScale(1, 16), start, hours=4) in (4, 5)
    assert machine.share_of_time(lambda n: n in (4, 5), since_hours=0.1) == pytest.approx(1.0)
    assert machine.changes(since_hours=1) <= 2 * 4


@pytest.mark.parametrize("wait_share", [autoscale.FULL + 0.01, 0.15, autoscale.HUNGRY - 0.01])
def test_with_a_learner_that_waits_a_little_nothing_is_tried(wait_share):
    """Though more would bring something."""
    machine = Machine(lambda actors, _: 100.0 * actors, update_s=0.5 * (1 - wait_share))
    assert machine.run(AutoScale(1, 16), 4, hours=1) == 4
    assert machine.changes() == 0


@pytest.mark.parametrize("power", [0.3, 0.5, 0.7, 1.0])
def test_as_long_as_more_bring_something_there_are_more(power):
    machine = Machine(lambda actors, _: 40.0 * actors**power)
    machine.run(AutoScale(1, 32), 1, hours=3)
    assert machine.share_of_time(lambda n: n >= 24, since_hours=1) > 0.9


@pytest.mark.parametrize("seed", range(4))
def test_noise_does_not_have_it_swing(seed):
    machine = Machine(up_to(6), noise=0.5, seed=seed)
    machine.run(AutoScale(1, 32), 1, hours=6)
    assert machine.first_at(6) < 20
    assert machine.steps / machine.now > 0.85 * 600
    assert machine.share_of_time(lambda n: 5 <= n <= 9, since_hours=0.5) > 0.75
    assert machine.changes(since_hours=1) / 5 <= 14  # an hour: one in four minutes


@pytest.mark.parametrize(("before", "after"), [(8, 2), (2, 8), (3, 5)])
def test_when_the_load_of_the_world_changes_the_count_follows(before, after):
    machine = Machine(lambda actors, now: 100.0 * min(actors, before if now < 2 * HOUR_S else after))
    scale = AutoScale(1, 16)
    assert machine.run(scale, 1, hours=2) in range(before - 1, before + 2)
    machine.counts = []
    assert machine.run(scale, before, hours=3) == after
    assert machine.first_at(after) - 120 < 75  # what had been tried often is tried again within the hour
    assert machine.share_of_time(lambda n: n == after, since_hours=3.5) > 0.9


def test_an_update_that_takes_long_is_waited_for():
    """Three updates each to settle and to measure: those under way are of the actors before."""
    machine = Machine(lambda actors, _: 10.0 * min(actors, 6), update_s=1.0)
    scale = AutoScale(1, 16)
    actors, changed_at = 1, 0
    for _ in range(400):
        wanted = scale.decide(actors, machine.update(actors))
        if wanted is not None:
            assert machine.version - changed_at >= 2 * autoscale.UPDATES
            actors, changed_at = wanted, machine.version
    assert changed_at
    assert actors in (5, 6, 8)


def test_nothing_is_decided_before_actors_had_time_to_settle_and_a_speed_was_measured():
    machine, scale = Machine(up_to(4, each=1000.0), update_s=0.01), AutoScale(1, 8)
    while scale.decide(1, machine.update(1)) is None:
        assert machine.now < 60
    least = autoscale.SETTLE_S + autoscale.MEASURE_S
    assert least <= machine.now < least + 5


@pytest.mark.parametrize(("gain", "kept"), [(1.1, 1), (1.2, 2)])
def test_more_actors_must_bring_a_part_of_what_they_could(gain, kept):
    """Twice as many could bring twice the speed; 15 % of that is worth it."""
    machine = Machine(lambda actors, _: 100.0 if actors == 1 else 100.0 * gain)
    assert machine.run(AutoScale(1, 2), 1, hours=0.5) == kept
    assert machine.share_of_time(lambda n: n == kept, since_hours=0.05) > 0.9


def test_a_step_that_paid_is_not_undone_at_once():
    machine = Machine(up_to(4))
    machine.run(AutoScale(1, 16), 1, hours=0.5)
    assert [count for _, count in machine.counts[:6]] == [1, 2, 3, 4, 5, 4]
    came, back = machine.counts[3][0], next(at for at, count in machine.counts[4:] if count == 3)
    assert back - came >= autoscale.FORGET_S


def test_what_did_not_pay_is_tried_ever_more_rarely_but_once_an_hour():
    machine = Machine(lambda actors, _: 100.0)
    machine.run(AutoScale(1, 2), 1, hours=9)
    tried = [at for at, count in machine.counts if count == 2]
    pauses = [after - before for before, after in itertools.pairwise(tried)]
    assert pauses[:3] == pytest.approx([300, 600, 1200], abs=50)
    assert pauses[4:] == pytest.approx([autoscale.LONGEST_S] * len(pauses[4:]), abs=50)
    assert len(pauses) > 8


def test_a_reading_that_is_given_again_decides_nothing():
    machine, scale = Machine(up_to(4), update_s=0.01), AutoScale(1, 8)
    for _ in range(100):
        reading = machine.update(1)
        if scale.decide(1, reading) is not None:
            break
        assert [scale.decide(1, reading) for _ in range(3)] == [None] * 3
    else:
        pytest.fail("nothing was decided")


def test_what_a_learner_does_between_updates_is_not_measured():
    """A speed is from one update's end to another's: else one more or less would make it another."""
    machine, scale = Machine(up_to(2)), AutoScale(1, 4)
    actors, counts, decided_at = 1, [], []
    for _ in range(2000):
        machine.update(actors)
        machine.now -= 0.3  # the reading comes at once, others follow it
        for _ in range(3):
            wanted = scale.decide(actors, machine.reading(actors))
            machine.now += 0.1
            if wanted is not None:
                actors = wanted
                counts.append(actors)
                decided_at.append(machine.now)
    assert counts[:3] == [2, 3, 2]
    assert decided_at[0] < 30  # nor are they updates of no speed, which would have it measure for longer


def test_a_learner_of_which_little_is_known_changes_nothing():
    """It is starting, or waits for actors: no update ends."""
    machine, scale = Machine(up_to(4)), AutoScale(2, 8)
    for _ in range(10_000):
        machine.now += 0.1
        assert scale.decide(2, machine.reading(0)) is None


def test_actors_that_die_and_come_back_do_not_mislead_it():
    """While one is away it is slower, and that says nothing about how many there should be."""
    for period_s in (37.0, 61.0, 95.0):
        machine, scale = Machine(up_to(4)), AutoScale(1, 8)
        actors, wanteds = 1, []
        while machine.now < 2 * HOUR_S:
            away = machine.now % period_s < 4.0 and actors > 1
            wanted = scale.decide(actors, machine.update(actors - away))
            if wanted is not None:
                actors = wanted
                wanteds.append((machine.now, wanted))
        assert [wanted for _, wanted in wanteds[:3]] == [2, 3, 4]
        assert {wanted for _, wanted in wanteds[3:]} <= {3, 4, 5}
        assert actors == 4


def decision(scale: AutoScale, machine: Machine, actors: int, present: Callable[[], int] | None = None) -> int:
    """Train until there is a decision."""
    for _ in range(1000):
        wanted = scale.decide(actors, machine.update(actors if present is None else present()))
        if wanted is not None:
            return wanted
    pytest.fail("nothing was decided")


def test_a_measurement_that_was_interrupted_is_made_anew():
    """Nobody is sent away because of a pause."""
    machine, scale = Machine(up_to(4)), AutoScale(1, 8)
    assert decision(scale, machine, 1) == 2
    for _ in range(15):  # it has settled, and is being measured
        assert scale.decide(2, machine.update(2)) is None
    machine.now += 300.0
    scale.interrupt()
    assert decision(scale, machine, 2) == 3


def test_actors_are_given_the_time_to_come():
    """Until the new one is there nothing is faster, and nothing is measured."""
    machine, scale = Machine(up_to(4)), AutoScale(1, 8)
    actors = 1
    for expected in (2, 3, 4, 5):
        wanted = decision(scale, machine, actors)
        assert wanted == expected
        before, comes_at = actors, machine.now + 14.0
        while machine.now < comes_at:
            assert scale.decide(wanted, machine.update(before)) is None
        actors = wanted


def test_a_trial_is_compared_with_how_fast_it_was_just_before():
    """A world that got faster while nothing was tried is no merit of the next trial."""
    machine = Machine(lambda actors, now: 100.0 if now < 2000 else 200.0, update_s=0.01)
    assert machine.run(AutoScale(1, 2), 1, hours=1.5) == 1
    tried = [at for at, count in machine.counts if count == 2]
    assert any(at < 2000 for at in tried)
    assert any(at > 2000 for at in tried)
    assert machine.share_of_time(lambda n: n == 1, since_hours=2000 / HOUR_S) > 0.95


def test_a_learner_that_follows_another_is_measured_anew():
    """It begins with an older checkpoint: its counts are lower, and go on from there."""
    machine, scale = Machine(up_to(8)), AutoScale(1, 2)
    for _ in range(30):
        if scale.decide(1, machine.update(1)) is not None:
            break
    assert scale.decide(2, machine.update(2)) is None
    while machine.now < 300:
        machine.version, machine.steps = machine.version - 15, machine.steps - 15 * STEPS
        for _ in range(18):  # it never comes to a measurement
            assert scale.decide(2, machine.update(2)) is None


def test_a_number_out_of_the_range_is_brought_into_it_at_once():
    machine, scale = Machine(up_to(4)), AutoScale(2, 5)
    assert scale.decide(1, machine.reading(1)) == 2
    assert scale.decide(0, machine.reading(0)) == 2
    assert scale.decide(6, machine.reading(6)) == 5
    assert scale.decide(2, machine.reading(2)) is None
    assert scale.decide(5, machine.reading(5)) is None


def test_a_trial_is_off_when_the_number_was_changed_from_outside():
    machine, scale = Machine(lambda actors, _: 100.0), AutoScale(1, 8)
    machine.run(scale, 1, hours=25 / 3600)
    assert machine.counts[-1][1] == 2
    assert scale.decide(9, machine.update(9)) == 8
    end = machine.now + 60
    while (wanted := scale.decide(8, machine.update(8))) is None:
        assert machine.now < end
    assert wanted == 6  # and not back to one


@settings(max_examples=60, deadline=None)
@given(
    bounds=st.tuples(st.integers(1, 40), st.integers(0, 40)),
    readings=st.lists(
        st.tuples(st.floats(0, 60), st.integers(-2, 9), st.integers(0, 9000), st.floats(0, 1), st.integers(0, 9)),
        max_size=60,
    ),
)
def test_it_stays_in_its_range_whatever_it_is_told(bounds, readings):
    scale = AutoScale(bounds[0], sum(bounds))
    at = waited_s = spent_s = 0.0
    version, steps, actors = 2 * len(readings), 0, bounds[0]
    for passed_s, updates, more, wait_share, present in readings:
        at, version, steps = at + passed_s, version + updates, steps + more
        waited_s, spent_s = waited_s + passed_s * wait_share, spent_s + passed_s
        wanted = scale.decide(actors, Reading(at, version, steps, waited_s, spent_s, present))
        if wanted is not None:
            assert scale.lowest <= wanted <= scale.highest
            assert wanted != actors
            actors = wanted


def test_a_reading_is_made_of_what_a_learner_reports():
    report = {
        "version": 7,
        "steps": 900,
        "stages_s": {"wait": 2.5, "update": 4.0, "stack": 0.5},
        "actors": [{"ready": True}, {"ready": False}, {"ready": True}],
    }
    assert Reading.of(report, 12.5) == Reading(12.5, 7, 900, 2.5, 7.0, 2)
    assert Reading.of({**report, "stages_s": {}, "actors": []}, 0.0) == Reading(0.0, 7, 900, 0.0, 0.0, 0)


@pytest.mark.parametrize(("text", "lowest", "highest"), [("1:4", 1, 4), ("3:3", 3, 3), ("1:1000", 1, 1000)])
def test_a_range_is_two_numbers(text, lowest, highest):
    scale = parse_range(text)
    assert (scale.lowest, scale.highest) == (lowest, highest)


@pytest.mark.parametrize("text", ["", "4", ":", "1:", ":4", "0:4", "5:4", "1:1001", "1:2:3", "-1:4", "a:b", "1.5:4"])
def test_what_is_no_range_is_refused_with_what_is(text):
    with pytest.raises(UsageError, match="MIN:MAX"):
        parse_range(text)
