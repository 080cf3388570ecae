"""The engine that a configuration names, over all processes of a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from vpgea_fast.config import Config, ConfigError
from vpgea_fast.distributed import World, pick_device
from vpgea_fast.rollout.engine import RolloutEngine
from vpgea_fast.rollout.parallel import ParallelEngine, check_group
from vpgea_fast.rollout.recorded import Records
from vpgea_fast.rollout.replay import Replay
from vpgea_fast.rollout.vllm.engine import VllmEngine
from vpgea_fast.rollout.vllm.remote import ServerEngine
from vpgea_fast.rollout.vllm.versions import check_dtype, check_installed

SYNC_DIR = "sync"
"""Below run.dir: weights on their way to a server, unless engine.sync_dir says otherwise."""


def check_engine(cfg: Config, processes: int, *, here: bool = True) -> None:
    """Refuse, before anything is loaded, an engine that `processes` cannot run.

    here   the run is planned for this machine: what is installed on it matters
    """
    if cfg.engine.name != "vllm":
        return
    if cfg.colocated:
        check_dtype(getattr(torch, cfg.model.dtype))
        # A child sees one device, and one training process hands weights to it.
        if cfg.vllm.tensor_parallel > 1 and cfg.vllm.process == "own":
            raise ConfigError(
                f"engine.tensor_parallel: got {cfg.vllm.tensor_parallel} with engine.process "
                "'own', which makes an engine for each training process; set 1, or "
                "engine.process 'shared'"
            )
        check_group(cfg.vllm.tensor_parallel, processes)
    elif (cfg.vllm.tensor_parallel, cfg.vllm.process) != (1, "shared"):
        # Accepted in silence, they would look as if the server had them.
        raise ConfigError(
            "engine.server: got a server with engine.tensor_parallel or engine.process, which only "
            "an engine in the training processes has; give them to `vpgea serve`, or leave "
            "engine.server out"
        )
    if cfg.vllm.sync == "nccl" and cfg.colocated:
        raise ConfigError(
            "engine.sync: got 'nccl' without engine.server; it is how a server gets weights: set "
            "'auto', or engine.server"
        )
    if here and cfg.vllm.sync == "nccl" and pick_device(cfg.model.device).type != "cuda":
        raise ConfigError(
            "engine.sync: got 'nccl' without a CUDA device; set 'disk', or train on a GPU"
        )
    # Last, so that a plan which no machine can run is refused with or without vLLM. A server needs
    # vLLM where it runs; here its NCCL communicator is needed, and only by sync 'nccl'.
    if here and (cfg.colocated or cfg.vllm.sync == "nccl"):
        check_installed()


def positions(cfg: Config) -> int:
    """Count the positions that a path of this configuration may need, its prompt included."""
    answer = cfg.rollout.max_answer_tokens
    longest = cfg.rollout.max_new_tokens + answer
    if cfg.eval.data:
        longest = max(longest, cfg.eval.most(answer))
    # One more for the think-close token that an unclosed thought gets before an answer is drawn.
    return cfg.data.max_prompt_tokens + longest + 1


def open_engine(
    cfg: Config,
    world: World,
    *,
    dtype: torch.dtype,
    hf: Callable[[], RolloutEngine],
    records: Records | None = None,
) -> RolloutEngine:
    """Open the engine that `cfg.engine` names. A collective.

    `records` are what `replay` answers from; without them it draws all, as an evaluation does.
    `hf` makes the transformers engine over a module of the caller's. Any other engine must be given
    all weights through `load_weights` before it samples.
    """
    if records is not None:
        engine = Replay(
            hf(),
            records,
            needs_logps=cfg.rollout.importance_cap is not None,
        )
    elif cfg.samples_itself:
        engine = hf()
    elif cfg.vllm.server is not None:
        # Each process connects for itself: one that cannot ends the others, too.
        with world.together():
            engine = ServerEngine(
                cfg.model.path,
                cfg=cfg.vllm,
                world=world,
                max_batch=cfg.rollout.max_batch,
                dtype=dtype,
                files=cfg.vllm.sync_dir or str(Path(cfg.run.dir) / SYNC_DIR),
            )
    else:
        # Not in `together`: with tensor parallel vLLM's start is a collective of its own.
        engine = _vllm(cfg, world, dtype)
    if world.size == 1:
        return engine
    return ParallelEngine(engine, world, group=cfg.processes_per_engine)


def _vllm(cfg: Config, world: World, dtype: torch.dtype) -> RolloutEngine:
    return VllmEngine(
        cfg.model.path,
        max_batch=cfg.rollout.max_batch,
        dtype=dtype,
        device=world.device,
        context=cfg.vllm.context or positions(cfg),
        cfg=cfg.vllm,
        files=cfg.vllm.sync_dir,
        seed=cfg.run.seed,
    )
