"""Conditions as ``--stop-at`` takes them."""

from __future__ import annotations

import math

import pytest

from rustyrl.condition import Condition, meets, parse_condition
from rustyrl.errors import UsageError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("return_mean>=475", Condition("return_mean", True, 475.0)),
        ("crash_rate<=0.005", Condition("crash_rate", False, 0.005)),
        ("  x1  >=  -3.5e2 ", Condition("x1", True, -350.0)),
        ("_a<=+.5", Condition("_a", False, 0.5)),
        ("loss<=inf", Condition("loss", False, math.inf)),
    ],
)
def test_conditions_are_a_metric_a_direction_and_a_number(text: str, expected: Condition) -> None:
    assert parse_condition(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "return_mean",
        "return_mean>475",
        "return_mean=475",
        "return_mean==475",
        "return_mean=>475",
        "return_mean>=",
        ">=475",
        "return_mean>=four",
        "return_mean>=4 75",
        "return_mean>=475,crash_rate<=1",
        "return mean>=475",
        "return-mean>=475",
        "1st>=475",
        "475<=return_mean",
        "return_mean>=nan",
    ],
)
def test_anything_else_is_refused_with_the_two_forms(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_condition(text)
    assert str(caught.value) == f"{text!r} is no condition; expected METRIC>=VALUE or METRIC<=VALUE"


@pytest.mark.parametrize("text", ["return_mean>=475", "crash_rate<=0.005", "reward>=-1e-05"])
def test_a_condition_reads_as_it_was_written(text: str) -> None:
    assert str(parse_condition(text)) == text


@pytest.mark.parametrize(
    ("text", "figure", "expected"),
    [
        ("x>=2", 2.0, True),
        ("x>=2", 1.999, False),
        ("x>=2", math.inf, True),
        ("x<=2", 2.0, True),
        ("x<=2", 2.001, False),
        ("x<=2", -math.inf, True),
        ("x>=2", math.nan, False),
        ("x<=2", math.nan, False),
        ("x>=2", None, False),
        ("x<=2", None, False),
    ],
)
def test_a_figure_meets_it_or_not(text: str, figure: float | None, expected: bool) -> None:
    assert parse_condition(text).holds({"x": figure, "y": 2.0}) is expected


def test_a_missing_figure_meets_nothing() -> None:
    assert not parse_condition("x<=2").holds({"y": 0.0})


def test_all_of_several_must_hold() -> None:
    conditions = [parse_condition("a>=1"), parse_condition("b<=1")]
    assert meets(conditions, {"a": 1.0, "b": 1.0})
    assert not meets(conditions, {"a": 1.0, "b": 2.0})
    assert not meets(conditions, {"a": 1.0})
    assert meets([], {})


@pytest.mark.parametrize(
    ("text", "figure", "expected"),
    [
        ("x>=10", 10.0, 0.0),
        ("x>=10", 12.0, 0.0),
        ("x>=10", 7.5, 0.25),
        ("x<=10", 12.5, 0.25),
        ("x<=10", 3.0, 0.0),
        ("x>=-10", -15.0, 0.5),
        ("x>=10", None, math.inf),
        ("x>=10", math.nan, math.inf),
    ],
)
def test_shortfall_is_what_is_missing_as_a_part_of_the_value(text: str, figure: float | None, expected: float) -> None:
    assert parse_condition(text).shortfall({"x": figure}) == pytest.approx(expected)


def test_shortfall_of_a_condition_at_zero_is_finite_and_grows() -> None:
    condition = parse_condition("x<=0")
    assert condition.shortfall({"x": 0.0}) == 0.0
    near, far = (condition.shortfall({"x": figure}) for figure in (0.1, 0.2))
    assert 0 < near < far < math.inf


@pytest.mark.parametrize(("text", "expected"), [("x>=10", 8.0), ("x>=-10", -12.0), ("x>=0", 0.0)])
def test_relaxed_asks_a_fifth_less_of_what_should_be_high(text: str, expected: float) -> None:
    assert parse_condition(text).relaxed() == Condition("x", True, expected)


def test_relaxed_asks_nothing_of_what_should_be_low_but_to_be_a_number() -> None:
    relaxed = parse_condition("x<=0.005").relaxed()
    assert relaxed.holds({"x": 1e9})
    assert not relaxed.holds({"x": None})
    assert not relaxed.holds({})
