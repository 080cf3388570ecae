"""The engine that a configuration names, over all processes of a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from vpgea_fast.config import Config, ConfigError
from vpgea_fast.distributed import World, pick_device
from vpgea_fast.rollout.engine import RolloutEngine
from vpgea_fast.rollout.parallel import ParallelEngine, check_group
from vpgea_fast.rollout.vllm.engine import VllmEngine
from vpgea_fast.rollout.vllm.remote import ServerEngine
from vpgea_fast.rollout.vllm.versions import check_dtype, check_installed

SYNC_DIR = "sync"
"""Below run.dir: weights on their way to a server, unless engine.sync_dir says otherwise."""


def check_engine(cfg: Config, processes: int, *, here: bool = True) -> None:
    """ConfigError, before anything is loaded, for an engine that `processes` cannot run. A server
    needs vLLM where it runs, and here only to send weights over NCCL; what is installed on this
    machine does not matter to a run that is not planned for `here`."""
    if cfg.engine.name != "vllm":
        return
    if cfg.colocated:
        check_dtype(getattr(torch, cfg.model.dtype))
        if cfg.vllm.tensor_parallel > 1 and cfg.vllm.process == "own":
            raise ConfigError(
                f"engine.tensor_parallel: got {cfg.vllm.tensor_parallel} with engine.process "
                "'own', which makes an engine for each training process; set 1, or "
                "engine.process 'shared'"
            )
        check_group(cfg.vllm.tensor_parallel, processes)
    elif (cfg.vllm.tensor_parallel, cfg.vllm.process) != (1, "shared"):
        raise ConfigError(
            "engine.server: got a server with engine.tensor_parallel or engine.process, which are "
            "of engines here; give them to `vpgea serve`, or leave engine.server out"
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
    if here and (cfg.colocated or cfg.vllm.sync == "nccl"):
        check_installed()


def positions(cfg: Config) -> int:
    """Positions that a path of this configuration may need, its prompt included. One is for the
    think-close token that a thought which is not closed gets before an answer."""
    longest = cfg.rollout.max_new_tokens
    if cfg.eval.data:
        longest = max(longest, cfg.eval.max_new_tokens)
    return cfg.data.max_prompt_tokens + longest + cfg.rollout.max_answer_tokens + 1


def open_engine(
    cfg: Config, world: World, *, dtype: torch.dtype, hf: Callable[[], RolloutEngine]
) -> RolloutEngine:
    """`hf` makes the transformers engine, which samples with a module of the caller's; any other
    is given all its weights through `load_weights` before it samples. A collective."""
    group = 1
    if cfg.engine.name == "hf":
        engine = hf()
    elif cfg.vllm.server is not None:
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
        engine, group = _vllm(cfg, world, dtype), cfg.vllm.tensor_parallel
    return ParallelEngine(engine, world, group=group) if world.size > 1 else engine


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
