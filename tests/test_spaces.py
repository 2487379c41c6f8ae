"""From Gymnasium's spaces to named arrays and back, and what is said of spaces that cannot be."""

from __future__ import annotations

from typing import Any

import gymnasium.spaces as gs
import msgspec
import numpy as np
import pytest

from rustyrl.errors import UsageError
from rustyrl.spec import ActionSpec, ArraySpec
from rustyrl_actors.spaces import (
    action_parts,
    has_parts,
    leaf_values,
    leaves,
    named_once,
    observation_arrays,
    rebuild,
)

LINE = gs.Box(-1.0, 1.0, (1,), np.float32)
ODD = gs.Dict(
    {
        "z last": gs.Discrete(2),
        "a": gs.Tuple((gs.Discrete(3), gs.Dict({"x/y": gs.Discrete(4), "2nd": gs.Discrete(5)}))),
        "-dash": gs.Discrete(6),
        "é": gs.Discrete(7),
        "a.b": gs.Discrete(9),
    }
)
NESTED = gs.Dict(
    {
        "body": gs.Dict({"speed": LINE, "place": gs.Box(0, 255, (2, 3), np.uint8)}),
        "keys": gs.MultiBinary((2, 2)),
        "eyes": gs.Tuple((LINE, gs.Tuple((LINE, gs.Dict({"far": LINE}))))),
    }
)


def test_a_space_without_parts_has_one_leaf_named_main() -> None:
    for space in (LINE, gs.Discrete(3), gs.MultiBinary(4), gs.MultiDiscrete([2, 3])):
        assert not has_parts(space)
        assert list(leaves(space)) == [("main", space)]
        assert list(leaf_values(space, "value")) == ["value"]
        assert rebuild(space, iter(["value"])) == "value"
    assert has_parts(gs.Dict({"a": LINE}))
    assert has_parts(gs.Tuple((LINE,)))


def test_names_of_nested_parts_are_joined_by_dots_in_the_order_of_the_keys() -> None:
    assert [name for name, _ in leaves(NESTED)] == [
        "body.place",
        "body.speed",
        "eyes.item_0",
        "eyes.item_1.item_0",
        "eyes.item_1.item_1.far",
        "keys",
    ]


def test_the_order_in_which_a_dict_is_written_does_not_matter() -> None:
    first, second = gs.Dict({"a": LINE, "b": gs.Discrete(2)}), gs.Dict({"b": gs.Discrete(2), "a": LINE})
    assert list(leaves(first)) == list(leaves(second)) == [("a", LINE), ("b", gs.Discrete(2))]
    # Gymnasium keeps the order of pairs.
    assert list(leaves(gs.Dict([("b", gs.Discrete(2)), ("a", LINE)]))) == list(leaves(first))


def test_keys_that_are_no_names_become_names() -> None:
    assert [(name, space.n) for name, space in leaves(ODD)] == [  # type: ignore[attr-defined]
        ("_-dash", 6),
        ("a.item_0", 3),
        ("a.item_1._2nd", 5),
        ("a.item_1.x_y", 4),
        ("a_b", 9),
        ("z_last", 2),
        ("_", 7),
    ]
    assert [name for name, _ in leaves(gs.Dict({"": LINE}))] == ["_"]


def test_every_name_is_one_that_the_wire_takes() -> None:
    keys = ("z last", "2nd", "-dash", "é", "a.b", "x/y", "", "A", "new\nline")
    for key in keys:
        ((name, _),) = leaves(gs.Dict({key: LINE}))
        assert msgspec.convert({"name": name, "shape": [1], "dtype": "float32"}, ArraySpec).name == name


@pytest.mark.parametrize("space", [NESTED, ODD], ids=["nested", "odd"])
def test_values_of_leaves_are_those_of_their_names_and_rebuild_the_value(space: gs.Space[Any]) -> None:
    space.seed(0)
    for _ in range(5):
        value = space.sample()
        parts = list(leaf_values(space, value))
        assert len(parts) == len(list(leaves(space)))
        for (_, leaf), part in zip(leaves(space), parts, strict=True):
            assert leaf.contains(part)
        again = rebuild(space, iter(parts))
        assert space.contains(again)
        assert repr(again) == repr(value)


def test_values_come_from_where_their_names_say() -> None:
    value = {
        "body": {"speed": "speed", "place": "place"},
        "keys": "keys",
        "eyes": ("left", ("right", {"far": "far"})),
    }
    found = dict(zip((name for name, _ in leaves(NESTED)), leaf_values(NESTED, value), strict=True))
    assert found == {
        "body.place": "place",
        "body.speed": "speed",
        "eyes.item_0": "left",
        "eyes.item_1.item_0": "right",
        "eyes.item_1.item_1.far": "far",
        "keys": "keys",
    }
    assert rebuild(NESTED, leaf_values(NESTED, value)) == value


def test_a_tuple_of_another_length_is_no_value() -> None:
    with pytest.raises(ValueError, match=r"shorter|longer"):
        list(leaf_values(gs.Tuple((LINE, LINE)), (0, 0, 0)))


def test_a_dict_whose_keys_are_numbers_round_trips() -> None:
    space = gs.Dict({10: LINE, 9: gs.Discrete(2)})  # type: ignore[dict-item]
    assert [name for name, _ in leaves(space)] == ["_10", "_9"]
    value = {10: "ten", 9: "nine"}
    assert list(leaf_values(space, value)) == ["ten", "nine"]
    assert rebuild(space, iter(["ten", "nine"])) == value


# Observations


def test_observation_arrays_have_the_names_shapes_and_types_of_their_spaces() -> None:
    assert observation_arrays("maze", LINE) == (ArraySpec("main", (1,), "float32"),)
    assert observation_arrays("maze", NESTED) == (
        ArraySpec("body.place", (2, 3), "uint8"),
        ArraySpec("body.speed", (1,), "float32"),
        ArraySpec("eyes.item_0", (1,), "float32"),
        ArraySpec("eyes.item_1.item_0", (1,), "float32"),
        ArraySpec("eyes.item_1.item_1.far", (1,), "float32"),
        ArraySpec("keys", (2, 2), "bool"),
    )


def usage_error(function: Any, *arguments: Any, **options: Any) -> str:
    with pytest.raises(UsageError) as caught:
        function("maze", *arguments, **options)
    message = str(caught.value)
    assert message.startswith("environment 'maze'")
    return message


@pytest.mark.parametrize("dtype", [np.float64, np.int64, np.int32, np.int8])
def test_a_box_of_another_type_is_refused_with_the_type_to_give_it(dtype: Any) -> None:
    message = usage_error(observation_arrays, gs.Dict({"body": gs.Dict({"speed": gs.Box(0, 1, (2,), dtype)})}))
    assert "observation 'body.speed'" in message
    assert f"this Box is {np.dtype(dtype)}, give it dtype=np.float32" in message


@pytest.mark.parametrize("space", [gs.Discrete(4), gs.MultiDiscrete([2, 3])])
def test_an_observed_choice_is_refused_with_the_one_hot_form_of_it(space: gs.Space[Any]) -> None:
    message = usage_error(observation_arrays, gs.Dict({"tile": space}))
    assert "observation 'tile'" in message
    assert "a choice among n is observed one-hot, as a MultiBinary of n" in message


def test_an_observation_of_another_kind_is_refused_with_those_that_there_are() -> None:
    for space in (gs.Text(5), gs.Sequence(LINE), gs.Graph(LINE, None)):
        message = usage_error(observation_arrays, space)
        assert "observation 'main'" in message
        assert "a float32 or uint8 Box, a MultiBinary, or a Dict or Tuple of them" in message


# Actions


def test_action_parts_have_the_counts_or_bounds_of_their_spaces() -> None:
    low, high = np.array([-1.0, 0.25], np.float32), np.array([1.0, 8.0], np.float32)
    space = gs.Dict(
        {
            "push": gs.Box(low, high),
            "tools": gs.Tuple((gs.MultiDiscrete([[2, 3], [4, 5]]), gs.MultiBinary((2, 1)))),
            "call": gs.Discrete(7),
        }
    )
    assert action_parts("maze", space) == (
        ActionSpec("discrete", "call", counts=(7,)),
        ActionSpec("box", "push", shape=(2,), low=(-1.0, 0.25), high=(1.0, 8.0)),
        ActionSpec("discrete", "tools.item_0", shape=(2, 2), counts=(2, 3, 4, 5)),
        ActionSpec("discrete", "tools.item_1", shape=(2, 1), counts=(2, 2)),
    )
    assert action_parts("maze", gs.Discrete(3)) == (ActionSpec("discrete", counts=(3,)),)


def test_a_mask_covers_the_choices_and_not_the_boxes() -> None:
    space = gs.Dict({"push": LINE, "call": gs.Discrete(7), "keys": gs.MultiBinary(2)})
    parts = action_parts("maze", space, masked=True)
    assert [(part.name, part.masked) for part in parts] == [("call", True), ("keys", True), ("push", False)]


def test_a_mask_of_nothing_but_boxes_is_refused() -> None:
    message = usage_error(action_parts, gs.Dict({"push": LINE}), masked=True)
    assert "declares an action mask, but its action space" in message
    assert "has no choices" in message


@pytest.mark.parametrize(
    "space", [gs.Box(0, 255, (3,), np.uint8), gs.Box(0, 9, (3,), np.int64), gs.Text(4), gs.Sequence(LINE)], ids=str
)
def test_an_action_of_another_kind_is_refused_with_those_that_there_are(space: gs.Space[Any]) -> None:
    message = usage_error(action_parts, gs.Tuple((LINE, space)))
    assert "action 'item_1'" in message
    assert "expected Discrete, MultiDiscrete, MultiBinary, a Box of floats, or a Dict or Tuple of them" in message


# Names


@pytest.mark.parametrize(
    "space",
    [
        gs.Dict({"a b": LINE, "a_b": LINE}),
        gs.Dict({"a/b": LINE, "a.b": LINE}),
        gs.Dict({"2": LINE, "_2": LINE}),
        gs.Dict({}),
        gs.Tuple(()),
        gs.Dict({"a": gs.Dict({})}),
    ],
    ids=str,
)
@pytest.mark.parametrize("function", [observation_arrays, action_parts])
def test_parts_without_a_name_of_their_own_are_refused(function: Any, space: gs.Space[Any]) -> None:
    assert "need names of their own" in usage_error(function, space)


def test_a_name_too_long_for_the_wire_is_refused() -> None:
    assert named_once("maze", "observation", gs.Dict({"x" * 30: LINE})) == [("x" * 30, LINE)]
    message = usage_error(observation_arrays, gs.Dict({"y" * 40: gs.Dict({"z" * 40: LINE})}))
    assert "y" * 40 + "." + "z" * 40 in message
    assert "more than 46 characters" in message
