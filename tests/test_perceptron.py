"""Perceptrons in compiled code: against plain float64 numpy, on sizes that fit its tiles and on sizes that do not."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rustyrl import perceptron

needs_compiled = pytest.mark.skipif(not perceptron.COMPILED, reason=perceptron.PROBLEM or "compiled")
ACTIVATIONS = {
    "identity": lambda z: z,
    "relu": lambda z: np.maximum(z, 0),
    "tanh": np.tanh,
    "elu": lambda z: np.where(z > 0, z, np.expm1(np.minimum(z, 0))),
    "silu": lambda z: z / (1 + np.exp(-z)),
}


class Case:
    """Random layers and rows, in memory of which a frame around each array is watched."""

    def __init__(self, rows: int, sizes: list[int], activations: list[str], seed: int = 0, threads: int = 1) -> None:
        self.generator = np.random.default_rng(seed)
        self.frames: list[tuple[np.ndarray, np.ndarray]] = []
        self.activations, self.threads = activations, threads
        self.codes = perceptron.encode_activations(activations)
        pairs = list(itertools.pairwise(sizes))
        self.x = self.framed(rows, sizes[0], fill=True)
        self.weights = tuple(self.framed(*pair, fill=True, scale=pair[0] ** -0.5) for pair in pairs)
        self.biases = tuple(self.framed(1, out, fill=True)[0] for _, out in pairs)
        self.out = self.framed(rows, sizes[-1])

    def framed(self, rows: int, columns: int, *, fill: bool = False, scale: float = 1.0) -> np.ndarray:
        whole = np.full(rows * columns + 64, np.float32(np.nan))
        inside = whole[32:-32].reshape(rows, columns)
        if fill:
            inside[...] = scale * self.generator.standard_normal((rows, columns))
        self.frames.append((whole, inside))
        return inside

    def forward(self) -> None:
        perceptron.forward(self.x, self.weights, self.biases, self.codes, self.out, self.threads)

    def check_frames(self) -> None:
        for whole, _ in self.frames:
            assert np.isnan(whole[:32]).all()
            assert np.isnan(whole[-32:]).all()

    def literal(self) -> np.ndarray:
        """What comes out, in float64."""
        x = self.x.astype(np.float64)
        for weight, bias, activation in zip(self.weights, self.biases, self.activations, strict=True):
            x = ACTIVATIONS[activation](x @ weight.astype(np.float64) + bias)
        return x


def check(case: Case) -> None:
    case.forward()
    expected = case.literal()
    np.testing.assert_allclose(case.out, expected, rtol=2e-5, atol=2e-5 * np.abs(expected).max(initial=1.0))
    case.check_frames()


@needs_compiled
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    ("rows", "sizes"),
    [
        *[(rows, [4, 64, 64, 2]) for rows in (1, 5, 6, 7, 47, 48, 49, 100)],
        *[(17, [width, width, width]) for width in (1, 2, 7, 8, 9, 15, 16, 17, 24, 31, 33)],
        (300, [3, 130, 70, 20]),
        (50, [5, 1, 5]),
        (0, [4, 8, 2]),
        (9, [6, 3]),
    ],
)
def test_a_pass_is_that_of_plain_numpy(rows: int, sizes: list[int], activation: str) -> None:
    check(Case(rows, sizes, [activation] * (len(sizes) - 2) + ["identity"]))


@needs_compiled
@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 130),
    sizes=st.lists(st.integers(1, 40), min_size=2, max_size=5),
    names=st.lists(st.sampled_from(list(ACTIVATIONS)), min_size=4, max_size=4),
    seed=st.integers(0, 1000),
    threads=st.integers(1, 3),
)
def test_any_shape_and_order_of_activations(
    rows: int, sizes: list[int], names: list[str], seed: int, threads: int
) -> None:
    check(Case(rows, sizes, names[: len(sizes) - 1], seed, threads))


@needs_compiled
def test_columns_and_rows_of_what_goes_in_may_lie_anywhere() -> None:
    case, plain = (Case(75, [11, 64, 3], ["tanh", "identity"]) for _ in range(2))
    plain.forward()
    for x in (np.asfortranarray(case.x), np.repeat(case.x, 2, axis=1)[::-1, ::2][::-1]):
        case.x = x
        case.forward()
        assert np.array_equal(case.out, plain.out)


@needs_compiled
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_row_comes_to_the_same_bits_whatever_rows_are_beside_it(activation: str) -> None:
    case = Case(100, [9, 40, 21, 6], [activation, activation, "identity"])
    case.forward()
    whole, rows = case.out.copy(), case.x.copy()
    for first, last in [(0, 1), (3, 10), (47, 49), (60, 100)]:
        case.x, case.out = rows[first:last], np.empty((last - first, 6), np.float32)
        case.forward()
        assert np.array_equal(case.out, whole[first:last])


@needs_compiled
@pytest.mark.parametrize("rows", [1, 95, 97, 400, 1535, 4096, 5000])
def test_any_number_of_threads_comes_to_the_same_bits(rows: int) -> None:
    found = []
    for threads in (1, 2, 3, 8, 64):
        case = Case(rows, [20, 64, 64, 4], ["tanh", "relu", "identity"], threads=threads)
        check(case)
        found.append(case.out)
    for other in found[1:]:
        assert np.array_equal(found[0], other)


@needs_compiled
def test_callers_do_not_disturb_each_other() -> None:
    cases = [
        Case(2000 + 500 * seed, [20, 64, 64, 4], ["tanh", "tanh", "identity"], seed, threads=1 + seed)
        for seed in range(4)
    ]
    expected = []
    for case in cases:
        case.forward()
        expected.append(case.out.copy())
    wrong: list[int] = []

    def again(index: int) -> None:
        case = cases[index]
        for _ in range(100):
            case.forward()
            if not np.array_equal(case.out, expected[index]):
                wrong.append(index)

    threads = [threading.Thread(target=again, args=(index,)) for index in range(len(cases))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@needs_compiled
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_process_has_threads_of_its_own() -> None:
    code = """
import os, numpy as np
from test_perceptron import Case
case = Case(3000, [20, 64, 64, 4], ["tanh", "tanh", "identity"], threads=3)
case.forward()
before = case.out.copy()
child = os.fork()
case.out[...] = 0
case.forward()
same = np.array_equal(case.out, before)
if not child:
    os._exit(0 if same else 1)
assert same and os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=60)


@needs_compiled
def test_those_who_are_first_at_the_same_time_do_not_disturb_each_other() -> None:
    code = """
import threading, numpy as np
from test_perceptron import Case
cases = [Case(3000, [20, 64, 64, 4], ["tanh", "tanh", "identity"], seed, threads=3) for seed in range(6)]
gate = threading.Barrier(6)
def call(case):
    gate.wait()
    case.forward()
threads = [threading.Thread(target=call, args=(case,)) for case in cases]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
for case in cases:
    np.testing.assert_allclose(case.out, case.literal(), rtol=1e-4, atol=1e-4)
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    for _ in range(3):
        subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=60)


@needs_compiled
def test_tanh_is_within_a_rounding_or_two_and_never_beyond_one() -> None:
    x = np.concatenate([np.linspace(-20, 20, 200_001), np.geomspace(1e-30, 1e4, 2000), [np.inf, -np.inf, 0, -0.0]])
    x = x.astype(np.float32)[:, None]
    y = np.empty_like(x)
    one, zero = (np.full(shape, value, np.float32) for shape, value in [((1, 1), 1), ((1,), 0)])
    perceptron.forward(x, (one,), (zero,), perceptron.encode_activations(["tanh"]), y, 1)
    assert np.abs(y - np.tanh(x.astype(np.float64))).max() < 4e-7
    assert np.abs(y).max() <= 1
    small = np.abs(x) < 1e-3
    np.testing.assert_allclose(y[small], np.tanh(x[small]), rtol=1e-6, atol=0)


@needs_compiled
@pytest.mark.parametrize("activation", ["elu", "silu"])
def test_elu_and_silu_keep_the_digits_of_small_numbers(activation: str) -> None:
    x = np.concatenate([np.linspace(-90, 90, 100_001), np.geomspace(1e-30, 1e4, 2000), -np.geomspace(1e-30, 90, 2000)])
    if activation == "elu":
        x = np.concatenate([x, -np.geomspace(90, 1e30, 200), [-np.inf, np.inf]])
    x = x.astype(np.float32)[:, None]
    y = np.empty_like(x)
    one, zero = (np.full(shape, value, np.float32) for shape, value in [((1, 1), 1), ((1,), 0)])
    perceptron.forward(x, (one,), (zero,), perceptron.encode_activations([activation]), y, 1)
    np.testing.assert_allclose(y, ACTIVATIONS[activation](x.astype(np.float64)), rtol=1e-6, atol=1e-36)


@needs_compiled
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_what_is_not_a_number_stays_so_in_its_row(activation: str) -> None:
    case = Case(20, [4, 24, 3], [activation, "identity"])
    case.x[7, 2] = np.nan
    case.forward()
    assert np.isnan(case.out).any(1).tolist() == [row == 7 for row in range(20)]


@needs_compiled
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": np.zeros((3, 4))}, TypeError, "x must hold float32, got format 'd'"),
        ({"x": np.zeros((3, 4), ">f4")}, TypeError, "float32"),
        ({"x": np.zeros(4, np.float32)}, ValueError, "x must have 2 axes, got 1"),
        ({"x": np.zeros((3, 5), np.float32)}, ValueError, r"weight must be \[5, 8\], got \[4, 8\]"),
        ({"weights": [np.zeros((4, 8), np.float32)] * 2}, ValueError, "tuple"),
        ({"weights": ()}, ValueError, "1 to 64 layers"),
        ({"weights": (np.zeros((8, 4), np.float32).T, np.zeros((8, 2), np.float32))}, ValueError, "contiguous"),
        ({"biases": (np.zeros(8, np.float32),)}, ValueError, "biases must be a tuple with an item for each layer"),
        ({"biases": (np.zeros(8, np.float32), np.zeros(3, np.float32))}, ValueError, r"bias must be \[1, 2\]"),
        ({"codes": b"\x02"}, ValueError, "1 activations for 2 layers"),
        ({"codes": b"\x02\x09"}, ValueError, "no activation 9"),
        ({"out": np.empty((2, 3), np.float32).T}, (ValueError, BufferError), "contiguous"),
        ({"out": np.zeros((4, 2), np.float32)}, ValueError, r"out must be \[3, 2\], got \[4, 2\]"),
        ({"out": np.frombuffer(bytes(24), np.float32).reshape(3, 2)}, (ValueError, BufferError), "read-only|writable"),
        ({"out": "text"}, TypeError, "bytes-like|buffer"),
        ({"threads": 0}, ValueError, "threads must be 1 to 64, got 0"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_was_expected(change: dict[str, Any], error: Any, message: str) -> None:
    case = Case(3, [4, 8, 2], ["tanh", "identity"])
    given = {"x": case.x, "weights": case.weights, "biases": case.biases, "codes": case.codes, "out": case.out}
    with pytest.raises(error, match=message):
        perceptron.forward(*({**given, "threads": 1} | change).values())


@needs_compiled
def test_nothing_is_left_behind() -> None:
    case = Case(48, [4, 64, 64, 2], ["tanh", "tanh", "identity"])
    counts = [sys.getrefcount(array) for array in (case.x, *case.weights, case.out)]
    for _ in range(1000):
        case.forward()
        with pytest.raises(ValueError, match=r"weight must be \[3"):
            perceptron.forward(case.x[:, :3], case.weights, case.biases, case.codes, case.out, 1)
    assert [sys.getrefcount(array) for array in (case.x, *case.weights, case.out)] == counts


class PolicyCase(Case):
    """Random layers whose outputs are two choices among three, one of them masked, and a box of two numbers."""

    BLOCKS = ((perceptron.CHOICE, 1, 3, 0, 0, -1), (perceptron.CHOICE, 1, 3, 1, 3, 0), (perceptron.BOX, 2, 1, 2, 6, 0))

    def __init__(self, rows: int, threads: int = 1, seed: int = 0) -> None:
        super().__init__(rows, [5, 16, 8], ["tanh", "identity"], seed, threads)
        self.mean, self.scale = self.framed(1, 5, fill=True)[0], np.abs(self.framed(1, 5, fill=True)[0])
        self.log_std = self.framed(1, 2, fill=True)[0]
        self.blocks = np.array(self.BLOCKS, np.int32)
        self.masks = self.generator.random((rows, 3)) < 0.5
        self.masks[np.arange(rows), self.generator.integers(3, size=rows)] = True
        self.noise = self.framed(rows, 4, fill=True)
        self.noise[:, :2] = self.generator.random((rows, 2))
        self.action, self.log_prob = self.framed(rows, 4), self.framed(1, rows)[0]

    def arguments(self) -> dict[str, Any]:
        network = {"weights": self.weights, "biases": self.biases, "codes": self.codes}
        boxes = {"blocks": self.blocks, "log_std": self.log_std, "log_half": 0.25}
        rows = {"masks": self.masks, "noise": self.noise, "action": self.action, "log_prob": self.log_prob}
        normalizer = (self.mean, self.scale, 2.0)
        return {"x": self.x, "normalizer": normalizer} | network | boxes | rows | {"threads": self.threads}

    def draw(self, **changes: Any) -> tuple[np.ndarray, np.ndarray]:
        perceptron.policy(*(self.arguments() | changes).values())
        return self.action.copy(), self.log_prob.copy()

    def outputs(self) -> np.ndarray:
        """What the layers say of normalised rows, in float64."""
        x, self.x = self.x, np.clip((self.x - self.mean) * self.scale, -2, 2)
        found, self.x = self.literal(), x
        return found


@needs_compiled
@pytest.mark.parametrize("rows", [0, 1, 7, 8, 47, 48, 49, 130])
def test_actions_are_drawn_where_the_noise_falls_with_their_log_probability(rows: int) -> None:
    case = PolicyCase(rows)
    action, log_prob = case.draw()
    case.check_frames()
    outputs, std = case.outputs(), np.exp(case.log_std.astype(np.float64))
    expected = np.full(rows, -0.25)
    for column, allowed in ((0, np.ones((rows, 3), bool)), (1, case.masks)):
        odds = np.exp(outputs[:, 3 * column : 3 * column + 3]) * allowed
        odds /= odds.sum(1, keepdims=True)
        choice = action[:, column].astype(int)
        reached = np.cumsum(odds, axis=1)[np.arange(rows), choice]
        chance = odds[np.arange(rows), choice]
        assert (case.noise[:, column] <= reached + 1e-5).all()
        assert (case.noise[:, column] >= reached - chance - 1e-5).all()
        expected += np.log(chance)
    np.testing.assert_allclose(action[:, 2:], outputs[:, 6:] + std * case.noise[:, 2:], rtol=1e-5, atol=1e-5)
    expected += (-0.5 * case.noise[:, 2:].astype(np.float64) ** 2 - np.log(std) - 0.5 * np.log(2 * np.pi)).sum(1)
    np.testing.assert_allclose(log_prob, expected, rtol=1e-5, atol=1e-5)


@needs_compiled
def test_the_log_probability_of_given_actions_is_that_of_those_that_were_drawn() -> None:
    case = PolicyCase(100)
    action, log_prob = case.draw()
    again, found = case.draw(noise=None)
    assert np.array_equal(action, again)
    assert np.array_equal(log_prob, found)
    case.action[3, 0] = 5  # no choice that there is
    assert np.isnan(case.draw(noise=None)[1]).tolist() == [row == 3 for row in range(100)]


@needs_compiled
@pytest.mark.parametrize("rows", [97, 5000])
def test_actions_are_the_same_bits_with_any_number_of_threads_and_wherever_rows_lie(rows: int) -> None:
    action, log_prob = PolicyCase(rows).draw()
    for threads in (2, 3, 8):
        other = PolicyCase(rows, threads)
        assert all(map(np.array_equal, other.draw(), (action, log_prob)))
    case = PolicyCase(rows)
    scattered = {name: np.asfortranarray(array) for name, array in {"x": case.x, "noise": case.noise}.items()}
    assert all(map(np.array_equal, case.draw(**scattered), (action, log_prob)))
    case.draw(noise=None, action=np.repeat(action, 2, axis=1)[:, ::2])
    assert np.array_equal(case.log_prob, log_prob)


@needs_compiled
def test_a_policy_that_is_no_number_in_a_row_says_so_of_that_row() -> None:
    case = PolicyCase(20)
    case.x[7, 2] = np.nan
    action, log_prob = case.draw()
    assert np.isnan(log_prob).tolist() == [row == 7 for row in range(20)]
    assert action[7, 0] in (0, 1, 2)


@needs_compiled
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"normalizer": (np.zeros(4, np.float32), np.zeros(5, np.float32), 1.0)}, ValueError, r"mean must be \[1, 5\]"),
        ({"blocks": np.array(PolicyCase.BLOCKS, np.int64)}, TypeError, "blocks must hold int32"),
        ({"blocks": np.array(PolicyCase.BLOCKS[:2], np.int32)}, ValueError, "blocks do not cover"),
        ({"blocks": np.array([(0, 8, 1, 0, 0, 0)], np.int32)}, ValueError, "blocks do not fit the action"),
        ({"log_std": np.zeros(1, np.float32)}, ValueError, "the masks or the deviations"),
        ({"masks": None}, ValueError, "the masks or the deviations"),
        ({"masks": np.ones((3, 3), np.int8)}, TypeError, "masks must hold bool"),
        ({"noise": np.zeros((3, 3), np.float32)}, ValueError, r"noise must be \[3, 4\], got \[3, 3\]"),
        ({"noise": np.zeros((3, 4))}, TypeError, "noise must hold float32"),
        ({"action": np.zeros((2, 4), np.float32)}, ValueError, r"action must be \[3, 4\]"),
        (
            {"action": np.frombuffer(bytes(48), np.float32).reshape(3, 4)},
            (ValueError, BufferError),
            "read-only|writable",
        ),
        ({"log_prob": np.zeros(2, np.float32)}, ValueError, r"log_prob must be \[1, 3\]"),
        ({"threads": 65}, ValueError, "threads must be 1 to 64, got 65"),
    ],
)
def test_a_policy_that_does_not_fit_is_refused(change: dict[str, Any], error: Any, message: str) -> None:
    case = PolicyCase(3)
    with pytest.raises(error, match=message):
        case.draw(**change)
    case.check_frames()


def test_it_is_compiled_where_there_is_a_compiler() -> None:
    if os.environ.get(perceptron.OFF_VARIABLE) == "0" or shutil.which("cc") is None:
        pytest.skip("no compiler here, or switched off")
    assert perceptron.COMPILED, perceptron.PROBLEM


def test_it_can_be_switched_off_and_then_says_so() -> None:
    code = "from rustyrl import perceptron as p; print(p.COMPILED, p.encode_activations(['tanh']), p.PROBLEM)"
    environment = {**os.environ, perceptron.OFF_VARIABLE: "0"}
    said = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert said.stdout.split(maxsplit=2)[:2] == ["False", "None"]
    assert perceptron.OFF_VARIABLE in said.stdout or "not compiled" in said.stdout


def test_without_it_a_learner_and_an_actor_compute_all_the_same() -> None:
    code = """
import sys; sys.modules["rustyrl._perceptron"] = None
import numpy as np, torch
from test_ppo import PLAIN, batch_of, network_of, update
from rustyrl import perceptron
from rustyrl_actors.inference import Policy
from rustyrl_learner.network import export_weights
assert not perceptron.COMPILED and "not compiled" in perceptron.PROBLEM, perceptron.PROBLEM
network = network_of(compiled=2)
batch = batch_of(network)
assert network.compiled is None and update(network, batch, PLAIN).gradient_norm > 0
outputs = Policy(export_weights(network, None), 60).forward({"main": batch.observation.numpy()})
np.testing.assert_allclose(outputs, network.policy(batch.observation).numpy(), rtol=1e-4, atol=1e-5)
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=60)


def test_activations_that_it_does_not_know_are_left_to_others() -> None:
    assert perceptron.encode_activations(["gelu", "identity"]) is None


def test_networks_of_very_many_layers_are_left_to_others() -> None:
    assert perceptron.encode_activations(["tanh"] * 33) is None
