"""The configuration: layers, ranges, types, and errors that name the nearest known key."""

from __future__ import annotations

import tomllib
import typing
from pathlib import Path
from typing import Any

import msgspec
import pytest

from rustyrl.config import Config, build_config, config_to_toml, nearest, parse_assignments, read_config
from rustyrl.errors import UsageError

SECTIONS = ("run", "env", "actor", "batch", "policy", "ppo", "cluster")


def refusal(*assignments: str) -> str:
    """What a configuration with these assignments is refused with."""
    with pytest.raises(UsageError) as caught:
        build_config(parse_assignments(assignments))
    return str(caught.value)


# Layers


def test_no_layer_gives_the_defaults() -> None:
    assert build_config() == Config()
    assert build_config({}, {"ppo": {}}) == Config()


def test_later_layers_win_key_by_key() -> None:
    recommended = {"ppo": {"gamma": 0.5, "clip": 0.3, "epochs": 7}, "run": {"seed": 5}}
    file = {"ppo": {"gamma": 0.6, "clip": 0.4}}
    flags = {"ppo": {"gamma": 0.7}}
    config = build_config(recommended, file, flags)
    assert (config.ppo.gamma, config.ppo.clip, config.ppo.epochs, config.run.seed) == (0.7, 0.4, 7, 5)
    assert config.ppo.gae_lambda == Config().ppo.gae_lambda


def test_parameters_of_the_world_are_joined_like_any_other_keys() -> None:
    config = build_config({"env": {"slots": 16, "wind": 1.5}}, {"env": {"wind": 2.0, "map": "canyon", "rain": True}})
    assert config.env == {"slots": 16, "wind": 2.0, "map": "canyon", "rain": True}


def test_layers_are_not_changed() -> None:
    first: dict[str, dict[str, Any]] = {"ppo": {"gamma": 0.5}}
    build_config(first, {"ppo": {"clip": 0.3}})
    assert first == {"ppo": {"gamma": 0.5}}


def test_a_wrong_value_may_be_overruled_by_a_later_layer() -> None:
    assert build_config({"ppo": {"gamma": 2.0}}, {"ppo": {"gamma": 0.9}}).ppo.gamma == 0.9


def test_a_configuration_is_frozen() -> None:
    with pytest.raises(AttributeError):
        Config().ppo.gamma = 0.5  # type: ignore[misc]


# Names


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("ppo.gama=0.9", "unknown key ppo.gama; did you mean 'gamma'?"),
        ("ppo.lambda=0.9", "unknown key ppo.lambda; did you mean 'gae_lambda'?"),
        ("run.totalsteps=1", "unknown key run.totalsteps; did you mean 'total_steps'?"),
        ("batch.unroll=1", "unknown key batch.unroll; did you mean 'unroll_length'?"),
        ("pop.gamma=0.9", "unknown section 'pop'; did you mean 'ppo'?"),
        ("Batch.worlds=1", "unknown section 'Batch'; did you mean 'batch'?"),
        ("actor.zzz=1", "unknown key actor.zzz; known are poison, stagger"),
        ("zzz.a=1", f"unknown section 'zzz'; known are {', '.join(sorted(SECTIONS))}"),
        ("ppo.clip.x=1", "unknown key ppo.clip.x; did you mean 'clip'?"),
    ],
)
def test_unknown_names_are_refused_with_the_nearest_known_one(assignment: str, message: str) -> None:
    assert refusal(assignment) == message


def test_nearest_names_everything_where_nothing_is_near() -> None:
    assert nearest("zzz", ["beta", "alpha"]) == "; known are alpha, beta"
    assert nearest("zzz", []) == "; known are none"
    assert nearest("alhpa", ["beta", "alpha"]) == "; did you mean 'alpha'?"


def test_sections_are_those_of_the_design() -> None:
    assert Config.__struct_fields__ == SECTIONS


def test_every_key_has_help() -> None:
    for section in set(SECTIONS) - {"env"}:
        struct = typing.get_type_hints(Config)[section]
        for key, hint in typing.get_type_hints(struct, include_extras=True).items():
            described = [meta.description for meta in getattr(hint, "__metadata__", ()) if meta.description]
            assert described, f"{section}.{key}"


# Values


@pytest.mark.parametrize(
    ("assignment", "expected", "name"),
    [
        ("ppo.gamma=1.01", "<= 1.0", "ppo.gamma"),
        ("ppo.gamma=-0.1", ">= 0.0", "ppo.gamma"),
        ("ppo.clip=0", "> 0.0", "ppo.clip"),
        ("ppo.clip=nan", "> 0.0", "ppo.clip"),
        ("ppo.epochs=0", ">= 1", "ppo.epochs"),
        ("run.seed=-1", ">= 0", "run.seed"),
        ("batch.worlds=65537", "<= 65536", "batch.worlds"),
        ("batch.max_policy_lag=65", "<= 64", "batch.max_policy_lag"),
        ("cluster.actors=-2", ">= -1", "cluster.actors"),
        ("policy.hidden=[64, 0]", ">= 1", "policy.hidden[1]"),
        ("run.seed=1.5", "`int`, got `float`", "run.seed"),
        ("run.seed=true", "`int`, got `bool`", "run.seed"),
        ("run.seed=seven", "`int`, got `str`", "run.seed"),
        ("actor.stagger=1", "`bool`, got `int`", "actor.stagger"),
        ("run.env=3", "`str`, got `int`", "run.env"),
        ("run.stop_at='a>=1'", "`array`, got `str`", "run.stop_at"),
        ("policy.hidden=64", "`array`, got `int`", "policy.hidden"),
        ("policy.activation=gelu", "enum value 'gelu'", "policy.activation"),
        ("run.device=gpu", "enum value 'gpu'", "run.device"),
        ("env.wind=[1, 2]", "expected a number", "env.wind"),
    ],
)
def test_values_out_of_range_or_of_another_type_are_refused_by_name(assignment: str, expected: str, name: str) -> None:
    message = refusal(assignment)
    assert message.startswith("configuration: ")
    assert expected in message
    assert message.endswith(f"`{name}`")


@pytest.mark.parametrize(
    ("assignment", "section", "key", "value"),
    [
        ("ppo.gamma=1", "ppo", "gamma", 1.0),
        ("ppo.gamma=0", "ppo", "gamma", 0.0),
        ("batch.worlds=65536", "batch", "worlds", 65536),
        ("batch.max_policy_lag=0", "batch", "max_policy_lag", 0),
        ("policy.hidden=[]", "policy", "hidden", ()),
        ("policy.initial_log_std=-0.5", "policy", "initial_log_std", -0.5),
        (
            "run.stop_at=['return_mean>=475', 'crash_rate<=0.1']",
            "run",
            "stop_at",
            ("return_mean>=475", "crash_rate<=0.1"),
        ),
        ("run.seed=4611686018427387904", "run", "seed", 2**62),
    ],
)
def test_values_at_the_ends_of_their_range_are_taken(assignment: str, section: str, key: str, value: object) -> None:
    config = build_config(parse_assignments([assignment]))
    assert getattr(getattr(config, section), key) == value


# Assignments


@pytest.mark.parametrize(
    ("assignment", "value"),
    [
        ("env.x=1", 1),
        ("env.x=-1", -1),
        ("env.x=1_000", 1000),
        ("env.x=1.5", 1.5),
        ("env.x=3e-4", 3e-4),
        ("env.x=true", True),
        ("env.x=True", "True"),
        ("env.x=[64, 32]", [64, 32]),
        ("env.x=['a', 'b']", ["a", "b"]),
        ("env.x=[]", []),
        ("env.x='quoted'", "quoted"),
        ('env.x="7"', "7"),
        ("env.x=bare", "bare"),
        ("env.x=two words", "two words"),
        ("env.x=package.module:Class", "package.module:Class"),
        ("env.x=/a/path.py:Class", "/a/path.py:Class"),
        ("env.x=return_mean>=475", "return_mean>=475"),
        ("env.x=a=b", "a=b"),
        ("env.x=[1, 2", "[1, 2"),
        ("env.x=", ""),
        (" env.x = 1 ", 1),
    ],
)
def test_assigned_values_are_toml_and_bare_words_strings(assignment: str, value: object) -> None:
    parsed = parse_assignments([assignment])
    assert parsed == {"env": {"x": value}}
    assert type(parsed["env"]["x"]) is type(value)


@pytest.mark.parametrize("assignment", ["", "ppo", "ppo.gamma", "gamma=1", "ppo.=1", "=1", "ppo gamma=1"])
def test_assignments_of_another_form_are_refused(assignment: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_assignments([assignment])
    assert str(caught.value) == f"--set takes SECTION.KEY=VALUE, got {assignment!r}"


def test_an_assignment_without_a_section_name_is_refused() -> None:
    assert "unknown section ''" in refusal(".gamma=1")


def test_assignments_join_and_the_last_of_a_key_wins() -> None:
    parsed = parse_assignments(["ppo.clip=0.1", "run.seed=1", "ppo.gamma=0.9", "ppo.clip=0.2"])
    assert parsed == {"ppo": {"clip": 0.2, "gamma": 0.9}, "run": {"seed": 1}}


# Files


def test_toml_round_trip_keeps_everything(tmp_path: Path) -> None:
    config = build_config(
        {
            "run": {"env": 'odd "name":Class', "stop_at": ["a>=1", "b<=0.25"], "seed": 2**62, "max_seconds": 0.1},
            "env": {"slots": 16, "wind": 1.0, "map": "caf\u00e9", "rain": False},
            "policy": {"hidden": [], "activation": "elu"},
            "ppo": {"learning_rate": 1e-5 / 3},
        }
    )
    path = tmp_path / "config.toml"
    path.write_text(config_to_toml(config), encoding="utf-8")
    assert build_config(read_config(path)) == config


def test_the_resolved_configuration_holds_every_key() -> None:
    content = tomllib.loads(config_to_toml(Config()))
    assert content == msgspec.json.decode(msgspec.json.encode(Config()))


def test_a_file_may_set_some_keys_and_comment(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text("# mine\n[ppo]\nclip = 0.1 # smaller\n[run]\nenv = 'drone'\n")
    assert read_config(path) == {"ppo": {"clip": 0.1}, "run": {"env": "drone"}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[ppo\n", "mine.toml is not TOML: "),
        (b"\xff\xfe", "mine.toml is not TOML: "),
        (b"gamma = 0.9\n", "mine.toml: 'gamma' stands outside a section; sections are ['run', 'env'"),
    ],
    ids=["broken", "not-utf8", "no-section"],
)
def test_files_of_another_form_are_refused_by_name(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_bytes(content)
    with pytest.raises(UsageError) as caught:
        read_config(path)
    assert message in str(caught.value)


def test_a_missing_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot read the configuration .*none\.toml: No such file"):
        read_config(tmp_path / "none.toml")


def test_unknown_keys_in_a_file_are_refused_as_in_flags(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text("[ppo]\ngama = 0.9\n")
    with pytest.raises(UsageError, match="did you mean 'gamma'"):
        build_config(read_config(path))
