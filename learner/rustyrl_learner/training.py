"""What training goes on from: networks, optimiser, statistics and the state of the shuffles."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from rustyrl.config import Config
from rustyrl.errors import UsageError
from rustyrl.spec import EnvironmentSpec
from rustyrl.weights import encode_weights, policy_spec, read_policy
from rustyrl_learner.adam import Adam
from rustyrl_learner.device import Threads, share_threads
from rustyrl_learner.graphs import EpochGraphs
from rustyrl_learner.network import ActorCritic, export_weights, import_weights
from rustyrl_learner.normalizer import ObservationNormalizer, RewardNormalizer, ValueNormalizer

__all__ = ["Training"]

VALUE_WINDOW = 10  # batches that the value normaliser remembers: targets move as the policy improves


class Training:
    """The learner's changing parts, which a checkpoint holds whole."""

    def __init__(self, config: Config, spec: EnvironmentSpec, device: torch.device) -> None:
        torch.manual_seed(config.run.seed)
        self.shuffle = torch.Generator().manual_seed(config.run.seed)
        policy = policy_spec(config.policy, spec)
        shared = config.policy.trunk == "shared"
        threads = Threads()
        if device.type == "cpu":
            activations = [*[policy.activation] * len(policy.hidden), "identity"]
            threads = share_threads(config.run.threads, shared=shared, activations=activations)
        if device.type == "cuda":
            torch.set_float32_matmul_precision("high" if config.run.tf32 else "highest")
        network = ActorCritic(
            policy,
            shared=shared,
            initial_log_std=config.policy.initial_log_std,
            lanes=threads.lanes,
            compiled=threads.of if threads.compiled else 0,
        )
        self.threads = asdict(threads)
        self.network = network.to(device)
        self.normalizer: ObservationNormalizer | None = None
        if config.policy.normalize:
            self.normalizer = ObservationNormalizer(spec.observation_width, config.policy.observation_clip, device)
        slots = spec.slots * config.batch.worlds
        self.rewards: RewardNormalizer | None = None
        if config.ppo.normalize_reward:
            self.rewards = RewardNormalizer(slots, config.ppo.reward_clip, device)
        self.values: ValueNormalizer | None = None
        if config.ppo.normalize_value:
            self.values = ValueNormalizer(VALUE_WINDOW * slots * config.batch.unroll_length, device)
        parameters, gradient = self.network.flat()
        deviations = 0 if self.network.log_std is None else self.network.log_std.numel()
        self.optimizer = Adam(
            parameters.tensor,
            gradient.tensor,
            epsilon=config.ppo.adam_epsilon,
            decay=config.ppo.weight_decay if config.ppo.optimizer == "adamw" else 0.0,
            kept=deviations,  # deviations that decay would draw every policy to the same width
        )
        self.graphs: EpochGraphs | None = None
        if device.type == "cuda" and config.run.cuda_graphs:
            self.graphs = EpochGraphs(self.network, self.optimizer)

    @property
    def warming_up(self) -> bool:
        """Whether the normaliser has seen nothing yet, so that the next batch only initialises it."""
        return self.normalizer is not None and self.normalizer.statistics.count == 0

    def weights(self) -> bytes:
        """The policy as actors, checkpoints and games read it."""
        return encode_weights(export_weights(self.network, self.normalizer))

    def state(self) -> dict[str, Tensor]:
        """Every tensor by name; not copies."""
        return {f"network.{name}": t for name, t in self.network.state_dict().items()} | self._beside_network()

    def _beside_network(self) -> dict[str, Tensor]:
        tensors = self.optimizer.tensors()
        tensors["shuffle"] = self.shuffle.get_state()
        if self.normalizer is not None:
            tensors |= self.normalizer.statistics.tensors("normalizer")
        if self.rewards is not None:
            tensors |= {**self.rewards.statistics.tensors("rewards"), "rewards.carried": self.rewards.carried}
        if self.values is not None:
            tensors |= self.values.statistics.tensors("values")
        return tensors

    def set_state(self, tensors: dict[str, Tensor]) -> None:
        """Put back what `state` gave; raises `RuntimeError` if the networks are others."""
        network = {name.removeprefix("network."): t for name, t in tensors.items() if name.startswith("network.")}
        self.network.load_state_dict(network)
        self._set_beside_network(tensors)

    def _set_beside_network(self, tensors: dict[str, Tensor]) -> None:
        self.optimizer.set_tensors(tensors)
        self.shuffle.set_state(tensors["shuffle"])
        if self.normalizer is not None and "normalizer.mean" in tensors:
            self.normalizer.statistics.set_tensors("normalizer", tensors)
        if self.rewards is not None and "rewards.mean" in tensors:
            self.rewards.statistics.set_tensors("rewards", tensors)
            carried = tensors["rewards.carried"].to(self.rewards.carried)
            if carried.shape == self.rewards.carried.shape:  # else batch.worlds is another and all of them begin anew
                self.rewards.carried = carried
        if "values.mean" in tensors:
            values = self.values or ValueNormalizer(1, torch.device("cpu"))
            values.statistics.set_tensors("values", tensors)
            if self.values is None:  # it was switched off: the critic is to speak in the units of the rewards again
                values.leave(*self.network.value_head)

    def start_from(self, path: Path) -> None:
        """Take weights and normaliser of a policy file; the critic and the optimiser start anew."""
        try:
            import_weights(read_policy(path), self.network, self.normalizer)
        except ValueError as error:
            raise UsageError(f"cannot start from {path}: {error}") from None

    def check_finite(self) -> None:
        """Raise `FloatingPointError` naming the first tensor that an update left with numbers that are not finite.

        The optimiser's moments come from gradients that were checked, and are looked at when a checkpoint is written.
        """
        changed = [self.network.flat()[0].tensor]
        if self.normalizer is not None:
            changed += [self.normalizer.statistics.mean, self.normalizer.statistics.variance]
        if torch.stack([tensor.sum(dtype=torch.float64) for tensor in changed]).sum().isfinite():
            return
        for name, tensor in self.state().items():  # or finite numbers whose sum is not
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise FloatingPointError(f"tensor {name} is not finite")

    @contextmanager
    def whole_or_undone(self) -> Iterator[None]:
        """Put everything back as it was if the block is left by an exception."""
        parameters = self.network.flat()[0].tensor  # of which all of the network's are views
        copied, before = parameters.clone(), {name: tensor.clone() for name, tensor in self._beside_network().items()}
        try:
            yield
        except BaseException:
            parameters.copy_(copied)
            self._set_beside_network(before)
            raise
