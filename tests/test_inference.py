"""The numpy policy against a float64 twin, the distributions it samples, and the network that trains it."""

from __future__ import annotations

import math
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import stats

from rustyrl.spec import ActionSpec, ArraySpec
from rustyrl.weights import PolicySpec, Weights, encode_weights, weights_layout
from rustyrl_actors.inference import Policy
from rustyrl_learner.network import ActorCritic, export_weights
from rustyrl_learner.normalizer import ObservationNormalizer

ACTIVATIONS = ("tanh", "relu", "elu", "silu")
SLOTS = 64
# Not in alphabetical order, and one of two dimensions: the order of the spec decides, not the dictionary's.
OBSERVATION = (ArraySpec("view", (2, 3), "float32"), ArraySpec("body", (4,), "float32"))
BOX = ActionSpec("box", shape=(3,), low=(-1.0, -0.5, 0.0), high=(1.0, 2.0, 0.25))
DISCRETE = ActionSpec("discrete", counts=(5,))
ACTIONS = pytest.mark.parametrize("action", [BOX, DISCRETE], ids=["box", "discrete"])
NORMALIZE = pytest.mark.parametrize("normalize", [True, False], ids=["normalized", "raw"])

Arrays = dict[str, NDArray[np.float32]]

pytestmark = pytest.mark.usefixtures("either_way")


def make_spec(action: ActionSpec, activation: str = "tanh", *, normalize: bool = True, clip: float = 3.0) -> PolicySpec:
    return PolicySpec(OBSERVATION, (action,), (16, 8), activation, normalize, clip)  # type: ignore[arg-type]


def make_weights(spec: PolicySpec, seed: int = 0) -> Weights:
    rng = np.random.default_rng(seed)
    arrays = {name: rng.normal(0, 0.5, shape).astype(np.float32) for name, shape in weights_layout(spec).items()}
    if spec.normalize:
        arrays["normalizer.mean"] *= 4
        arrays["normalizer.variance"] = np.exp(2 * arrays["normalizer.variance"])
        arrays["normalizer.count"] = np.array([100], np.float32)
    return Weights(spec, arrays)


def make_observation(slots: int = SLOTS, seed: int = 1) -> Arrays:
    rng = np.random.default_rng(seed)
    # Body before view, unlike the spec; wide enough that the clip bites and activations saturate.
    return {a.name: rng.normal(0, 4, (slots, *a.shape)).astype(np.float32) for a in reversed(OBSERVATION)}


def literal_forward(weights: Weights, observation: Arrays) -> NDArray[np.float64]:
    """The policy network in float64, one slot and one layer at a time."""
    spec, arrays = weights.spec, {name: array.astype(np.float64) for name, array in weights.arrays.items()}
    activation = {
        "tanh": math.tanh,
        "relu": lambda v: max(v, 0.0),
        "elu": lambda v: v if v > 0 else math.exp(v) - 1,
        "silu": lambda v: v / (1 + math.exp(-v)),
    }[spec.activation]
    outputs = []
    for slot in range(len(observation["view"])):
        x = np.concatenate([observation[array.name][slot].ravel() for array in spec.observation]).astype(np.float64)
        if spec.normalize:
            x = (x - arrays["normalizer.mean"]) / np.sqrt(arrays["normalizer.variance"])
            x = np.array([min(max(v, -spec.observation_clip), spec.observation_clip) for v in x])
        for layer in range(len(spec.hidden) + 1):
            x = x @ arrays[f"policy.{layer}.weight"] + arrays[f"policy.{layer}.bias"]
            if layer < len(spec.hidden):
                x = np.array([activation(v) for v in x])
        outputs.append(x)
    return np.array(outputs)


@ACTIONS
@NORMALIZE
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_forward_equals_a_literal_float64_twin(action: ActionSpec, activation: str, normalize: bool) -> None:
    weights = make_weights(make_spec(action, activation, normalize=normalize))
    observation = make_observation()
    got = Policy(weights, SLOTS).forward(observation)
    np.testing.assert_allclose(got, literal_forward(weights, observation), rtol=1e-5, atol=1e-5)


@ACTIONS
@NORMALIZE
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "separate"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_numpy_and_torch_agree(action: ActionSpec, activation: str, normalize: bool, shared: bool) -> None:
    spec = make_spec(action, activation, normalize=normalize)
    torch.manual_seed(0)
    network = ActorCritic(spec, shared=shared, initial_log_std=-0.3)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)  # biases start as zeros, the last layer near them
    normalizer = ObservationNormalizer(10, spec.observation_clip, torch.device("cpu")) if normalize else None
    observation = make_observation()
    flat = torch.from_numpy(np.concatenate([observation[a.name].reshape(SLOTS, -1) for a in spec.observation], axis=1))
    if normalizer is not None:
        normalizer.fold(3 * flat + 1)
        flat = normalizer.apply(flat)
    policy = Policy(export_weights(network, normalizer), SLOTS)
    taken, log_prob = empty_action(action), np.empty(SLOTS, np.float32)
    policy.act(observation, make_noise(action), taken, log_prob)
    joined = torch.from_numpy(taken["main"].reshape(SLOTS, -1).astype(np.float32))
    with torch.no_grad():
        outputs, _ = network(flat)
        np.testing.assert_allclose(policy.forward(observation), outputs, atol=1e-5)
        np.testing.assert_allclose(log_prob, network.log_prob(outputs, joined), atol=1e-4)


def empty_action(action: ActionSpec, slots: int = SLOTS) -> dict[str, NDArray[np.generic]]:
    return {"main": np.full((slots, *action.shape), 77, action.array.dtype)}


def make_noise(action: ActionSpec, slots: int = SLOTS) -> NDArray[np.float32]:
    rng = np.random.default_rng(2)
    if action.kind == "box":
        return rng.standard_normal((slots, 3), np.float32)
    return rng.random((slots, 1), np.float32)


def test_gaussian_sample_and_log_prob_are_those_of_scipy() -> None:
    weights = make_weights(make_spec(BOX))
    observation, noise = make_observation(), make_noise(BOX)
    action, log_prob = empty_action(BOX), np.empty(SLOTS, np.float32)
    Policy(weights, SLOTS).act(observation, noise, action, log_prob)
    mean, std = literal_forward(weights, observation), np.exp(weights.arrays["log_std"].astype(np.float64))
    np.testing.assert_allclose(action["main"], mean + std * noise, rtol=1e-5, atol=1e-5)
    expected = stats.norm.logpdf(action["main"], mean, std).sum(axis=1)
    np.testing.assert_allclose(log_prob, expected, rtol=1e-4, atol=1e-4)


def test_categorical_frequencies_and_log_probs_are_those_of_the_softmax() -> None:
    slots = 20_000
    weights = make_weights(make_spec(DISCRETE))
    one = make_observation(1, seed=5)
    observation = {name: np.repeat(array, slots, axis=0) for name, array in one.items()}
    action, log_prob = empty_action(DISCRETE, slots), np.empty(slots, np.float32)
    Policy(weights, slots).act(observation, make_noise(DISCRETE, slots), action, log_prob)
    logits = literal_forward(weights, one)[0]
    probability = np.exp(logits) / np.exp(logits).sum()
    assert probability.min() > 0.005
    counts = np.bincount(action["main"], minlength=5)
    assert stats.chisquare(counts, probability * slots).pvalue > 0.001
    np.testing.assert_allclose(log_prob, np.log(probability)[action["main"]], atol=1e-5)


def test_each_choice_takes_the_share_of_the_noise_that_is_its_probability() -> None:
    """The inverse of the cumulative distribution, literally."""
    weights = make_weights(make_spec(DISCRETE))
    observation, noise = make_observation(), make_noise(DISCRETE)
    action = empty_action(DISCRETE)
    Policy(weights, SLOTS).act(observation, noise, action, np.empty(SLOTS, np.float32))
    for slot, logits in enumerate(literal_forward(weights, observation)):
        below = np.concatenate([[0.0], np.cumsum(np.exp(logits) / np.exp(logits).sum())])
        choice = action["main"][slot]
        assert below[choice] - 1e-5 <= noise[slot, 0] <= below[choice + 1] + 1e-5


@pytest.mark.parametrize("logit", [0.0, 3e4, -3e4], ids=["even", "first", "not-first"])
@pytest.mark.parametrize("noise", [0.0, float(np.nextafter(np.float32(1), np.float32(0)))], ids=["zero", "almost-one"])
def test_extreme_noise_and_logits_still_give_a_choice_with_a_finite_log_prob(logit: float, noise: float) -> None:
    spec = make_spec(DISCRETE, normalize=False)
    arrays = {name: np.zeros(shape, np.float32) for name, shape in weights_layout(spec).items()}
    arrays["policy.2.bias"][0] = logit
    action, log_prob = empty_action(DISCRETE, 1), np.empty(1, np.float32)
    policy = Policy(Weights(spec, arrays), 1)
    policy.act(make_observation(1), np.full((1, 1), noise, np.float32), action, log_prob)
    assert action["main"][0] in (range(5) if logit == 0 else [0] if logit > 0 else range(1, 5))
    assert log_prob[0] == pytest.approx(math.log(1 / 5) if logit == 0 else 0 if logit > 0 else math.log(1 / 4))


def test_noise_and_log_probs_may_be_of_any_kind_of_array() -> None:
    weights, observation, noise = make_weights(make_spec(BOX)), make_observation(), make_noise(BOX)
    policy, action, expected = Policy(weights, SLOTS), empty_action(BOX), np.empty(SLOTS, np.float32)
    policy.act(observation, noise, action, expected)
    for log_prob in (np.empty(SLOTS), np.empty((SLOTS, 3), np.float32)[:, 1]):
        policy.act(observation, noise.astype(np.float64), action, log_prob)
        np.testing.assert_allclose(log_prob, expected, rtol=1e-6)


def test_greedy_box_action_is_the_mean() -> None:
    weights, observation, action = make_weights(make_spec(BOX)), make_observation(), empty_action(BOX)
    Policy(weights, SLOTS).act(observation, None, action)
    np.testing.assert_allclose(action["main"], literal_forward(weights, observation), rtol=1e-5, atol=1e-5)


def test_greedy_discrete_action_is_the_likeliest() -> None:
    weights, observation, action = make_weights(make_spec(DISCRETE)), make_observation(), empty_action(DISCRETE)
    Policy(weights, SLOTS).act(observation, None, action)
    np.testing.assert_array_equal(action["main"], literal_forward(weights, observation).argmax(axis=1))
    assert len(set(action["main"].tolist())) > 1


def test_acting_writes_into_a_row_of_a_rollout() -> None:
    weights, observation = make_weights(make_spec(BOX)), make_observation()
    alone, block = empty_action(BOX), np.full((3, SLOTS, 3), 77, np.float32)
    policy = Policy(weights, SLOTS)
    policy.act(observation, None, alone)
    policy.act(observation, None, {"main": block[1]})
    np.testing.assert_array_equal(block[1], alone["main"])
    assert (block[[0, 2]] == 77).all()


@pytest.mark.parametrize("kind", ["box", "discrete"])
def test_observations_are_not_changed(kind: str) -> None:
    action = BOX if kind == "box" else DISCRETE
    observation = make_observation()
    before = {name: array.copy() for name, array in observation.items()}
    for normalize in (True, False):
        policy = Policy(make_weights(make_spec(action, normalize=normalize)), SLOTS)
        policy.act(observation, make_noise(action), empty_action(action), np.empty(SLOTS, np.float32))
    for name, array in observation.items():
        np.testing.assert_array_equal(array, before[name])


def test_bound_clips_a_box_action_to_its_bounds_and_keeps_the_raw_one() -> None:
    policy = Policy(make_weights(make_spec(BOX)), 2)
    raw = np.array([[-5.0, -5.0, -5.0], [0.5, 5.0, 0.2]], np.float32)
    out = np.full_like(raw, 77)
    policy.bound({"main": raw}, {"main": out})
    expected = np.array([[-1.0, -0.5, 0.0], [0.5, 2.0, 0.2]], np.float32)
    np.testing.assert_array_equal(out, expected)
    assert raw.min() == -5.0
    policy.bound({"main": raw}, {"main": raw})
    np.testing.assert_array_equal(raw, expected)


def test_bound_leaves_a_choice_as_it_is() -> None:
    policy, action, out = Policy(make_weights(make_spec(DISCRETE)), 2), np.array([0, 4]), np.full(2, 77)
    policy.bound({"main": action}, {"main": out})
    assert out.tolist() == [0, 4]
    policy.bound({"main": action}, {"main": action})
    assert action.tolist() == [0, 4]


@ACTIONS
def test_load_is_the_same_as_starting_from_the_new_version(action: ActionSpec) -> None:
    spec, observation, noise = make_spec(action), make_observation(), make_noise(action)
    policy = Policy(make_weights(spec, seed=0), SLOTS)
    policy.load(make_weights(spec, seed=1))
    results = []
    for each in (policy, Policy(make_weights(spec, seed=1), SLOTS)):
        taken, log_prob = empty_action(action), np.empty(SLOTS, np.float32)
        each.act(observation, noise, taken, log_prob)
        results.append((taken, log_prob))
    np.testing.assert_array_equal(results[0][0]["main"], results[1][0]["main"])
    np.testing.assert_array_equal(results[0][1], results[1][1])


def test_a_policy_holds_copies_of_the_weights() -> None:
    weights, observation = make_weights(make_spec(BOX)), make_observation()
    policy = Policy(weights, SLOTS)
    before = policy.forward(observation).copy()
    for array in weights.arrays.values():
        array.fill(9.0)
    np.testing.assert_array_equal(policy.forward(observation), before)


def test_weights_of_another_policy_are_refused() -> None:
    with pytest.raises(ValueError, match="weights of another policy"):
        Policy(make_weights(make_spec(BOX)), 1).load(make_weights(make_spec(BOX, "relu")))


def test_a_policy_file_acts_as_the_weights_written_to_it(tmp_path: Path) -> None:
    weights, observation = make_weights(make_spec(BOX)), make_observation(1)
    path = tmp_path / "policy.safetensors"
    path.write_bytes(encode_weights(weights))
    expected = Policy(weights, 1).forward(observation)
    np.testing.assert_array_equal(Policy.from_file(path).forward(observation), expected)


def test_acting_in_the_steady_state_allocates_nothing_that_grows_with_the_slots() -> None:
    slots = 2 * np.getbufsize()  # numpy's own iterators buffer half of what one number for every slot would take
    policy = Policy(make_weights(make_spec(BOX)), slots)
    observation, noise = make_observation(slots), make_noise(BOX, slots)
    action, log_prob = empty_action(BOX, slots), np.empty(slots, np.float32)
    tracemalloc.start()
    try:
        policy.act(observation, noise, action, log_prob)
        tracemalloc.reset_peak()
        before, _ = tracemalloc.get_traced_memory()
        for _ in range(100):
            policy.act(observation, noise, action, log_prob)
        after, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert after - before < 4096
    assert peak - before < 0.75 * log_prob.nbytes
