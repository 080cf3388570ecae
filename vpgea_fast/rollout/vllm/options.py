"""Spell vLLM's options once, those of its start and those of each path.

An engine here takes them as arguments of `LLM(...)`, `vpgea serve` as words of a command line.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from vpgea_fast.config import VllmEngineConfig
from vpgea_fast.rollout.engine import Sampling
from vpgea_fast.types import Finish, SampleRequest

GIB = 2**30

QUIET = {"VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
"""Environment of every vLLM: it sends nothing home, and binds no thread to a core."""


def engine_options(
    cfg: VllmEngineConfig,
    *,
    path: str,
    dtype: str,
    max_batch: int,
    context: int | None,
    seed: int,
    cuda: bool,
    untied: bool,
) -> dict[str, Any]:
    """Name vLLM's engine arguments; those that would repeat its defaults are left out.

    untied   a tied head gets a weight of its own. The files of the model lack one, so vLLM starts
             with weights that mean nothing
    """
    options: dict[str, Any] = {
        "model": path,
        "dtype": dtype,
        "generation_config": "vllm",  # the model's own would change temperature and top_p
        "logprobs_mode": "processed_logprobs",  # after the temperature
        "enable_prefix_caching": True,
        "max_num_seqs": max_batch,
        "seed": seed,
        "tensor_parallel_size": cfg.tensor_parallel,
        "gpu_memory_utilization": cfg.gpu_memory,
    }
    overrides: dict[str, Any] = {"head_dtype": "float32"} if cfg.fp32_head else {}
    if context is not None:
        options["max_model_len"] = context
    if cfg.trust_remote_code:
        options["trust_remote_code"] = True
    if cfg.kv_cache_gib is not None or not cuda:
        options["kv_cache_memory_bytes"] = int((cfg.kv_cache_gib or 1) * GIB)
    if cfg.enforce_eager or not cuda:
        options["enforce_eager"] = True
    if not cuda:
        options["block_size"] = 32
        # vLLM turns a seeded generator back after half a prompt, which a CPU's cannot do. So a
        # prompt is one piece, and a batch must have room for the longest.
        options["enable_chunked_prefill"] = False
        options["max_num_batched_tokens"] = max(context or 0, max_batch, 4096)
    if untied:
        overrides["tie_word_embeddings"] = False
        options["load_format"] = "dummy"
    if overrides:
        options["hf_overrides"] = overrides
    return options


def as_words(options: Mapping[str, Any]) -> list[str]:
    """Write engine arguments as words of vLLM's command line.

    >>> as_words({"max_num_seqs": 4, "enforce_eager": True, "enable_chunked_prefill": False})
    ['--max-num-seqs', '4', '--enforce-eager', '--no-enable-chunked-prefill']
    """
    words: list[str] = []
    for name, value in options.items():
        option = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{option}" if value else f"--no-{option}")
        else:
            words += [f"--{option}", json.dumps(value) if isinstance(value, dict) else str(value)]
    return words


def sampling_params(request: SampleRequest, sampling: Sampling, vocabulary: int) -> dict[str, Any]:
    """Name the arguments of vLLM's SamplingParams for one path."""
    return {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "max_tokens": sampling.limit,
        "seed": request.seed,
        # vLLM refuses an id that the model has no logit for; none is drawn either.
        "stop_token_ids": [i for i in sampling.stop_ids if 0 <= i < vocabulary],
        "ignore_eos": True,  # the ids above are all that ends a path
        "logprobs": 0,
        "detokenize": False,
    }


def finish_of(reason: str | None) -> Finish:
    """Translate vLLM's reason for the end of a path; what is neither of two is an error."""
    reasons: dict[str | None, Finish] = {"stop": "stop", "length": "length"}
    return reasons.get(reason, "error")


@contextmanager
def environment(process: str, device: torch.device) -> Iterator[None]:
    """Set what vLLM reads from the environment while it starts; undo what it changes in torch."""
    own = process == "own"
    variables = {"VLLM_ENABLE_V1_MULTIPROCESSING": str(int(own))}
    if own:
        # CUDA handles are no plain data; they go through the pipe to the child and nowhere else.
        # Both ends must agree for as long as they talk, so this one stays.
        os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
    if own and device.type == "cuda":
        torch.cuda.empty_cache()  # the child asks for gpu_memory that is free
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        index = device.index or 0
        variables["CUDA_VISIBLE_DEVICES"] = visible.split(",")[index] if visible else str(index)
    # Its information is hundreds of lines; on a CPU its warnings are dozens, none of use here.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR" if device.type == "cpu" else "WARNING")
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    before = {name: os.environ.get(name) for name in variables}
    set_num_threads = torch.set_num_threads
    os.environ.update(variables)
    try:
        with warnings.catch_warnings(action="ignore"):  # of its own imports
            yield
    finally:
        torch.set_num_threads = set_num_threads  # its CPU worker turns it off
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
