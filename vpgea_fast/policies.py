"""The policies that a run trains, each with its optimiser; and which rows are whose.

model.path      -> "policy", the reasoning model: one optimiser, its learning rate
posterior.path  -> "posterior", the model behind the teacher's prompt, where an objective draws
                   from one of its own (`Draws.posterior_who`): weights and optimiser of its own
rows            -> by `TrainRow.who` -> a pass of each policy -> in the order of the rows
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from vpgea_fast.checkpoint import Kept
from vpgea_fast.config import Config, ModelConfig, OptimConfig
from vpgea_fast.distributed import World, reshard
from vpgea_fast.model import Policy, load_policy
from vpgea_fast.names import Trained
from vpgea_fast.optim import (
    ApartAdamW,
    Step,
    build_optimizer,
    gradient_norm,
    learning_rate,
    make_steps,
)
from vpgea_fast.packing import RankPlan
from vpgea_fast.passes import Passes
from vpgea_fast.scoring import RowsFn
from vpgea_fast.types import PackedBatch, TrainRow

Forward = Callable[[Policy, PackedBatch, bool], torch.Tensor]
"""(policy, batch, whether it is the policy's last here) -> log-probs of the batch's targets."""


@dataclass(frozen=True)
class Learner:
    """A policy with its optimiser, and the section that says how it steps."""

    policy: Policy
    optimizer: torch.optim.Optimizer
    optim: OptimConfig

    def rate(self, step: int, steps: int) -> float:
        """The learning rate of a step of so many."""
        return learning_rate(self.optim, step, steps)


class Share(NamedTuple):
    """The rows of one policy, their places among all, and their plan over the processes."""

    who: Trained
    places: list[int]
    rows: list[TrainRow]
    plan: list[RankPlan]


class Policies:
    """The learners of a run by name, the policy first."""

    def __init__(self, learners: Mapping[Trained, Learner], passes: Passes) -> None:
        self.learners, self.passes = dict(learners), passes

    def __getitem__(self, who: Trained) -> Learner:
        return self.learners[who]

    @property
    def posterior(self) -> Learner | None:
        """The second policy, where there is one."""
        return self.learners.get("posterior")

    def shares(self, rows: Sequence[TrainRow], *, train: bool = True) -> list[Share]:
        """The rows of each policy that has any, planned for forwards that `train`, or for such
        without gradients. KeyError for a row of none of them."""
        passes = self.passes if train else self.passes.scoring
        # By place and not by row: two paths of a question may be equal.
        places: dict[Trained, list[int]] = {who: [] for who in self.learners}
        for place, row in enumerate(rows):
            places[row.who].append(place)
        shares = []
        # Without rows a policy has no pass. All processes have the same rows, so all leave it out,
        # and none waits for its gathers.
        for who, found in places.items():
            if own := [rows[place] for place in found]:
                shares.append(Share(who, found, own, passes.plan(own)))
        return shares

    def run(
        self,
        forward: Forward,
        rows: Sequence[TrainRow],
        shares: Sequence[Share] | None = None,
    ) -> list[torch.Tensor]:
        """A pass of each policy over its rows; per-token results of every row, in their order. A
        collective."""
        result = [torch.zeros(0, dtype=torch.float64)] * len(rows)
        # One policy after the other: activations of one alone lie beside both models' states.
        for share in self.shares(rows) if shares is None else shares:
            policy = self[share.who].policy
            own = functools.partial(forward, policy)
            found = self.passes(own, share.rows, share.plan)
            for place, values in zip(share.places, found, strict=True):
                result[place] = values
            if self.posterior is not None:
                # Else head, embedding and root of both models stay gathered beside each other.
                reshard(policy)
        return result

    def score(self, forward: Forward, rows: Sequence[TrainRow]) -> list[torch.Tensor]:
        """`run` of a forward without gradients, in batches of train.score_tokens."""
        return self.run(forward, rows, self.shares(rows, train=False))

    def scorer(self, temperature: float) -> RowsFn:
        """The function that gives the log-probs of rows, each under its own policy. It is a
        collective."""

        def score(policy: Policy, batch: PackedBatch, _: bool) -> torch.Tensor:
            return policy.logprob(batch, temperature=temperature)

        return lambda rows: self.score(score, rows)

    def kept(self) -> dict[str, Any]:
        """What a checkpoint holds of them, as its functions take it."""
        own, other = self["policy"], self.posterior
        second = None if other is None else Kept(other.policy, other.optimizer)
        return {"model": own.policy, "optimizer": own.optimizer, "posterior": second}

    def reshard(self) -> None:
        """Give up what forwards have left whole, of every policy. No communication."""
        for learner in self.learners.values():
            reshard(learner.policy)

    def drop_gradients(self) -> None:
        """Free the gradients of every policy, which must be whole: what FSDP has added up and not
        yet reduced it keeps."""
        for learner in self.learners.values():
            learner.optimizer.zero_grad(set_to_none=True)

    def gradient_norm(self) -> float:
        """Norm of the gradients of all policies together. A collective when they are sharded."""
        return math.hypot(*(gradient_norm(it.optimizer) for it in self.learners.values()))

    def update(self, shares: Sequence[Share], step: int, steps: int) -> dict[Trained, float]:
        """Step the policies that have rows, all or none; the norm of each gradient, 0 without rows.

        A norm of one that is not finite leaves every policy bitwise as it was, and so does a policy
        without rows stay.
        """
        # No step without rows: AdamW's momentum moves weights whose gradient is zero, too.
        moved: list[Trained] = [share.who for share in shares]
        # In one call, so that a NaN of one stops both before either has stepped.
        norms = make_steps(
            [
                Step(it.optimizer, it.rate(step, steps), it.optim.max_grad_norm)
                for it in (self[who] for who in moved)
            ]
        )
        found: dict[Trained, float] = dict.fromkeys(self.learners, 0.0)
        return found | dict(zip(moved, norms, strict=True))

    def metrics(self, norms: Mapping[Trained, float], step: int, steps: int) -> dict[str, float]:
        """Learning rate and gradient norm of every policy, 0 where it has none; a second one's with
        its name behind."""
        found = {}
        for who, learner in self.learners.items():
            behind = "" if who == "policy" else f"_{who}"
            # By step: all updates of one rollout have the same rate.
            found[f"lr{behind}"] = learner.rate(step, steps)
            found[f"grad_norm{behind}"] = norms.get(who, 0.0)
        return found


def joined(shares: Sequence[Share]) -> list[RankPlan]:
    """The plan of all rows: each process runs its batches of one policy after those of another."""
    # A plan numbers the rows of its own policy; here they are numbered among all.
    plans = [
        [[[share.places[i] for i in batch] for batch in own] for own in share.plan]
        for share in shares
    ]
    return [[batch for own in ranks for batch in own] for ranks in zip(*plans, strict=True)]


def open_policies(cfg: Config, world: World, passes: Callable[[Policy], Passes]) -> Policies:
    """Load every policy that the objective trains, each with its optimiser; `passes` makes what
    runs rows of models like the first. Errors: ModelError, ValueError as of loading one."""

    trained = cfg.objective.draws().trained

    def learner(model: ModelConfig, optim: OptimConfig, seed: int) -> Learner:
        # The optimiser before any forward: FSDP's parameters are whole copies after one.
        policy = load_policy(model, world, cfg.parallel, backend=cfg.loss.backend)
        optimizer = build_optimizer(
            policy.parameters(), optim, seed=seed, masters=policy.masters, hosted=policy.hosted
        )
        # Others make their states at the first step, and so none for a record.
        if trained and isinstance(optimizer, ApartAdamW) and optimizer.hosted:
            optimizer.reserve()
        return Learner(policy, optimizer, optim)

    learners: dict[Trained, Learner] = {"policy": learner(cfg.model, cfg.optim, cfg.run.seed)}
    if cfg.two_policies:
        optim = replace(cfg.optim, lr=cfg.posterior.lr or cfg.optim.lr)
        # Of its own: equal bits would round both models' weights alike.
        learners["posterior"] = learner(posterior_model(cfg), optim, cfg.run.seed + 1)
    # Of the first alone: `check_models` has refused a second one of other shapes.
    return Policies(learners, passes(learners["policy"].policy))


def posterior_model(cfg: Config) -> ModelConfig:
    """The section `model` of the posterior policy: its weights begin elsewhere, if told so."""
    return replace(cfg.model, path=cfg.posterior.path or cfg.model.path)
