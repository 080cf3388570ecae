"""The bytes that one device moves in a step (see the package's docstring)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from vpgea_fast.config import Config
from vpgea_fast.estimate.layout import Layout, ModelShape


@dataclass(frozen=True)
class Traffic:
    """Collectives of one kind in one step, and the bytes that one device receives by them.

    `between`: what a node must get from the others, divided by its devices; `inside`: the rest.
    """

    calls: int
    inside: int
    between: int

    @property
    def total(self) -> int:
        return self.inside + self.between


def communication(
    shape: ModelShape,
    cfg: Config,
    *,
    world: int,
    node: int = 8,
    micro_batches: int = 1,
    scoring_batches: int = 0,
    reference_batches: int = 0,
    cuda: bool = True,
) -> dict[str, Traffic]:
    """Count what FSDP2 moves in a step of `micro_batches`, `scoring_batches` and, of the reference
    policy, `reference_batches` per process, with `node` devices per node.

    A micro-batch gathers every block twice (forward, backward), a scoring batch once. Embedding and
    root stay gathered from a scoring batch to the next backward, the head to the last one of the
    step: it is gathered and reduced once. The reference policy gives up what it gathered after each
    pass, of which there is one. The other gradients are reduced every micro-batch, or
    once when they accumulate unsharded. A head that is cut by classes sends rows, not weights.
    Replicas sum their shards once a step. At its end the
    sampling replica is filled, or vLLM's weights are. Of two models each gives up what it gathered
    after a pass, of which it has one to score and one to train, and the engine gets three sets of
    weights a step.
    """
    lay = Layout(shape, cfg, world, cuda)
    if not lay.sharded or world == 1:
        return {}
    # In elements of one process's shard; bytes come in with the dtype of each collective.
    blocks = [lay.local(unit) for unit in shape.blocks]
    head = lay.local(shape.head or shape.embedding)
    ends = [lay.local(shape.root), *([] if shape.tied else [lay.local(shape.embedding)])]
    units = [*blocks, *ends, head]
    # No unit: its rows travel instead, counted below.
    whole_head = [] if lay.by_classes else [head]
    # The head's gradient stays whole until the last micro-batch, so it is always reduced once.
    models, passes = lay.models, 1
    if models > 1:
        passes = models * (1 + bool(scoring_batches))
    reductions = models if lay.whole_gradients else micro_batches
    gathers = [(n, 2 * micro_batches + scoring_batches) for n in blocks]
    # No gather for scoring: what it leaves gathered serves the first micro-batch.
    gathers += [(n, max(passes, micro_batches)) for n in ends] + [(n, passes) for n in whole_head]
    scatters = [(n, reductions) for n in (*blocks, *ends)] + [(n, models) for n in whole_head]
    shards, replicas = lay.shards, cfg.parallel.replicas
    traffic = {
        "all-gather": _ring(gathers, lay.forward, group=shards, node=node),
        "reduce-scatter": _ring(scatters, lay.reduce, group=shards, node=node),
    }
    if reference_batches:
        own = [(n, reference_batches) for n in blocks] + [(n, 1) for n in (*ends, *whole_head)]
        traffic["reference"] = _ring(own, lay.forward, group=shards, node=node)
    if lay.by_classes:
        # Hidden states of all rows to all; their gradient in float32, summed and spread again.
        rows = cfg.train.micro_batch_tokens * shape.hidden
        batches = micro_batches + scoring_batches
        traffic["head rows"] = _ring([(rows, batches)], lay.forward, group=shards, node=node)
        back = _ring([(rows, 2 * micro_batches)], lay.reduce, group=shards, node=node)
        traffic["head gradients"] = back
    # HSDP: gradients are summed over the replicas after each has reduced its own.
    if replicas > 1:
        sums = [(n, models) for n in units]
        traffic["all-reduce"] = _all_reduce(
            sums, lay.reduce, replicas=replicas, stride=shards, node=node
        )
    refresh = "replica refresh" if cfg.samples_itself else "weight sync"
    handed = [(n, 2 * models - 1) for n in units]
    traffic[refresh] = _ring(handed, lay.forward, group=shards, node=node)
    return traffic


def _ring(units: Iterable[tuple[int, int]], size: int, *, group: int, node: int) -> Traffic:
    """Count an all-gather or reduce-scatter over `group` neighbours: (group - 1) shards per call.

    A node takes those of the other nodes once for all its devices.
    """
    if group == 1:
        return Traffic(0, 0, 0)
    calls = moved = 0
    for elements, count in units:
        calls += count
        moved += elements * size * count
    # Ranks are dealt node by node, so a group of `node` or fewer stays inside one.
    here = min(group, node)
    # A node fetches the other nodes' shards once, and its devices share the cost.
    outside = moved * (group - here) // here
    return Traffic(calls, moved * (group - 1) - outside, outside)


def _all_reduce(
    units: Iterable[tuple[int, int]], size: int, *, replicas: int, stride: int, node: int
) -> Traffic:
    """Count the sum of a shard over `replicas` processes that are `stride` apart: a reduce-scatter
    and an all-gather of pieces of 1 / replicas."""
    # Replicas of one shard lie a whole replica apart: with one per node none is a neighbour.
    here = max(1, min(replicas, node // stride))
    calls = moved = 0
    for elements, count in units:
        calls += count
        moved += elements * size * count
    # A ring: (replicas - 1) / replicas of the bytes, once to sum and once to spread the sums.
    total = 2 * moved * (replicas - 1) // replicas
    outside = 2 * moved * (replicas - here) // (replicas * here)
    return Traffic(calls, total - outside, outside)
