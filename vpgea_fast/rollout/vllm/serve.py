"""`vpgea serve`: a `vllm serve` with safe settings, which samples for training runs and takes their
weights."""

from __future__ import annotations

import functools
import hmac
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch

from vpgea_fast.config import Config, ConfigError
from vpgea_fast.rollout.vllm.client import HEALTH_SECONDS, MISSES, Client, read_key
from vpgea_fast.rollout.vllm.lifetime import end_with_parent
from vpgea_fast.rollout.vllm.options import QUIET, as_words, engine_options
from vpgea_fast.rollout.vllm.transfer import EXTENSION

OURS = (
    *("--host", "--port", "--uds", "--ssl", "--config", "--api-key", "--middleware"),
    *("--worker-extension-cls", "--weight-transfer-config", "--tokens-only", "--no-tokens-only"),
)
"""Options of vLLM that `vpgea serve` sets, or that would take the server out of its sight."""


def serve_command(
    cfg: Config, host: str, port: int, more: Sequence[str] = ()
) -> tuple[list[str], dict[str, str]]:
    """The `vllm serve` (words, environment) that `ServerEngine` can sample from and hand weights
    to: token ids in and out, log-probs after the temperature, and the key on every route. `more`
    goes to vLLM as it is. ConfigError for an option in it that must be as it is here."""
    for word in more:
        _check_passed(word)
    cuda = torch.cuda.is_available()
    options = engine_options(
        cfg.vllm,
        path=cfg.model.path,
        dtype=cfg.model.dtype,
        max_batch=cfg.rollout.max_batch,
        context=cfg.vllm.context,
        seed=cfg.run.seed,
        cuda=cuda,
        untied=not cuda,
    )
    options |= {
        "host": host,
        "port": port,
        "tokens_only": True,
        "enable_prompt_tokens_details": True,
        "disable_uvicorn_access_log": True,
        "worker_extension_cls": EXTENSION,
        "middleware": f"{__name__}.{require_key.__name__}",
    }
    if cfg.vllm.sync == "nccl":
        options["weight_transfer_config"] = {"backend": "nccl"}
    # What `vllm serve` runs; that word fails in the CPU build, whose package has another name.
    program = [sys.executable, "-m", "vllm.entrypoints.launchers.api_server.entry"]
    environment = {**QUIET, "VLLM_SERVER_DEV_MODE": "1"}  # has the routes that take weights
    return [*program, *as_words(options), *more], environment


def _check_passed(word: str) -> None:
    """ConfigError for a word behind `--` that vLLM would read as one of OURS. Its parser takes `_`
    for `-`, and any beginning of an option that is the only one to begin so; a nested option
    (`--ssl.x`) begins as its owner does."""
    name = word.partition("=")[0].partition(".")[0].replace("_", "-")
    if len(name) > 2 and name.startswith("--"):
        for ours in OURS:
            if name.startswith(ours) or ours.startswith(name):
                raise ConfigError(
                    f"got {word.partition('=')[0]!r} after --, which can mean {ours}, and `vpgea "
                    "serve` sets that itself; leave it out, use its own option, or spell another "
                    "option of vLLM in full"
                )


def serve(command: Sequence[str], environment: Mapping[str, str], host: str, port: int) -> int:
    """Run a server to its end; its exit status. Its engines, which a killed vLLM would leave behind
    with their memory, end with it, and it ends with this process.

    A vLLM whose engine has died in a call waits for that call for ever. So one that has answered
    /health, or was told to end, and then misses more than MISSES of them is killed.
    """
    here = "127.0.0.1" if host in ("", "0.0.0.0", "::") else host
    client = Client(f"http://[{here}]:{port}" if ":" in here else f"http://{here}:{port}")

    started = subprocess.Popen(
        command,
        env={**os.environ, **environment},
        start_new_session=True,  # so that the group can be killed as one
        preexec_fn=functools.partial(end_with_parent, signal.SIGTERM),
    )
    told = threading.Event()

    def tell(number: int, _: object) -> None:
        told.set()
        started.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, tell)
    status, misses, answered = None, 0, False
    while status is None and misses <= MISSES:
        with suppress(subprocess.TimeoutExpired):
            status = started.wait(HEALTH_SECONDS if answered else 0.5)
        healthy = client.healthy()
        answered = answered or healthy or told.is_set()
        misses = 0 if healthy or not answered else misses + 1
    client.close()
    # Engines are of its group, and outlive a vLLM that was killed.
    with suppress(ProcessLookupError):
        os.killpg(started.pid, signal.SIGKILL)
    status = started.wait()
    return status if status >= 0 else 128 - status


async def require_key(request: Any, go_on: Callable[[Any], Any]) -> Any:
    """The key on every route but /health; vLLM's own check leaves open what changes weights.

    The path is the request line's own: that of `request.url` is built from the Host header, which
    a client may write as `x/health?` (starlette before 1.1 took it).
    """
    from starlette.responses import JSONResponse  # pyright: ignore[reportMissingImports]

    key, given = read_key(), request.headers.get("authorization", "")
    open_ = not key or request.scope["path"] == "/health"
    if open_ or hmac.compare_digest(given.encode(), f"Bearer {key}".encode()):
        return await go_on(request)
    return JSONResponse({"error": "Unauthorized"}, status_code=401)
