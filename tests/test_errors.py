"""Bad input and bad worlds: what was expected, what came, what to do, and the right exit code."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys

import pytest
from clusters import SMALL, WORLDS, poll, rustyrl

from rustyrl.cli import main

COUNTING = f"{WORLDS}/counting.py:Counting"
USAGE = [
    (["train", "dron"], "did you mean 'drone'"),
    (["train"], "rustyrl envs"),
    (["train", "no_such_module:World"], "no module 'no_such_module'"),
    (["train", "no_such_file.py:World"], "there is no file"),
    (["train", f"{WORLDS}/counting.py:Countin"], "did you mean 'Counting'"),
    (["train", "drone", "--set", "ppo.gama=0.9"], "did you mean 'gamma'"),
    (["train", "drone", "--set", "pop.gamma=0.9"], "did you mean 'ppo'"),
    (["train", "drone", "--set", "ppo.gamma=1.5"], "<= 1"),
    (["train", "drone", "--set", "ppo.gamma=high"], "Expected `float`"),
    (["train", "drone", "--set", "gamma"], "SECTION.KEY=VALUE"),
    (["train", "drone", "--set", "env.masskg=1"], "did you mean 'mass_kg'"),
    (["train", "drone", "--set", "env.mass_kg=-1"], "> 0"),
    (["train", "drone", "--set", "env.slots=0"], "positive number of agents"),
    (["train", "drone", "--stop-at", "sucess_rate>=1"], "success_rate"),
    (["train", "drone", "--stop-at", "success_rate>1"], "METRIC>=VALUE"),
    (["train", "drone", "--config", "nowhere.toml"], "cannot read"),
    (["train", "drone", "--init", "nowhere.safetensors"], "there is no file"),
    (["train", "drone", "--device", "tpu"], "Invalid enum value 'tpu'"),
    (["train", "cartpole", "--set", "ppo.schedule=linear"], "needs run.total_steps"),
    (["train", "cartpole", "--listen", "tcp://*:5555"], "say so if you mean it: tcp://0.0.0.0:PORT"),
    (["train", "cartpole", "--listen", "tcp://nowhere.invalid:5555"], "there is no machine 'nowhere.invalid'"),
    (["actor", "--join", "tcp://192.0.2.1:5555"], "leaves this machine: expected --key FILE"),
    (["actor", "--join", "tcp://192.0.2.1:5555", "--key", "nowhere.key"], "cannot read the key nowhere.key"),
    (["actor", "--join", "tcp://192.0.2.1:5555", "--key", "x", "--insecure"], "give one of them"),
    (["keys", "list", "--run", "nowhere"], "is not a run folder"),
    (["train", "--resume", "--run", "nowhere"], "holds no run to resume"),
    (["train", "drone", "--actors", "many"], "--actors"),
    (["actor", "--join", "nowhere"], "expected ipc://PATH or tcp://"),
    (["status", "--run", "nowhere"], "is not a run folder"),
    (["eval", "policy.safetensors"], "no run folder or policy file"),
    (["train", "world.py"], "world.py:Class"),
    (["train", f"{WORLDS}/counting.py:Aimless"], "has no such figure"),
    (["stop"], "no run is going on"),
    (["trian"], "No such command"),
]


@pytest.mark.parametrize(("arguments", "said"), USAGE, ids=[" ".join(a)[-40:] for a, _ in USAGE])
def test_bad_use_says_what_to_do_and_exits_with_2(arguments, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["rustyrl", *arguments])
    with pytest.raises(SystemExit) as ended:  # in this process: starting a Python for each takes longer than all of it
        main()
    out, err = capsys.readouterr()
    assert ended.value.code == 2, (out, err)
    assert said in err.replace("\n", " ")
    assert "Traceback" not in err
    assert not list(tmp_path.glob("runs/*"))


def test_missing_torch_names_the_extra(tmp_path):
    code = "import sys; sys.modules['torch'] = None; from rustyrl.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "train", "cartpole"], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 2
    assert "pip install 'rustyrl[learner]'" in done.stderr
    code = code.replace(
        "['torch'] = None;",
        "['torch'] = None; import importlib.metadata as m; find = m.version;"
        "m.version = lambda name: (_ for _ in ()).throw(m.PackageNotFoundError) if name == 'torch' else find(name);",
    )
    done = subprocess.run([sys.executable, "-c", code, "doctor"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "problem: torch missing, so this machine can only act: pip install 'rustyrl[learner]'" in done.stdout


def test_cuda_asked_for_and_absent_says_so(tmp_path):
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    code, _, err = rustyrl("train", "cartpole", "--device", "cuda", cwd=tmp_path)
    assert code == 2
    assert "torch sees no CUDA device" in err
    assert not list(tmp_path.glob("runs/*"))


def test_a_port_in_use_says_so(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, _, err = rustyrl("train", "cartpole", "--listen", f"tcp://127.0.0.1:{port}", cwd=tmp_path)
    assert code == 2
    assert f"tcp://127.0.0.1:{port} is in use" in err


def test_a_foreign_folder_is_not_written_to(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    code, _, err = rustyrl("train", "cartpole", "--run", "mine", cwd=tmp_path)
    assert code == 2
    assert "is not empty and not a run" in err
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_an_unwritable_folder_says_so(tmp_path):
    if os.geteuid() == 0:
        target = "/proc/rustyrl"  # root may write everywhere else
    else:
        (tmp_path / "closed").mkdir(mode=0o500)
        target = str(tmp_path / "closed" / "run")
    code, _, err = rustyrl("train", "cartpole", "--run", target, cwd=tmp_path)
    assert code == 2
    assert "cannot write to the run folder" in err


def test_two_runs_cannot_share_a_folder(start):
    first = start("train", "cartpole", "--actors", "1", "--total-steps", "100000000", *SMALL)
    poll(lambda: (first.run / "cluster.json").exists(), "the first run")
    for extra in ([], ["--resume"]):
        code, _, err = rustyrl("train", "cartpole", *extra, "--run", str(first.run))
        assert code == 2
        assert "belongs to a run that is going on" in err


def test_a_world_that_keeps_raising_ends_with_its_own_traceback(start):
    cluster = start(
        "train", COUNTING, "--actors", "2", "--total-steps", "100000", "--set", "env.raise_at=20", *SMALL,
        "--set", "cluster.restarts=1", "--set", "cluster.restart_window_s=90",
    )  # fmt: skip
    code, out, err = cluster.wait()
    assert code == 1
    assert "a new one starts in 0.25 s" in out  # the first time
    assert "died 2 times within 90 s" in err
    assert "ZeroDivisionError: the world of the test fell over" in err
    assert 'counting.py", line' in err
    assert "in step" in err
    assert any("ZeroDivisionError" in path.read_text() for path in (cluster.run / "logs" / "crashes").iterdir())
    cluster.assert_gone()


def test_nan_from_a_world_names_world_slot_and_step(start):
    cluster = start(
        "train", COUNTING, "--actors", "2", "--total-steps", "100000", *SMALL,
        "--set", "env.nan_at=100", "--set", "run.checkpoint_every=1",
    )  # fmt: skip
    code, _, err = cluster.wait()
    assert code == 1
    assert "slot 3, step 3 of batch 6: reward holds nan" in err  # tick 100 of 16-step batches, counted from 0
    assert "last good checkpoint is" in err
    cluster.assert_gone()


def test_a_world_that_prints_disturbs_nothing(start):
    cluster = start(
        "train", f"{WORLDS}/counting.py:Talkative", "--actors", "1", "--total-steps", "500", "--json", *SMALL,
        "--set", "run.eval_episodes=4",
    )  # fmt: skip
    code, out, err = cluster.wait()
    assert code == 0, err
    assert json.loads(out)["eval"]["episodes"] == 4
    code, out, err = rustyrl("eval", str(cluster.run), "--episodes", "4", "--json")
    assert json.loads(out)["episodes"] == 4
    code, _, err = rustyrl("eval", str(cluster.run), "--episodes", "4", "--set", "env.nan_at=3")
    assert code == 1
    assert "slot 3, step 2 of an evaluation: reward is not finite" in err
