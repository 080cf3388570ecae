"""The engine that a configuration names, over all processes of a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from vpgea_fast.config import Config, ConfigError
from vpgea_fast.distributed import World, pick_device
from vpgea_fast.rollout import vllm
from vpgea_fast.rollout.engine import RolloutEngine
from vpgea_fast.rollout.parallel import ParallelEngine, check_group
from vpgea_fast.rollout.server import ServerEngine

SYNC_DIR = "sync"
"""Below run.dir: weights on their way to a server, unless vllm.sync_dir says otherwise."""


def check_engine(cfg: Config, processes: int, *, here: bool = True) -> None:
    """ConfigError, before anything is loaded, for an engine that `processes` cannot run. A server
    needs vLLM where it runs, and here only to send weights over NCCL; what is installed on this
    machine does not matter to a run that is not planned for `here`."""
    if cfg.rollout.engine != "vllm":
        if cfg.vllm.server is not None:
            raise ConfigError(
                f"vllm.server: got {cfg.vllm.server!r} with rollout.engine "
                f"{cfg.rollout.engine!r}, which would draw here and not ask it; set rollout.engine "
                "'vllm', or vllm.server null"
            )
        return
    if cfg.colocated:
        vllm.check_dtype(getattr(torch, cfg.model.dtype))
        if cfg.vllm.tensor_parallel > 1 and cfg.vllm.process == "own":
            raise ConfigError(
                f"vllm.tensor_parallel: got {cfg.vllm.tensor_parallel} with vllm.process 'own', "
                "which makes an engine for each training process; set 1, or vllm.process 'shared'"
            )
        check_group(cfg.vllm.tensor_parallel, processes)
    elif (cfg.vllm.tensor_parallel, cfg.vllm.process) != (1, "shared"):
        raise ConfigError(
            "vllm.server: got a server with vllm.tensor_parallel or vllm.process, which are of "
            "engines here; give them to `vpgea serve`, or leave vllm.server out"
        )
    if cfg.vllm.sync == "nccl" and cfg.colocated:
        raise ConfigError(
            "vllm.sync: got 'nccl' without vllm.server; it is how a server gets weights: set "
            "'auto', or vllm.server"
        )
    if here and cfg.vllm.sync == "nccl" and pick_device(cfg.model.device).type != "cuda":
        raise ConfigError(
            "vllm.sync: got 'nccl' without a CUDA device; set 'disk', or train on a GPU"
        )
    if here and (cfg.colocated or cfg.vllm.sync == "nccl"):
        vllm.check_installed()


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
    if cfg.rollout.engine == "hf":
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
    return vllm.VllmEngine(
        cfg.model.path,
        max_batch=cfg.rollout.max_batch,
        dtype=dtype,
        device=world.device,
        context=cfg.vllm.context or positions(cfg),
        cfg=cfg.vllm,
        files=cfg.vllm.sync_dir,
        seed=cfg.run.seed,
    )
