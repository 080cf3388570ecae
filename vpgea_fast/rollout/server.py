"""An engine elsewhere: `vpgea serve` (a `vllm serve` with safe settings) on other GPUs or nodes.

    each process posts its share of the requests, token ids in and out, as JSON
    weights: the main process writes safetensors that the server reads, or broadcasts them over NCCL

Each hand-over leaves a mark in the server's workers, which is looked for before and after every
rollout: a server that was started again, or given weights by another run, is noticed. The key in
VLLM_API_KEY goes with every call. Nothing is pickled. A server draws a path to the sum of both
limits before it is cut, since it knows one limit only.
"""

from __future__ import annotations

import functools
import hmac
import http.client
import ipaddress
import json
import math
import os
import queue
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any
from urllib.parse import urlsplit

import torch

from vpgea_fast.config import Config, ConfigError, VllmEngineConfig
from vpgea_fast.distributed import World
from vpgea_fast.rollout.engine import (
    RolloutError,
    Sampling,
    Usage,
    WeightSet,
    check_room,
    not_finite,
    split_path,
)
from vpgea_fast.rollout.vllm import (
    GIB,
    SYNC_SECONDS,
    NcclSender,
    WorkerExtension,
    check_taken,
    copied,
    describe,
    end_with_parent,
    skeleton,
    weights_directory,
    write_weights,
)
from vpgea_fast.types import Finish, Path, SampleRequest

KEY = "VLLM_API_KEY"
"""The environment variable that holds the key, for vLLM and here."""

HEALTH_SECONDS = 10.0
"""Between two looks at a server that owes an answer. A look may take as long: half of it to
connect, half for the answer of /health."""

MISSES = 2
"""Looks in a row without an answer after which a server is lost: at most 40 s."""

CONNECT_SECONDS = 30.0
"""To connect, for any other call: many paths ask at once."""

OURS = (
    *("--host", "--port", "--uds", "--ssl", "--config", "--api-key", "--middleware"),
    *("--worker-extension-cls", "--weight-transfer-config", "--tokens-only", "--no-tokens-only"),
)
"""Options of vLLM that `vpgea serve` sets, or that would take the server out of its sight."""


def is_loopback(host: str) -> bool:
    """
    >>> is_loopback("127.0.0.1"), is_loopback("localhost"), is_loopback("0.0.0.0")
    (True, True, False)
    """
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def read_key() -> str:
    """The key of the environment, empty if there is none. ConfigError, which does not show it, for
    one that a header cannot hold."""
    key = os.environ.get(KEY, "")
    if not key.isascii() or not key.isprintable() or " " in key:
        raise ConfigError(
            f"{KEY}: got a key with a line end, a space or a character beyond ASCII, which a "
            "header cannot hold; use letters and digits, here and where it is served"
        )
    return key


def check_key(host: str) -> None:
    """ConfigError for a host beyond this machine without a key: whoever reaches the server could
    sample from it and change its weights."""
    if not read_key() and not is_loopback(host):
        raise ConfigError(
            f"a server on {host} is reachable from other machines: set {KEY} to a secret, here and "
            "where it is trained, or keep to 127.0.0.1"
        )


Drawn = Future[tuple[Path, int]]
"""A path, and how many tokens of its prompt the server had in its cache."""


def _taken(ended: queue.SimpleQueue[Drawn], seconds: float) -> list[Drawn]:
    """What is there, or comes within `seconds`."""
    found: list[Drawn] = []
    with suppress(queue.Empty):
        found.append(ended.get(timeout=seconds))
        while True:
            found.append(ended.get_nowait())
    return found


class ServerEngine:
    """Rollout engine over a server at `cfg.server`; see `RolloutEngine`.

    path   the model that is served; only its config.json is read here
    files  directory that the server sees too
    """

    def __init__(
        self,
        path: str,
        *,
        cfg: VllmEngineConfig,
        world: World,
        max_batch: int,
        dtype: torch.dtype,
        files: str | None = None,
    ) -> None:
        assert cfg.server is not None
        self.cfg, self.world, self.dtype, self.files = cfg, world, dtype, files
        self.client = _Client(cfg.server)
        self.used, self.complete = Usage(), False
        model = skeleton(path, trust_remote_code=cfg.trust_remote_code)
        self.weights = WeightSet.of(model)
        self.vocabulary = model.get_input_embeddings().weight.shape[0]
        try:
            self.room, self.mark = self._connect(describe(model.config)), ""
        except BaseException:
            self.client.close()
            raise
        self.nccl: NcclSender | None = None
        self.threads = ThreadPoolExecutor(max_workers=max_batch, thread_name_prefix="rollout")

    def _connect(self, here: Mapping[str, Any]) -> int:
        """The positions of the server's model, which must be of the trained one's shape."""
        served = self.client.rpc("describe")[0]
        other = {key: served[key] for key in here if served[key] != here[key]}
        if other:
            wanted = ", ".join(f"{key} {value}" for key, value in other.items())
            expected = ", ".join(f"{key} {here[key]}" for key in other)
            raise ConfigError(
                f"the server at {self.cfg.server} serves another model than model.path: {wanted} "
                f"there, {expected} here; start `vpgea serve` with this model"
            )
        return served["positions"]

    def _check_mark(self) -> None:
        if set(self.client.rpc("marked")) != {self.mark}:
            self.complete = False
            raise RolloutError(
                f"the server at {self.cfg.server} holds other weights than this run gave it: it "
                "was started again, or another run uses it; give each run a server of its own and "
                "go on with --resume: the last checkpoint is good"
            )

    def generate(
        self,
        requests: Sequence[SampleRequest],
        sampling: Sampling,
        on_progress: Callable[[int], None] | None = None,
    ) -> list[Path]:
        """See RolloutEngine. A request that takes longer than `vllm.timeout_s` is given up."""
        self.check(requests, sampling)
        if not self.complete:
            raise ValueError("the rollout model has no whole set of weights: load_weights first")
        self._check_mark()
        keys = [(len(r.prompt_ids), r.prompt_ids.tolist(), r.seed) for r in requests]
        order = sorted(range(len(requests)), key=keys.__getitem__)
        run = f"vpgea-{os.getpid()}-{time.monotonic_ns()}"
        waiting: dict[Drawn, int] = {}
        ended: queue.SimpleQueue[Drawn] = queue.SimpleQueue()
        try:
            for number in order:
                name = f"{run}-{number}"
                work = self.threads.submit(self._draw, name, requests[number], sampling)
                waiting[work] = number
                work.add_done_callback(ended.put)
            paths: dict[int, Path] = {}
            while waiting:
                done = _taken(ended, 0.2)
                for work in done:
                    number = waiting.pop(work)
                    paths[number], cached = work.result()
                    asked = requests[number].prompt_ids.numel()
                    self.used = Usage(
                        self.used.prompt_tokens + asked, self.used.cached_tokens + cached
                    )
                if on_progress is not None:
                    on_progress(len(done))
        except BaseException:
            self._abort(run, waiting)
            raise
        self._check_mark()
        return [paths[number] for number in range(len(requests))]

    def _abort(self, run: str, waiting: Mapping[Drawn, int]) -> None:
        names = [f"{run}-{number}" for work, number in waiting.items() if not work.cancel()]
        try:
            if names and self.client.healthy():
                with suppress(RolloutError):  # what ended the rollout is what is told
                    self.client.post("/inference/v1/abort_requests", {"request_ids": names}, 60.0)
        finally:
            self.client.hang_up()

    def _draw(self, name: str, request: SampleRequest, sampling: Sampling) -> tuple[Path, int]:
        """A path, and how many tokens of its prompt the server had in its cache."""
        body = {
            "request_id": name,
            "token_ids": request.prompt_ids.tolist(),
            "sampling_params": {
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "max_tokens": sampling.limit,
                "seed": request.seed,
                "stop_token_ids": [i for i in sampling.stop_ids if 0 <= i < self.vocabulary],
                "ignore_eos": True,
                "logprobs": 0,
                "detokenize": False,
            },
        }
        none = torch.zeros(0)
        try:
            answer = self.client.draw(body, self.cfg.timeout_s)
        except TimeoutError:
            return split_path(request, none.long(), none, sampling, "error"), 0
        choice = answer["choices"][0]
        ids = torch.tensor(choice["token_ids"] or [], dtype=torch.int64)
        content = (choice["logprobs"] or {}).get("content") or []
        logps = torch.tensor([token["logprob"] for token in content], dtype=torch.float32)
        if ids.numel() != logps.numel():
            raise RolloutError(
                f"the server gave {logps.numel()} log-probs for {ids.numel()} tokens; start it "
                "with `vpgea serve`"
            )
        for step in logps.isnan().nonzero()[:1, 0].tolist():
            raise not_finite(request.question_id, step)
        if sampling.top_p < 1:
            logps.fill_(math.nan)  # they are those of the cut distribution
        usage = answer.get("usage") or {}
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        reasons: dict[str, Finish] = {"stop": "stop", "length": "length"}
        finish = reasons.get(choice["finish_reason"], "error")
        return split_path(request, ids, logps, sampling, finish), cached

    def check(self, requests: Sequence[SampleRequest], sampling: Sampling) -> None:
        """See RolloutEngine."""
        check_room(requests, sampling, self.room, "max_model_len of the server")

    @torch.no_grad()
    def load_weights(self, named: Iterable[tuple[str, torch.Tensor]]) -> None:
        """See RolloutEngine. The main process hands over; all come back when the server has the
        weights. A collective."""
        self.complete = False
        rest = iter(named)
        fitting = self.weights.fitting(rest)
        with self.world.together():
            try:
                if self.world.main:
                    self._hand_over(fitting)
            finally:
                for _ in (*fitting, *rest):
                    pass
        self.mark = self.world.gather(self.mark)[0]
        self.weights.check()
        self.complete = True

    def _hand_over(self, named: Iterator[tuple[str, torch.Tensor]]) -> None:
        self.mark = secrets.token_hex(8)
        if self.cfg.sync == "nccl":
            self.nccl = self.nccl or NcclSender(self.client, self.client.get("/get_world_size"))
            self.client.rpc("set_mark", "")
            self.nccl.send(copied(named, self.dtype))
        else:
            self._leave_files(self.weights.both_names(copied(named, self.dtype, "cpu")))
        if not self.client.post("/reset_prefix_cache", {}, 60.0)["success"]:
            raise RolloutError(
                "the server kept its prefix cache: something is drawing from it during a sync; "
                "give every run a server of its own"
            )
        self.client.rpc("set_mark", self.mark)

    def _leave_files(self, named: Iterator[tuple[str, torch.Tensor]]) -> None:
        with weights_directory(self.files) as directory:
            written = write_weights(named, directory)
            where = str(directory.resolve())
            check_taken(written, self.client.rpc("load_files", where, seconds=SYNC_SECONDS))

    def rest(self) -> None:
        """See RolloutEngine. The server's memory is not the trainer's."""
        self.complete = False

    def usage(self) -> Usage:
        """See RolloutEngine."""
        used, self.used = self.used, Usage()
        return used

    def close(self) -> None:
        """The server goes on: it was not started here."""
        self.complete = False
        self.client.close()
        self.threads.shutdown(wait=True, cancel_futures=True)


def serve_command(
    cfg: Config, host: str, port: int, more: Sequence[str] = ()
) -> tuple[list[str], dict[str, str]]:
    """The `vllm serve` (words, environment) that `ServerEngine` can sample from and hand weights
    to: token ids in and out, log-probs after the temperature, and the key on every route. `more`
    goes to vLLM as it is. ConfigError for an option in it that must be as it is here."""
    for word in more:
        _check_passed(word)
    cuda = torch.cuda.is_available()
    settings = cfg.vllm
    extension = f"{WorkerExtension.__module__}.{WorkerExtension.__name__}"
    # What `vllm serve` runs; that word fails in the CPU build, whose package has another name.
    words = [
        sys.executable,
        "-m",
        "vllm.entrypoints.launchers.api_server.entry",
        "--model",
        cfg.model.path,
    ]
    words += ["--host", host, "--port", str(port), "--tokens-only", "--dtype", cfg.model.dtype]
    words += ["--generation-config", "vllm", "--logprobs-mode", "processed_logprobs"]
    words += ["--enable-prefix-caching", "--enable-prompt-tokens-details"]
    words += ["--disable-uvicorn-access-log"]
    words += ["--worker-extension-cls", extension, "--middleware", f"{__name__}.require_key"]
    words += ["--max-num-seqs", str(cfg.rollout.max_batch), "--seed", str(cfg.run.seed)]
    words += ["--tensor-parallel-size", str(settings.tensor_parallel)]
    words += ["--gpu-memory-utilization", str(settings.gpu_memory)]
    if settings.context is not None:
        words += ["--max-model-len", str(settings.context)]
    if settings.kv_cache_gib is not None or not cuda:
        words += ["--kv-cache-memory-bytes", str(int((settings.kv_cache_gib or 1) * GIB))]
    if settings.trust_remote_code:
        words += ["--trust-remote-code"]
    if settings.sync == "nccl":
        words += ["--weight-transfer-config", '{"backend": "nccl"}']
    if settings.enforce_eager or not cuda:
        words += ["--enforce-eager"]
    overrides: dict[str, Any] = {"head_dtype": "float32"} if settings.fp32_head else {}
    if not cuda:
        overrides["tie_word_embeddings"] = False
        words += ["--block-size", "32", "--no-enable-chunked-prefill"]
        words += ["--max-num-batched-tokens", str(max(settings.context or 0, 4096))]
        words += ["--load-format", "dummy"]  # the files have no head of its own
    if overrides:
        words += ["--hf-overrides", json.dumps(overrides)]
    words += more
    environment = {
        "VLLM_SERVER_DEV_MODE": "1",  # has the routes that take weights
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }
    return words, environment


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
    client = _Client(f"http://[{here}]:{port}" if ":" in here else f"http://{here}:{port}")

    started = subprocess.Popen(
        command,
        env={**os.environ, **environment},
        start_new_session=True,
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


def _address(url: str) -> tuple[bool, str, int]:
    """(https or not, host, port) of `vllm.server`."""
    expected = "expected http://host:port or https://host:port, and no path"
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise ConfigError(f"vllm.server: got {url!r} ({error}); {expected}") from None
    known = parts.scheme in ("http", "https") and parts.hostname
    if not known or parts.path.strip("/") or parts.query:
        raise ConfigError(f"vllm.server: got {url!r}; {expected}")
    secure = parts.scheme == "https"
    return secure, str(parts.hostname), port or (443 if secure else 80)


class _Client:
    """JSON over HTTP with the key; also vLLM's four calls of a weight transfer.

    A server whose machine is gone sends nothing, not even an error. So while an answer is owed,
    /health is looked at; a server that misses MISSES of them is lost, and every call ends.
    """

    def __init__(self, url: str) -> None:
        self.secure, self.host, self.port = _address(url)
        check_key(self.host)
        self.url, self.reached = url, False
        self.owed: set[socket.socket] = set()
        self.silent, self.closed = "", threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def get(self, path: str) -> Any:
        return self._answer("GET", path, None, 60.0)

    def post(self, path: str, body: dict[str, Any], seconds: float) -> Any:
        """The answer. RolloutError for a server that is gone, that refuses, or that has not
        answered after `seconds`."""
        return self._answer("POST", path, body, seconds)

    def draw(self, body: dict[str, Any], seconds: float) -> Any:
        """As `post`, but TimeoutError after `seconds` while the server is well."""
        try:
            return self._call("POST", "/inference/v1/generate", body, seconds)
        except TimeoutError:
            if not self.healthy():
                raise self.lost("no answer") from None
            raise

    def rpc(self, method: str, *args: str, seconds: float = 60.0) -> list[Any]:
        """What each worker answers, with data parallel of the first engine; all are called. See
        WorkerExtension."""
        call = "/collective_rpc"
        answer = self.post(call, {"method": method, "args": args}, seconds)
        if not isinstance(answer, dict) or not answer.get("results"):
            raise self._stranger(call, answer, "one answer of each worker")
        return answer["results"]

    def _stranger(self, path: str, said: object, expected: str) -> RolloutError:
        return RolloutError(
            f"the server at {self.url} answers {path} with {said!r}, expected {expected}; "
            "vllm.server must be the URL of a `vpgea serve`"
        )

    def healthy(self) -> bool:
        try:
            self._call("GET", "/health", None, HEALTH_SECONDS / 2, watched=False)
        except (TimeoutError, RolloutError):
            return False
        return True

    def lost(self, why: str) -> RolloutError:
        if not self.reached:
            return RolloutError(
                f"no rollout server answers at {self.url} ({why}); start one with `vpgea serve`, "
                "or correct vllm.server"
            )
        return RolloutError(
            f"the rollout server at {self.url} is gone ({why}); start it again with `vpgea serve` "
            "and go on with --resume: the last checkpoint is good"
        )

    def hang_up(self) -> None:
        """End the calls that wait for an answer."""
        for waiting in list(self.owed):
            with suppress(OSError):
                waiting.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.closed.set()
        self.hang_up()

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self.post("/init_weight_transfer_engine", {"init_info": init_info}, SYNC_SECONDS)

    def start_weight_update(self) -> None:
        self.post("/start_weight_update", {}, SYNC_SECONDS)

    def update_weights(self, update_info: Any) -> None:
        self.post("/update_weights", {"update_info": update_info}, SYNC_SECONDS)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        body = {} if weight_version is None else {"weight_version": weight_version}
        self.post("/finish_weight_update", body, SYNC_SECONDS)

    def _watch(self) -> None:
        misses = 0
        while not self.closed.wait(HEALTH_SECONDS):
            misses = misses + 1 if self.owed and not self.healthy() else 0
            if misses < MISSES:
                self.silent = ""
            else:
                self.silent = f"{MISSES} calls of /health were not answered"
                self.hang_up()

    def _answer(self, method: str, path: str, body: Any, seconds: float) -> Any:
        try:
            return self._call(method, path, body, seconds)
        except TimeoutError:
            raise RolloutError(
                f"the server at {self.url} has not answered {path} after {seconds:g} s; it hangs, "
                "perhaps in a hand-over that did not end: start it again, and go on with --resume"
            ) from None

    def _call(
        self, method: str, path: str, body: Any, seconds: float, *, watched: bool = True
    ) -> Any:
        headers = {"Content-Type": "application/json"}
        if key := read_key():
            headers["Authorization"] = f"Bearer {key}"
        data = None if body is None else json.dumps(body)
        with self._connected(seconds, watched=watched) as connection:
            try:
                connection.request(method, path, body=data, headers=headers)
                response = connection.getresponse()
                said = response.read()
            except TimeoutError:
                raise
            except (OSError, http.client.HTTPException) as error:
                raise self.lost(self.silent or f"{type(error).__name__}: {error}") from error
        self.reached = True
        if response.status == 401:
            raise RolloutError(f"the server at {self.url} wants another key: set {KEY} as there")
        if response.status >= 400:
            raise RolloutError(
                f"the server at {self.url} refuses {path}: {response.status} "
                f"{said[:400].decode(errors='replace')}; start it with this version's `vpgea serve`"
            )
        try:
            return json.loads(said) if said.strip() else None
        except ValueError:
            raise self._stranger(path, said[:80], "JSON") from None

    @contextmanager
    def _connected(self, seconds: float, *, watched: bool) -> Iterator[http.client.HTTPConnection]:
        """A connection whose answer may take `seconds`."""
        kind = http.client.HTTPSConnection if self.secure else http.client.HTTPConnection
        patience = CONNECT_SECONDS if watched else HEALTH_SECONDS / 2
        connection = kind(self.host, self.port, timeout=patience)
        try:
            connection.connect()
        except TimeoutError:
            raise
        except OSError as error:
            raise self.lost(self.silent or f"{type(error).__name__}: {error}") from error
        opened = connection.sock
        opened.settimeout(seconds)
        if watched:
            self.owed.add(opened)
        try:
            if self.closed.is_set():
                raise self.lost("this side has closed")
            yield connection
        finally:
            self.owed.discard(opened)
            connection.close()
