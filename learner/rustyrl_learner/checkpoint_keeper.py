"""When the learner's state is written, and with which worlds."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from torch import Tensor

from rustyrl.config import Config
from rustyrl.resume import BEHIND_S
from rustyrl_learner.checkpoint import Counters, Loaded
from rustyrl_learner.checkpoint_writer import CheckpointWriter, Written
from rustyrl_learner.gathering import Gathering, KeptWorld

__all__ = ["CheckpointKeeper", "describe_resume"]

TURN_S = 0.1  # how often others are heard while copies of worlds are waited for
GATHER_S = 10.0  # how long actors may take to send them
EDGE_S = 5.0  # how long who asks for a checkpoint waits for the next batch edge
SLOW_S = 10.0  # of writing a checkpoint, after which it is said
SLOW_COPY_S = 0.5  # of copying worlds, from which on it is said, and updates alone make no checkpoint due
SHARE = 20  # of the time, that writing and copying may take each is one of so many parts


class CheckpointKeeper:
    """Belongs to the training thread.

    exact: the newest exact checkpoint, None if there is none
    problem: why the newest could not be written, "" if it could
    """

    def __init__(self, config: Config, writer: CheckpointWriter) -> None:
        self._run = config.run
        self._lag = config.batch.max_policy_lag
        self.writer = writer
        self._begun_at = -float("inf")  # the first update of a learner is kept at once: its successor begins there
        self._asked_at: float | None = None  # when somebody asked for one that was not begun yet
        self._awaited: set[int] = set()  # versions that somebody waits for
        self._worlds: Mapping[int, KeptWorld] = {}  # as they stand before the next batch, until that is taken
        self._worth_asking = not self._lag  # only without a lag do they all stand there together
        self._exact_here = False  # whether the worlds that were copied are all that go on
        self._exact_begun: Counters | None = None  # the newest exact checkpoint that was begun
        self._slow_said = self._slow_copy_said = False
        self._copy_s = 0.0  # how long training stood still for the newest copies
        self.keeps_worlds = False  # whether they could be had when they were asked for last
        self.exact: Counters | None = None
        self.problem = ""

    @property
    def at_edge(self) -> bool:
        """Whether the worlds were copied, all of them in time, since the last batch was taken."""
        return bool(self._worlds)

    def take_up(self, loaded: Loaded) -> None:
        """Go on from a checkpoint."""
        if loaded.manifest.exact:
            self.exact = loaded.manifest.counters
        self.keeps_worlds = bool(loaded.worlds) and not self._lag

    def leave_edge(self) -> None:
        """The next batch is taken: the worlds that were copied stand further back than it."""
        self._worlds, self._exact_here = {}, False

    def ask(self) -> None:
        """Somebody wants a checkpoint, and waits for it."""
        self._asked_at = time.monotonic()

    def is_asked(self, *, held: bool) -> bool:
        """Whether one that was asked for is to be begun between two turns of waiting for a batch.

        Args:
            held: training is, so that no batch edge is near at which the worlds could be had.
        """
        if self._asked_at is None:
            return False
        return held or not self.keeps_worlds or self.at_edge or time.monotonic() - self._asked_at > EDGE_S

    def is_due(self, version: int, say: Callable[[str], None]) -> bool:
        """Whether one is to be begun after this version.

        Writing takes at most a twentieth of the time of its thread, and copying worlds as much of training, but that a
        checkpoint is not put off for longer than `BEHIND_S` by it. A disk or actors that are slower get fewer.
        """
        if self._asked_at is not None:
            return True
        every_s = max(self._run.checkpoint_every_s, SHARE * self.writer.write_s, min(SHARE * self._copy_s, BEHIND_S))
        counted = version % self._run.checkpoint_every == 0 and self._copy_s < SLOW_COPY_S
        due = counted or time.monotonic() - self._begun_at > every_s
        if self._copy_s >= SLOW_COPY_S and not self._slow_copy_said:
            self._slow_copy_said = True
            say(
                f"copying the worlds for a checkpoint is slow: training stood still for {self._copy_s:.1f} s; it is "
                f"done every {every_s:.0f} s, which is also what a run that is killed may have to do again"
            )
        if due and self.writer.writing_s > SLOW_S and not self._slow_said:
            self._slow_said = True
            say(
                f"the disk is slow: a checkpoint has been written for {self.writer.writing_s:.0f} s; training goes on, "
                "and the next one is written after that"
            )
        return due and not self.writer.busy

    def gather(self, ask: Callable[[], Gathering], turn: Callable[[], float]) -> None:
        """Wait for copies of all worlds, if there is a chance to have them.

        Args:
            ask: has the owners send them.
            turn: hears others meanwhile, and says until when there is time at the latest.
        """
        if not self._worth_asking:
            return
        started = time.monotonic()
        gathering, deadline = ask(), started + GATHER_S
        while not gathering.done.wait(TURN_S) and time.monotonic() < min(deadline, turn()):
            pass
        worlds = gathering.end()
        self._copy_s = time.monotonic() - started
        if worlds is None:  # they were too slow, which says nothing of the next time
            return
        self._worlds, self._exact_here = worlds, bool(worlds) and not gathering.stateless
        self.keeps_worlds = bool(worlds)
        self._worth_asking = self.keeps_worlds or not gathering.stateless

    def begin(self, counters: Counters, policy: bytes, tensors: dict[str, Tensor], protected: set[int]) -> None:
        """Have a state written, with the worlds if they were copied since the last batch was taken."""
        if self._asked_at is not None:
            self._asked_at = None
            self._awaited.add(counters.policy_version)
        self._begun_at = time.monotonic()
        incomplete = self.keeps_worlds and not self._exact_here
        exact = [one for one in (self.exact, self._exact_begun) if one is not None and self._is_near(one, counters)]
        needed = frozenset(one.policy_version for one in exact)
        if self._exact_here:
            self._exact_begun = counters
        self.writer.begin(counters, policy, tensors, protected, self._worlds, incomplete=incomplete, exact=needed)

    def note(self, written: Written) -> bool:
        """Take in how one ended; whether somebody waits for it."""
        self.problem = written.problem
        if written.exact:
            self.exact = written.counters
        awaited = written.version in self._awaited
        self._awaited.discard(written.version)
        return awaited

    def stays_behind(self, now: Counters) -> int | None:
        """How many updates a run does again that goes on from the newest exact checkpoint; None if it is not to.

        It does so whatever incomplete ones were written since: `load_newest` goes by the same limit.
        """
        if self.at_edge or not self.keeps_worlds or self.exact is None or not self._is_near(self.exact, now):
            return None
        return now.policy_version - self.exact.policy_version

    def explain(self, written: Written) -> str:
        """What is to be known of one that was written; "" if nothing is."""
        exact = self.exact
        if not written.incomplete or (exact is not None and exact.policy_version == written.version):
            return ""
        why = "the worlds had gone on already, or could not be copied in time"
        if written.lost:
            why = f"they could not be written ({written.lost})"
        if exact is not None and self._is_near(exact, written.counters):
            again = written.version - exact.policy_version
            then = f"goes on from version {exact.policy_version} and does {again} updates again, to the same bits"
        else:
            then = "begins new episodes where it lacks them"
        return f"the checkpoint of version {written.version} lacks worlds: {why}; a resumed run {then}"

    @staticmethod
    def _is_near(exact: Counters, now: Counters) -> bool:
        return now.seconds - exact.seconds <= BEHIND_S


def describe_resume(loaded: Loaded, config: Config) -> str:
    """What goes on and what begins anew."""
    worlds, version = config.batch.worlds, loaded.manifest.counters.policy_version
    kept = sum(world < worlds for world in loaded.worlds)
    start = f"going on from version {version}"
    if kept == worlds:
        return f"{start} with the running episodes of all worlds ({worlds})"
    if loaded.manifest.format == 1:
        why = "its checkpoint has format 1, which held none"
    elif loaded.manifest.incomplete:
        why = "they had gone on when its checkpoint was written, or their copies did not come in time"
    elif config.batch.max_policy_lag:
        why = f"at a policy lag of {config.batch.max_policy_lag} worlds run ahead of checkpoints"
    else:
        why = "its checkpoint was not written at a batch edge, or these worlds have no save_state, or are new"
    return f"{start}; {worlds - kept} of {worlds} worlds begin new episodes: {why}"
