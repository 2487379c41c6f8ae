"""The same promises with the learner on CUDA."""

from __future__ import annotations

import json

import pytest
import torch
from clusters import SMALL

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and torch sees none"),
]


def test_training_on_cuda_is_on_policy_at_lag_0_and_resumes(start):
    budget = ("--device", "cuda", "--max-policy-lag", "0", "--set", "run.eval_episodes=10", "--json")
    first = start("train", "cartpole", "--actors", "2", "--total-steps", "2000", *budget, *SMALL)
    code, out, err = first.wait()
    assert code == 0, err
    assert json.loads(out)["steps"] >= 2000
    trained = [row for row in first.rows() if "first_ratio_error" in row]
    assert max(row["first_ratio_error"] for row in trained) < 1e-3  # the GPU may multiply in tf32-like orders
    again = start("train", "--resume", "--total-steps", "3000", *budget, run=first.run)
    code, out, err = again.wait()
    assert code == 0, err
    assert json.loads(out)["steps"] >= 3000


def test_forward_on_cuda_equals_numpy():
    import numpy as np

    from rustyrl.spec import ActionSpec, ArraySpec
    from rustyrl.weights import PolicySpec
    from rustyrl_actors.inference import Policy
    from rustyrl_learner.network import ActorCritic, export_weights

    for activation in ("tanh", "relu", "elu", "silu"):
        action = ActionSpec("box", shape=(4,), low=(-1.0,) * 4, high=(1.0,) * 4)
        spec = PolicySpec((ArraySpec("main", (20,), "float32"),), (action,), (64, 64), activation, normalize=False)
        network = ActorCritic(spec, shared=False, initial_log_std=0.0).cuda()
        observation = np.random.default_rng(0).normal(size=(128, 20)).astype(np.float32)
        ours = Policy(export_weights(network, None), 128).forward({"main": observation})
        theirs = network.policy(torch.from_numpy(observation).cuda()).detach().cpu().numpy()
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_a_copy_beside_other_work_is_there_for_who_waits_for_it():
    from rustyrl_learner.device import CopyStream

    device = torch.device("cuda")
    copies = CopyStream(device)
    arrays = {"a": torch.rand(4096, 256).pin_memory(), "b": (torch.rand(1000) < 0.5).pin_memory()}
    room = copies.room(arrays)
    busy = torch.rand(4096, 4096, device=device)
    for _ in range(20):
        arrays["a"].copy_(torch.rand(4096, 256))
        arrays["b"].copy_(torch.rand(1000) < 0.5)
        for _ in range(10):
            busy = busy @ busy / 4096
        copies.wait(copies.copy(arrays, room))
        for name, array in arrays.items():
            assert torch.equal(room[name].clone().cpu(), array)
