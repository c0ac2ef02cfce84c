"""Who has which samples: the parts of the agents, and the samples that all of them have."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from recipes.support import inputs
from recipes.support.arguments import UserError


@dataclass
class FederationArguments:
    """Who the agents are, and how they learn together."""

    agents: int = field(default=10, metadata={"help": "How many agents there are."})
    rounds: int = field(
        default=10,
        metadata={
            "help": "How often all agents train and exchange. What they train in between say the arguments of the "
            "training, such as --num_train_epochs."
        },
    )
    dirichlet: float = field(
        default=0.3,
        metadata={
            "help": "Every class is divided among the agents in proportions that are drawn from a Dirichlet "
            "distribution with this parameter: the smaller, the more do agents differ in their classes. 0: equally."
        },
    )
    shared_samples: int = field(
        default=200,
        metadata={
            "help": "Training samples that no agent trains on; their labels are not looked at. All agents have them, "
            "to agree on outputs. They are put aside if --compare has 'agree'."
        },
    )
    agree_epochs: float = field(
        default=2.0, metadata={"help": "How often an agent reads the shared samples in a round to agree on outputs."}
    )


@dataclass(frozen=True)
class Split:
    """Places of training samples.

    Attributes:
        parts: those of every agent.
        shared: those that all agents have, without labels.
    """

    parts: list[list[int]]
    shared: list[int]


def split(classes: Sequence[int], args: FederationArguments, shared: bool, seed: int) -> Split:
    """Divides training samples among agents: by class, in proportions from a Dirichlet distribution.

    So Yurochkin et al. 2019 (https://arxiv.org/abs/1905.12022), and the benchmarks of Li et al. 2022
    (https://arxiv.org/abs/2102.02079).

    Args:
        classes: of all samples.
        args: how many agents, how unequal, and how many samples all of them have.
        shared: whether those are put aside.
        seed: draws it all.

    Raises:
        UserError: there are fewer samples than agents, or an agent has none.
    """
    order = np.random.default_rng(seed).permutation(len(classes))
    aside, rest = np.split(order, [args.shared_samples if shared else 0])
    if len(rest) < args.agents:
        among = f", {len(aside)} of which are put aside as shared ones" if len(aside) else ""
        raise UserError(
            f"agents: there are {args.agents}, more than the training samples ({len(classes)}{among}) can be divided "
            "among; lower --agents or take more samples"
        )
    parts: list[list[int]] = [[] for _ in range(args.agents)]
    rng = np.random.default_rng([seed, 1])
    of_class = np.asarray(classes)[rest]
    dealt = 0
    for number in np.unique(of_class):
        own = rest[of_class == number]
        if args.dirichlet:
            shares = rng.dirichlet([args.dirichlet] * args.agents)
            cuts = (np.cumsum(shares)[:-1] * len(own)).round().astype(int)
            pieces = np.split(own, cuts)
        else:
            # Dealt out in turn, and on from there with the next class, so that sizes differ by one at most.
            pieces = [own[(agent - dealt) % args.agents :: args.agents] for agent in range(args.agents)]
            dealt += len(own)
        for part, piece in zip(parts, pieces):
            part += piece.tolist()
    empty = [agent for agent, part in enumerate(parts) if not part]
    if empty:
        raise UserError(
            f"dirichlet: with {args.dirichlet} and seed {seed} agent {empty[0]} of {args.agents} has no samples; raise "
            "--dirichlet, lower --agents, or take another seed"
        )
    return Split([sorted(part) for part in parts], sorted(aside.tolist()))


def check_split(args: FederationArguments) -> None:
    """Raises a UserError for what shows without data."""
    inputs.check_counts(args, "agents", "rounds", "shared_samples")
    if args.agents < 2:
        raise UserError("agents is 1; at least two exchange something")
    if not 0 <= args.dirichlet < math.inf:
        raise UserError(f"dirichlet is {args.dirichlet}; it must be above 0, or 0 to divide classes equally")
    if not args.agree_epochs > 0:
        raise UserError(f"agree_epochs is {args.agree_epochs}; it must be above 0")
