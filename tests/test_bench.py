"""`rustyrl bench`: every part for real, with little time."""

from __future__ import annotations

import json

import pytest
from clusters import WORLDS, rustyrl

from rustyrl.bench import window_rates
from rustyrl.windows import make_part, measure_rate

QUICK = ("--seconds", "0.2", "--windows", "3", "--json")
SMALL = ("--set", "env.slots=16", "--set", "batch.unroll_length=16", "--set", "ppo.minibatch_size=256")


def bench(*arguments: str) -> dict:
    code, out, err = rustyrl("bench", *arguments, *QUICK)
    assert code == 0, err
    result = json.loads(out)
    assert {"parts", "verdict", "machine", "windows", "batch"} <= result.keys()
    assert {"cores", "python"} <= result["machine"].keys()
    for part in result["parts"]:
        assert part.keys() == {"name", "value", "unit", "spread"}
        assert part["value"] >= 0
    result["by_name"] = {part["name"]: part["value"] for part in result["parts"]}
    return result


def test_an_actor_alone_is_measured_with_its_world_and_its_policy():
    result = bench("env", *SMALL)
    found = result["by_name"]
    assert found.keys() == {"env_sps", "inference_sps", "actor_sps", "actor_overhead", "rollout_bytes"}
    assert min(found["env_sps"], found["inference_sps"], found["actor_sps"]) > 0
    assert found["rollout_bytes"] == pytest.approx(4 * 4 * 17 / 16 + 8)  # 4 numbers and 1 of 64 bits, as a batch of 16
    assert "an actor's time goes to stepping worlds" in result["verdict"]


def test_a_world_with_masks_is_measured_too():
    examples = WORLDS.parent.parent / "examples"
    result = bench("inference", "--env", f"{examples}/doors.py:Doors")
    assert result["by_name"]["inference_sps"] > 0


def test_a_learner_alone_is_measured_on_the_shapes_of_a_run():
    result = bench("learner", *SMALL, "--env", "drone")
    assert result["by_name"].keys() == {"learner_samples_s", "learner_sps", "advantages_ms"}
    assert result["by_name"]["learner_samples_s"] > result["by_name"]["learner_sps"]
    assert "a learner that never waits" in result["verdict"]


def test_a_cluster_is_measured_and_its_limit_named():
    result = bench("cluster", *SMALL, "--actors", "1")
    assert result["by_name"]["trained_sps"] > 0
    assert result["by_name"]["start_s"] > 0
    assert result["verdict"].startswith("the learner waits ")


@pytest.mark.slow
def test_scaling_compares_numbers_of_actors_and_draws_them(tmp_path):
    slow = (*SMALL, "--env", f"{WORLDS}/counting.py:Counting", "--set", "env.delay_ms=5", "--set", "batch.worlds=2")
    slow += ("--set", "batch.unroll_length=4")
    result = bench("scaling", *slow, "--actors", "1,2", "--plot", str(tmp_path / "out.png"))
    found = result["by_name"]
    assert found.keys() == {"trained_sps_1", "trained_sps_2", "scaling_efficiency_2", "scaling_efficiency"}
    assert found["scaling_efficiency"] == found["scaling_efficiency_2"]
    assert found["trained_sps_2"] > found["trained_sps_1"]  # worlds that sleep: nothing is in the way of a second actor
    assert "most env steps/s come from 2 actors" in result["verdict"]
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--actors", "1,2"], "several numbers of actors are for `bench scaling`"),
        (["scaling", "--actors", "2,0"], "--actors takes numbers from 1 up, such as 4 or 1,2,4, got '2,0'"),
        (["--plot", "out.svg"], "--plot writes a PNG file, got out.svg"),
        (["--plot", "nowhere/out.png"], "there is no folder nowhere"),
        (["nonsense"], "nonsense"),
        (["learner", "--device", "cuda"], "torch sees no CUDA device"),
    ],
)
def test_bad_use_is_refused_in_words(arguments, said):
    code, _, err = rustyrl("bench", *arguments)
    assert code == 2
    assert said in " ".join(err.split())


@pytest.mark.slow
def test_a_run_that_fails_is_reported_with_its_cause():
    code, _, err = rustyrl("bench", "--env", f"{WORLDS}/counting.py:Counting", "--set", "env.nan_at=3", *QUICK)
    assert code == 1
    assert "slot 3, step 2 of batch 0: reward holds nan" in err
    assert "checkpoint" not in err  # the folder of the run is gone


def test_the_rate_of_a_window_is_that_of_its_own_steps():
    rows = [{"steps": 0, "seconds": 0.0}]  # the warm-up batch
    steps = 0
    for second in range(1, 14):
        steps += 100 if second <= 7 else 300
        rows.append({"steps": steps, "seconds": float(second), "policy_loss": 0.0})
    assert window_rates(rows, 2) == pytest.approx([100.0, 300.0], rel=0.2)
    assert window_rates(rows[:3], 2) == []


def test_a_part_is_a_median_with_half_the_distance_of_the_quartiles():
    assert make_part("x", [1.0, 2.0, 3.0, 4.0, 100.0], "s") == {"name": "x", "value": 3.0, "unit": "s", "spread": 25.2}
    assert make_part("x", [3.0], "s")["spread"] == 0.0
    assert measure_rate(lambda: 10, 0.001, 2)[0] > 0
