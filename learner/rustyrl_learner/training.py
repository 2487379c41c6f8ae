"""What training goes on from: networks, optimiser, normaliser and the state of the shuffles."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from rustyrl.config import Config
from rustyrl.errors import UsageError
from rustyrl.spec import EnvironmentSpec
from rustyrl.weights import PolicySpec, encode_weights, read_policy
from rustyrl_learner.checkpoint import optimizer_tensors, restore_optimizer
from rustyrl_learner.network import ActorCritic, export_weights, import_weights
from rustyrl_learner.normalizer import ObservationNormalizer

__all__ = ["Training"]


class Training:
    """The learner's changing parts, which a checkpoint holds whole."""

    def __init__(self, config: Config, spec: EnvironmentSpec, device: torch.device) -> None:
        torch.manual_seed(config.run.seed)
        self.shuffle = torch.Generator().manual_seed(config.run.seed)
        policy = PolicySpec(
            observation=spec.observation,
            action=spec.action,
            hidden=config.policy.hidden,
            activation=config.policy.activation,
            normalize=config.policy.normalize,
            observation_clip=config.policy.observation_clip,
            box=config.policy.box,
        )
        shared = config.policy.trunk == "shared"
        network = ActorCritic(policy, shared=shared, initial_log_std=config.policy.initial_log_std)
        self.network = network.to(device)
        self.normalizer: ObservationNormalizer | None = None
        if config.policy.normalize:
            self.normalizer = ObservationNormalizer(spec.observation_width, config.policy.observation_clip, device)
        self.optimizer = torch.optim.Adam(
            self.network.parameters(), lr=config.ppo.learning_rate, eps=config.ppo.adam_epsilon, fused=True
        )

    @property
    def warming_up(self) -> bool:
        """Whether the normaliser has seen nothing yet, so that the next batch only initialises it."""
        return self.normalizer is not None and self.normalizer.count == 0

    def weights(self) -> bytes:
        """The policy as actors, checkpoints and games read it."""
        return encode_weights(export_weights(self.network, self.normalizer))

    def state(self) -> dict[str, Tensor]:
        """Every tensor by name; not copies."""
        tensors: dict[str, Tensor] = {f"network.{name}": t for name, t in self.network.state_dict().items()}
        tensors |= optimizer_tensors(self.optimizer)
        tensors["shuffle"] = self.shuffle.get_state()
        if self.normalizer is not None:
            tensors["normalizer.mean"] = self.normalizer.mean
            tensors["normalizer.variance"] = self.normalizer.variance
            tensors["normalizer.count"] = torch.tensor([self.normalizer.count], dtype=torch.float64)
        return tensors

    def set_state(self, tensors: dict[str, Tensor]) -> None:
        """Put back what `state` gave; raises `RuntimeError` if the networks are others."""
        network = {name.removeprefix("network."): t for name, t in tensors.items() if name.startswith("network.")}
        self.network.load_state_dict(network)
        restore_optimizer(self.optimizer, tensors)
        self.shuffle.set_state(tensors["shuffle"])
        if self.normalizer is not None and "normalizer.mean" in tensors:
            arrays = {name: t.cpu().numpy() for name, t in tensors.items() if name.startswith("normalizer.")}
            self.normalizer.set_arrays(arrays)

    def start_from(self, path: Path) -> None:
        """Take weights and normaliser of a policy file; the critic and the optimiser start anew."""
        try:
            import_weights(read_policy(path), self.network, self.normalizer)
        except ValueError as error:
            raise UsageError(f"cannot start from {path}: {error}") from None

    @contextmanager
    def whole_or_undone(self) -> Iterator[None]:
        """Put everything back as it was if the block is left by an exception."""
        before = {name: tensor.clone() for name, tensor in self.state().items()}
        try:
            yield
        except BaseException:
            self.set_state(before)
            raise
