"""A run that cannot learn says why; one that can is silent."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from clusters import WORLDS, await_status, end
from studies import CPU, found

from rustyrl.config import build_config
from rustyrl.rollout import EpisodeRows
from rustyrl.spec import UNBOUNDED, ActionSpec, ArraySpec, EnvironmentSpec
from rustyrl.weights import read_policy
from rustyrl_learner import checkpoint, symptoms
from rustyrl_learner.batch import Batch
from rustyrl_learner.diagnosis import Diagnosis
from rustyrl_learner.normalizer import ObservationNormalizer
from rustyrl_learner.training import Training

GUESSES = f"{WORLDS}/unteachable.py:Guesses"
RAW = {"normalize": False}
WILD = {"learning_rate": 1.0, "schedule": "constant", "epochs": 4}
RUN = (
    "--actors", "1", "--set", "env.slots=64", "--set", "batch.worlds=1", "--set", "batch.unroll_length=16",
    "--set", "policy.hidden=[16]", "--set", "run.eval_episodes=1", "--set", "ppo.epochs=1",
)  # fmt: skip
WIDTH, SLOTS, STEPS = 3, 8, 10
CHOICE = ActionSpec("discrete", counts=(4,))
BOX = ActionSpec("box", shape=(2,), low=(-1.0, -1.0), high=(1.0, 1.0))
CALM = {
    "entropy": 1.0, "value_mean": 1.0, "value_target_mean": 1.0, "value_target_std": 0.5, "value_loss": 0.5,
    "first_ratio_error": 1e-5, "gamma": 0.99,
}  # fmt: skip


pytestmark = pytest.mark.usefixtures("one_thread")


# Real runs


def test_a_run_without_rewards_says_so_everywhere(start):
    cluster = start("train", GUESSES, "--total-steps", "1000000000", "--json", "--set", "env.fault=no reward", *RUN)
    status = await_status(cluster, lambda status: status["learner"].get("findings"), "a finding")
    (finding,) = status["learner"]["findings"]
    assert finding["kind"] == "rewards_equal"
    assert finding["message"].startswith("every reward is 0 in ")
    assert finding["steps"] > 0
    summary, err = end(cluster)
    assert summary["findings"] == [finding]
    assert json.loads((cluster.run / "summary.json").read_text())["findings"] == [finding]
    assert err.count(f"finding: {finding['message']}") == 1


def test_a_run_whose_episodes_are_one_step_long_says_so(start):
    cluster = start("train", GUESSES, "--total-steps", "12000", "--json", "--set", "env.fault=one step", *RUN)
    code, out, err = cluster.wait()
    assert code == 0, err
    assert [finding["kind"] for finding in json.loads(out)["findings"]] == ["one_step_episodes"]
    assert re.search(r"finding: all [\d,]+ episodes so far were one step long, of 8 that they may last", err)


def test_numbers_that_are_not_finite_end_a_run_that_can_be_resumed_from_the_version_before(start):
    wild = ("--set", "ppo.learning_rate=1e30", "--set", "ppo.schedule=constant", "--set", "ppo.minibatch_size=64")
    cluster = start("train", GUESSES, "--total-steps", "1000000", *RUN, *wild)
    code, _, err = cluster.wait()
    assert code == 1
    version = len(cluster.rows())
    assert re.search(rf"(not finite|is nan|is inf|holds) ?.* in the update to policy version {version + 1}, which", err)
    assert "a learning rate that is too high (1e+30 now)" in err
    newest = cluster.run / "checkpoints" / f"{version:09d}"
    assert f"; the last good checkpoint is {newest}" in err
    cluster.assert_gone()
    policy = newest / "policy.safetensors"
    assert policy.read_bytes() == (cluster.run / "policy.safetensors").read_bytes()
    assert all(np.isfinite(array).all() for array in read_policy(policy).arrays.values())
    loaded = checkpoint.load_newest(cluster.run / "checkpoints", json_fingerprint(newest))
    assert loaded is not None
    assert loaded[0].counters.policy_version == version
    assert all(tensor.isfinite().all() for tensor in loaded[1].values() if tensor.is_floating_point())
    again = start(
        "train", "--resume", "--total-steps", "3000", "--json", "--set", "ppo.learning_rate=1e-3", run=cluster.run
    )
    code, out, err = again.wait()
    assert code == 0, err
    assert json.loads(out)["policy_version"] > version


def json_fingerprint(path: Path) -> str:
    fingerprint: str = json.loads((path / "manifest.json").read_text())["fingerprint"]
    return fingerprint


# Real worlds, policies and updates in this process


@pytest.mark.parametrize(
    ("fault", "sections", "kind", "said"),
    [
        ("same reward", {}, "rewards_equal", r"^every reward is -1 in 30,720 env steps and 3,\d+ episodes, and no epi"),
        ("blind", {}, "observations_constant", r"^all observations of 10,240 env steps are the same \(0, 0, 0, 0, "),
        ("unscaled", {"policy": RAW}, "observations_unscaled", r"^observation shown\[2\] has a root mean square of 5"),
        ("tiny", {"policy": RAW}, "observations_unscaled", r"^all observations are tiny, the largest being noise "),
        ("meddling", {}, "ratio_not_one", r"^an action's probability by the learner is up to \S+ times off"),
        ("chance", {"ppo": WILD}, "entropy_collapse", r"^the policy is nearly deterministic \(entropy \S+ nats\)"),
        ("", {"ppo": {**WILD, "learning_rate": 1e3}}, "value_explosion", r"^values have exploded: they are of the "),
    ],
)
def test_what_keeps_a_world_from_being_learned_is_found(fault, sections, kind, said):
    findings = found(GUESSES, 31, kind, env={"fault": fault}, **sections)
    assert kind in findings, findings
    assert re.match(said, findings[kind])
    if kind != "value_explosion":  # which comes with a policy that is stuck
        assert list(findings) == [kind]


@pytest.mark.parametrize(
    ("world", "sections"),
    [
        (GUESSES, {}),
        (GUESSES, {"env": {"box": True}}),
        (GUESSES, {"policy": RAW}),
        (GUESSES, {"env": {"limit": 1}}),
        ("cartpole", {"policy": RAW}),
        ("cartpole-object", {"env": {"slots": 1}, "batch": {"worlds": 8}}),
        ("gym:CartPole-v1", {"env": {"slots": 8}}),
        ("drone", {"batch": {"unroll_length": 32}}),
    ],
    ids=["choice", "box", "raw", "bandit", "cartpole", "cartpole-object", "gym", "drone"],
)
def test_worlds_that_can_be_learned_are_silent(world, sections):
    assert found(world, 34, **sections) == {}


@pytest.mark.filterwarnings("ignore:overflow encountered")  # in the return of an episode
def test_a_batch_that_overflows_is_named_by_its_tensor():
    with pytest.raises(FloatingPointError, match=r"^tensor value_target of the batch holds (nan|inf) \(\d+ of 1024\)"):
        found(GUESSES, 3, env={"fault": "huge reward"})


@pytest.mark.parametrize("place", ["critic.weights.1", "policy_head.biases.0", "normalizer.variance"])
@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_an_update_that_leaves_a_number_that_is_not_finite_is_named_by_its_tensor(place, number):
    training = Training(build_config({}), spec_of(), CPU)
    training.check_finite()
    name = place if place in training.state() else f"network.{place}"
    with torch.no_grad():
        training.state()[name].view(-1)[-1] = number
    with pytest.raises(FloatingPointError, match=f"^tensor {re.escape(name)} is not finite"):
        training.check_finite()


def test_a_checkpoint_that_is_not_finite_is_not_written(tmp_path):
    counters = checkpoint.Counters(policy_version=3)
    with pytest.raises(ValueError, match=r"^optimizer\.0\.exp_avg is not finite"):
        checkpoint.save(tmp_path, counters, b"", {"optimizer.0.exp_avg": torch.tensor([1, math.inf])}, "f", 0)
    assert checkpoint.list_checkpoints(tmp_path) == []


def test_a_normaliser_that_overflows_is_noticed():
    training = Training(build_config({}), spec_of(), CPU)
    assert isinstance(training.normalizer, ObservationNormalizer)
    training.normalizer.fold(torch.tensor([[1e38, 0, 0], [-3e38, 0, 0]]))
    with pytest.raises(FloatingPointError, match=r"tensor normalizer\.variance is not finite"):
        training.check_finite()


# Made-up batches


def spec_of(action: ActionSpec = CHOICE, limit: int = 100) -> EnvironmentSpec:
    return EnvironmentSpec("test", (ArraySpec("main", (WIDTH,), "float32"),), (action,), SLOTS, 0.1, limit)


def batch_of(reward: float | Sequence[float] = (0.0, 1.0), **changes: Any) -> Batch:
    """Noise, in which the rewards take turns and nothing ends."""
    rewards = np.resize(np.atleast_1d(np.float32(reward)), (STEPS, SLOTS))
    flags = torch.zeros(STEPS, SLOTS, dtype=torch.bool)
    batch = Batch(
        observation=torch.randn(STEPS + 1, SLOTS, WIDTH),
        action=torch.zeros(STEPS, SLOTS, 1),
        action_mask=None,
        behavior_log_prob=torch.zeros(STEPS, SLOTS),
        reward=torch.from_numpy(rewards.copy()),
        terminated=flags,
        truncated=flags,
        valid=~flags,
        final_index=torch.zeros(0, 2, dtype=torch.int64),
        final_observation=torch.zeros(0, WIDTH),
        fresh=torch.zeros(SLOTS, dtype=torch.bool),
    )
    return replace(batch, **changes)


def episodes_of(returns: float | Sequence[float], length: int | Sequence[int] = 20, each: int = 10) -> EpisodeRows:
    """So many episodes of each slot, whose returns and lengths take turns."""
    slot = np.repeat(np.arange(SLOTS, dtype=np.int32), each)
    count = len(slot)
    taken = np.resize(np.atleast_1d(np.float32(returns)), count)
    return EpisodeRows(slot, taken, np.resize(np.atleast_1d(np.int32(length)), count), {})


class Course:
    """What is found of batches that the test makes up."""

    def __init__(self, spec: EnvironmentSpec | None = None, version: int = 0, **sections: dict[str, Any]) -> None:
        config = build_config({"batch": {"worlds": 1}}, sections)
        self._diagnosis = Diagnosis(spec or spec_of(), config, version)

    def go(self, count: int, batch: Batch, episodes: EpisodeRows, lag: int = 0, **figures: float) -> list[str]:
        """So many batches of a kind; the kinds of what is found."""
        kinds = []
        for _ in range(count):
            found = self._diagnosis.look(batch, episodes, {**CALM, **figures}, lag=lag, steps=1)
            kinds += [finding.kind for finding in found]
        return kinds


ENDS = torch.zeros(STEPS, SLOTS, dtype=torch.bool)
ENDS[-1] = True


def test_a_finding_is_said_once():
    course = Course()
    assert course.go(100, batch_of(0.0), episodes_of(0.0)) == ["rewards_equal"]


def test_a_reward_that_is_found_after_some_hundred_episodes_is_waited_for():
    course = Course()
    assert course.go(36, batch_of(0.0), episodes_of(0.0, each=3)) == []  # 864 episodes
    assert course.go(100, batch_of([0.0] * 79 + [1.0]), episodes_of([0.0, 1.0])) == []
    assert course.go(100, batch_of(0.0), episodes_of(0.0)) == []


def test_few_long_episodes_without_a_reward_are_enough_after_many_steps(monkeypatch):
    monkeypatch.setattr(symptoms, "MANY_STEPS", 4000)
    course = Course()
    assert course.go(49, batch_of(0.0), episodes_of(0.0, each=1)) == []  # 3920 steps, 392 episodes
    assert course.go(1, batch_of(0.0), episodes_of(0.0, each=1)) == ["rewards_equal"]


def test_a_reward_in_a_row_without_an_agent_is_none():
    batch = batch_of(0.0)
    batch.reward[1, 0] = 5.0
    batch.valid[:2, 0] = False
    assert Course().go(40, batch, episodes_of(0.0)) == ["rewards_equal"]


def test_the_same_reward_every_step_is_learned_from_where_episodes_end():
    batch = batch_of(1.0, terminated=ENDS)
    course = Course()
    assert course.go(1, batch, episodes_of([7.0, 20.0], [7, 20])) == []
    assert course.go(60, batch_of(1.0), episodes_of(100.0, 100)) == []  # converged: all are cut by the limit
    cut = Course()  # by the world, at different times
    assert cut.go(60, batch_of(1.0, truncated=ENDS), episodes_of([7.0, 20.0], [7, 20])) == []
    goal = Course()  # -1 a step, and only some are ever there before the limit
    assert goal.go(20, batch_of(-1.0), episodes_of(-100.0, 100)) == []
    assert goal.go(60, batch_of(-1.0, terminated=ENDS), episodes_of([-100.0, -60.0], [100, 60])) == []
    assert Course().go(60, batch_of(-1.0), episodes_of(-100.0, 100)) == ["rewards_equal"]


def test_first_episodes_of_other_lengths_do_not_hide_that_all_rewards_are_the_same():
    course = Course()
    assert course.go(1, batch_of(-1.0, truncated=ENDS), episodes_of([-7.0, -20.0], [7, 20])) == []
    assert course.go(60, batch_of(-1.0), episodes_of(-100.0, 100)) == ["rewards_equal"]


def test_a_bandit_that_pays_the_same_for_everything_is_found_and_another_is_not():
    still = torch.zeros(STEPS + 1, SLOTS, WIDTH)
    one, every = spec_of(limit=1), ~torch.zeros(STEPS, SLOTS, dtype=torch.bool)
    same = batch_of(1.0, observation=still, terminated=every)
    assert Course(one).go(60, same, episodes_of(1.0, 1)) == ["rewards_equal"]
    paying = batch_of((0.0, 1.0), observation=still, terminated=every)
    assert Course(one).go(60, paying, episodes_of((0.0, 1.0), 1)) == []


@pytest.mark.parametrize("begin", [{"version": 30}, {"run": {"init": "policy.safetensors"}}])
def test_a_policy_that_was_trained_before_may_get_the_same_every_time(begin):
    batch = batch_of(1.0)
    assert Course(**begin).go(100, batch, episodes_of(100.0, 100), entropy=1e-6) == []
    assert Course(version=29).go(100, batch, episodes_of(100.0, 100), entropy=1e-6) != []


def test_an_episode_of_two_steps_is_enough():
    course = Course()
    assert course.go(50, batch_of(), episodes_of(1.0, [1] * 79 + [2])) == []
    assert course.go(50, batch_of(), episodes_of(1.0, 1)) == []
    assert Course().go(50, batch_of(), episodes_of(1.0, 1)) == ["one_step_episodes"]


def test_a_mask_is_an_observation():
    masked = ActionSpec("discrete", counts=(4,), masked=True)
    still = torch.zeros(STEPS + 1, SLOTS, WIDTH)
    mask = torch.ones(STEPS, SLOTS, 4, dtype=torch.bool)
    seen = batch_of(observation=still, action_mask=mask)
    assert Course(spec_of(masked)).go(20, seen, episodes_of(1.0)) == ["observations_constant"]
    mask = mask.clone()
    mask[3, 4, 2] = False
    assert Course(spec_of(masked)).go(20, replace(seen, action_mask=mask), episodes_of(1.0)) == []


def test_observations_that_change_from_batch_to_batch_or_in_one_number_are_not_constant():
    course = Course()
    assert course.go(5, batch_of(observation=torch.zeros(STEPS + 1, SLOTS, WIDTH)), episodes_of(1.0)) == []
    assert course.go(50, batch_of(observation=torch.ones(STEPS + 1, SLOTS, WIDTH)), episodes_of(1.0)) == []
    one = torch.zeros(STEPS + 1, SLOTS, WIDTH)
    one[4, 3, 1] = 1
    assert Course(policy=RAW).go(50, batch_of(observation=one), episodes_of(1.0)) == []


@pytest.mark.parametrize(("size", "kinds"), [(25.0, []), (35.0, ["observations_unscaled"]), (2e-3, [])])
def test_raw_observations_may_be_of_any_sane_size(size, kinds):
    observation = torch.zeros(STEPS + 1, SLOTS, WIDTH)
    observation[::2, :, 1] = observation[1::2, :, 1] = size
    observation[0, 0, 0] = 1e-4  # not constant
    assert Course(policy=RAW).go(40, batch_of(observation=observation), episodes_of(1.0)) == kinds
    assert Course().go(40, batch_of(observation=observation), episodes_of(1.0)) == []


def test_raw_observations_that_grow_later_are_found():
    course = Course(policy=RAW)
    assert course.go(40, batch_of(), episodes_of(1.0)) == []
    assert course.go(30, batch_of(observation=1e4 * torch.randn(STEPS + 1, SLOTS, WIDTH)), episodes_of(1.0)) != []


def collapse(course: Course, first: EpisodeRows, then: EpisodeRows, entropy: float, batch: Batch) -> list[str]:
    kinds = course.go(3, batch, first)
    return kinds + course.go(30, batch_of(), then, entropy=entropy)


@pytest.mark.parametrize(
    ("action", "box", "entropy", "kinds"),
    [
        (CHOICE, "clipped", 0.027, ["entropy_collapse"]),
        (CHOICE, "clipped", 0.029, []),
        (BOX, "clipped", 2 * (math.log(0.0099) + 1.41894), ["entropy_collapse"]),
        (BOX, "clipped", 2 * (math.log(0.0101) + 1.41894), []),
        (ActionSpec("box", shape=(1,), low=(-200.0,), high=(0.0,)), "squashed", math.log(0.99) + 1.418, True),
        (ActionSpec("box", shape=(1,), low=(-UNBOUNDED,), high=(UNBOUNDED,)), "clipped", math.log(0.011) + 1.419, []),
        (ActionSpec("discrete", counts=(1,)), "clipped", 0.0, []),
    ],
)
def test_a_policy_is_collapsed_below_a_share_of_what_it_could_choose_from(action, box, entropy, kinds):
    course = Course(spec_of(action), policy={"box": box})
    found = collapse(course, episodes_of([1.0, 3.0]), episodes_of(2.0), entropy, batch_of())
    assert found == (["entropy_collapse"] if kinds is True else kinds)


def test_choices_that_a_mask_leaves_are_all_that_can_be_chosen_from():
    masked = spec_of(ActionSpec("discrete", counts=(4,), masked=True))
    mask = torch.zeros(STEPS, SLOTS, 4, dtype=torch.bool)
    mask[..., 0] = True
    mask[0, :4, 1] = True  # 4 of 80 steps leave two
    batch, returns = batch_of(action_mask=mask), episodes_of([1.0, 3.0])
    free = math.log(2) * 4 / 80
    assert Course(masked).go(40, batch, returns, entropy=0.5 * free) == []
    assert Course(masked).go(40, batch, returns, entropy=0.01 * free) == ["entropy_collapse"]


def test_a_policy_may_become_deterministic_when_it_got_better():
    course = Course()
    assert collapse(course, episodes_of([1.0, 3.0]), episodes_of([9.0, 10.0]), 1e-5, batch_of()) == []
    assert course.go(100, batch_of(), episodes_of([1.0, 3.0]), entropy=0.5) == []  # it is not collapsed now


def test_a_policy_that_tries_something_now_and_then_is_not_collapsed():
    course, returns = Course(), episodes_of([1.0, 3.0])
    for _ in range(10):
        assert course.go(1, batch_of(), returns, entropy=0.5) == []
        assert course.go(9, batch_of(), returns, entropy=1e-5) == []
    assert course.go(1, batch_of(), returns, entropy=1e-5) == ["entropy_collapse"]


def test_a_better_return_is_one_beyond_what_chance_would_give():
    first = episodes_of([0.0, 10.0])
    assert collapse(Course(), first, episodes_of(5.0), 1e-5, batch_of()) == ["entropy_collapse"]
    assert collapse(Course(), first, episodes_of(5.3), 1e-5, batch_of()) == []


def test_first_episodes_that_were_begun_half_way_do_not_make_the_start_look_better():
    """-1 a step until the goal: cut after a part of their steps, they cost less than the best policy's."""
    cut = [int(length) for length in np.linspace(5, 100, SLOTS)]
    batch = batch_of(-1.0, truncated=ENDS)
    course = Course(actor={"stagger": True})
    assert course.go(1, batch, episodes_of([-float(length) for length in cut], cut, each=1)) == []
    assert course.go(11, batch_of((-1.0, -0.9)), episodes_of(-100.0, 100, each=2)) == []
    assert course.go(40, batch_of((-1.0, -0.9)), episodes_of(-97.0, 97), entropy=1e-5) == []
    whole = Course(actor={"stagger": False})
    assert whole.go(1, batch, episodes_of([-float(length) for length in cut], cut, each=1)) == []
    assert whole.go(11, batch_of((-1.0, -0.9)), episodes_of(-100.0, 100, each=2)) == []
    assert whole.go(40, batch_of((-1.0, -0.9)), episodes_of(-97.0, 97), entropy=1e-5) == ["entropy_collapse"]


def test_values_may_be_large_where_rewards_are_and_at_the_start():
    """Rewards of up to 1 come to 100; the critic knows nothing when it begins."""
    batch, ended = batch_of(), episodes_of([1.0, 2.0])
    assert Course().go(20, batch, ended, value_mean=900.0, value_target_std=900.0) == []
    early = Course()
    assert early.go(2, batch, ended, value_mean=5000.0) == []  # a random critic
    assert early.go(20, batch, ended, value_mean=40_000.0) == []
    assert early.go(2, batch, ended, value_mean=60_000.0) == ["value_explosion"]


@pytest.mark.parametrize("name", ["value_mean", "value_target_mean", "value_target_std"])
def test_values_beyond_what_rewards_allow_are_found_in_every_figure(name):
    course = Course()
    assert course.go(5, batch_of(), episodes_of([1.0, 2.0])) == []
    assert course.go(1, batch_of(), episodes_of([1.0, 2.0]), **{name: 1100.0}) == []  # once is a spike
    assert course.go(5, batch_of(), episodes_of([1.0, 2.0])) == []
    assert course.go(2, batch_of(), episodes_of([1.0, 2.0]), **{name: 1100.0}) == ["value_explosion"]


def test_an_explosion_is_measured_in_the_units_of_what_is_learned_from():
    batch, ended = batch_of(), episodes_of([1.0, 2.0])
    assert Course().go(3, batch, ended, value_loss=0.5 * 1100.0**2) == ["value_explosion"]
    assert Course(ppo={"normalize_value": True}).go(3, batch, ended, value_loss=0.5 * 1100.0**2) == []
    scaled = Course(ppo={"normalize_reward": True})  # rewards are 10 at most then, and come to 1000
    assert scaled.go(1, batch, ended) == []
    assert scaled.go(3, batch, ended, value_mean=9000.0) == []
    assert scaled.go(3, batch, ended, value_mean=11_000.0) == ["value_explosion"]
    endless = Course()  # 100 steps at most
    assert endless.go(1, batch, ended) == []
    assert endless.go(3, batch, ended, value_mean=900.0, gamma=1.0) == []
    assert endless.go(3, batch, ended, value_mean=1100.0, gamma=1.0) == ["value_explosion"]


def test_a_ratio_that_is_not_1_is_found_at_lag_0_only():
    batch, ended = batch_of(), episodes_of([1.0, 2.0])
    assert Course().go(50, batch, ended, first_ratio_error=9e-4) == []
    assert Course().go(50, batch, ended, lag=1, first_ratio_error=3.0) == []
    course = Course()
    for _ in range(10):  # rounding has bad days, where a deviation has become tiny
        assert course.go(2, batch, ended, first_ratio_error=2e-3) == []
        assert course.go(1, batch, ended) == []
    assert course.go(3, batch, ended, first_ratio_error=2e-3) == ["ratio_not_one"]
    assert Course().go(1, batch, ended, first_ratio_error=0.2) == ["ratio_not_one"]


def test_the_page_lists_every_kind():
    page = (Path(__file__).parent.parent / "docs" / "diagnosis.md").read_text()
    kinds = {name.kind for name in vars(symptoms).values() if isinstance(getattr(name, "kind", None), str)}
    assert len(kinds) == 7
    assert set(re.findall(r"^\| `(\w+)` \| (?!said)", page, re.MULTILINE)) - {"kind"} == kinds
