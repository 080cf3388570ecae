"""`vpgea serve`: a `vllm serve` with safe settings, which samples for runs and takes weights."""

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
    """Spell the `vllm serve`, as (words, environment), that a `ServerEngine` can use.

    Token ids go in and out, log-probs are those after the temperature, and every route asks for the
    key. `more` goes to vLLM as it is; options in it that must be as they are here are refused.
    """
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
    """Refuse a word behind `--` that vLLM would read as one of OURS.

    Its parser takes `_` for `-`, and an option's beginning where no other begins so; a nested
    option (`--ssl.x`) begins as its owner does.
    """
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
    """Run a server to its end; return its exit status. It ends with this process.

    Its engines, which a killed vLLM would leave behind with their memory, end with it.
    """
    # All addresses of this machine are none to call; loopback is one of them.
    here = "127.0.0.1" if host in ("", "0.0.0.0", "::") else host
    client = Client(f"http://[{here}]:{port}" if ":" in here else f"http://{here}:{port}")

    server = subprocess.Popen(
        command,
        env={**os.environ, **environment},
        start_new_session=True,  # so that the group can be killed as one
        preexec_fn=functools.partial(end_with_parent, signal.SIGTERM),
    )
    ending = threading.Event()

    def end(number: int, _: object) -> None:
        ending.set()
        server.send_signal(number)

    # In a session of its own the server gets no Ctrl-C of the terminal: it is passed on.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    # A vLLM whose engine has died in a call waits for that call for ever. So one that has answered
    # once, or is to end, and then misses more than MISSES looks is killed. Loading has no limit.
    status, misses, answered = None, 0, False
    while status is None and misses <= MISSES:
        with suppress(subprocess.TimeoutExpired):
            status = server.wait(HEALTH_SECONDS if answered else 0.5)
        healthy = client.healthy()
        answered = answered or healthy or ending.is_set()
        misses = 0 if healthy or not answered else misses + 1
    client.close()
    # Engines are of its group, and outlive a vLLM that was killed.
    with suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGKILL)
    status = server.wait()
    return status if status >= 0 else 128 - status


async def require_key(request: Any, go_on: Callable[[Any], Any]) -> Any:
    """Ask for the key on every route but /health; `go_on` answers the request.

    vLLM's own check leaves open the routes that change weights.
    """
    from starlette.responses import JSONResponse  # pyright: ignore[reportMissingImports]

    key, given = read_key(), request.headers.get("authorization", "")
    # The path is the request line's own. That of `request.url` is built from the Host header, which
    # a client may write as `x/health?` (starlette before 1.1 took it).
    open_ = not key or request.scope["path"] == "/health"
    if open_ or hmac.compare_digest(given.encode(), f"Bearer {key}".encode()):
        return await go_on(request)
    return JSONResponse({"error": "Unauthorized"}, status_code=401)
