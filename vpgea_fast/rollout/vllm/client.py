"""Call a server elsewhere, as JSON over HTTP with a key, and notice when it is gone.

The key in VLLM_API_KEY goes with every call. Nothing is pickled.
"""

from __future__ import annotations

import http.client
import ipaddress
import json
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any
from urllib.parse import urlsplit

from vpgea_fast.config import ConfigError
from vpgea_fast.rollout.engine import RolloutError
from vpgea_fast.rollout.vllm.transfer import SYNC_SECONDS

KEY = "VLLM_API_KEY"
"""The environment variable that holds the key, for vLLM and here."""

HEALTH_SECONDS = 10.0
"""Between two looks at a server that owes an answer. A look may take this long, too: half of it to
connect, half for the answer of /health."""

MISSES = 2
"""Looks in a row without an answer after which a server is lost: at most 40 s."""

CONNECT_SECONDS = 30.0
"""To connect, for any other call: up to rollout.max_batch paths ask at once."""


def is_loopback(host: str) -> bool:
    """Tell whether only this machine can reach `host`.

    >>> is_loopback("127.0.0.1"), is_loopback("localhost"), is_loopback("0.0.0.0")
    (True, True, False)
    """
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        # A name. Others are not resolved: what a resolver says today it need not say tomorrow.
        return host == "localhost"


def read_key() -> str:
    """Read the key from the environment, empty if there is none; refuse one that no header holds.

    The message does not show the key.
    """
    # A line end would end the header, and http.client's own error would print the key.
    key = os.environ.get(KEY, "")
    if not key.isascii() or not key.isprintable() or " " in key:
        raise ConfigError(
            f"{KEY}: got a key with a line end, a space or a character beyond ASCII, which a "
            "header cannot hold; use letters and digits, here and where it is served"
        )
    return key


def check_key(host: str) -> None:
    """Refuse a host beyond this machine without a key."""
    # Whoever reaches the server could sample from it and change its weights.
    if not read_key() and not is_loopback(host):
        raise ConfigError(
            f"a server on {host} is reachable from other machines: set {KEY} to a secret, here and "
            "where it is trained, or keep to 127.0.0.1"
        )


def _address(url: str) -> tuple[bool, str, int]:
    """Split `engine.server` into (https or not, host, port)."""
    expected = "expected http://host:port or https://host:port, and no path"
    try:
        parts = urlsplit(url)
        port = parts.port  # parsed here, not by urlsplit: it raises for "host:x"
    except ValueError as error:
        raise ConfigError(f"engine.server: got {url!r} ({error}); {expected}") from None
    known = parts.scheme in ("http", "https") and parts.hostname
    if not known or parts.path.strip("/") or parts.query:
        raise ConfigError(f"engine.server: got {url!r}; {expected}")
    secure = parts.scheme == "https"
    return secure, str(parts.hostname), port or (443 if secure else 80)


class Client:
    """Sends JSON over HTTP with the key; has also vLLM's four calls of a weight transfer.

    A server whose machine is gone sends nothing, not even an error. So while an answer is due,
    /health is called; a server that misses MISSES in a row is lost, and every call ends.
    """

    def __init__(self, url: str) -> None:
        self.secure, self.host, self.port = _address(url)
        check_key(self.host)
        # `answered` decides what an error advises: to correct the address, or to start it again.
        self.url, self.answered = url, False
        # Sockets that wait for an answer; a thread adds and drops its own, each in one atomic step.
        self.waiting: set[socket.socket] = set()
        self.silence, self.closed = "", threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def get(self, path: str) -> Any:
        return self._answer("GET", path, None, 60.0)

    def post(self, path: str, body: dict[str, Any], seconds: float) -> Any:
        """Return the answer. RolloutError for a server that is gone, that refuses, or that has not
        answered after `seconds`."""
        return self._answer("POST", path, body, seconds)

    def draw(self, body: dict[str, Any], seconds: float) -> Any:
        """Draw one path: as `post`, but TimeoutError after `seconds` while the server is well."""
        try:
            return self._call("POST", "/inference/v1/generate", body, seconds)
        except TimeoutError:
            # A long path costs its question only; a server that is gone ends the run.
            if not self.healthy():
                raise self.lost("no answer") from None
            raise

    def rpc(self, method: str, *args: str, seconds: float = 60.0) -> list[Any]:
        """Call a method of WorkerExtension in all workers; return what each answers.

        With data parallel these are the answers of the first engine.
        """
        # vLLM's route passes strings only, and makes strings of numbers that come back.
        call = "/collective_rpc"
        answer = self.post(call, {"method": method, "args": args}, seconds)
        if not isinstance(answer, dict) or not answer.get("results"):
            raise self._stranger(call, answer, "one answer of each worker")
        return answer["results"]

    def _stranger(self, path: str, said: object, expected: str) -> RolloutError:
        return RolloutError(
            f"the server at {self.url} answers {path} with {said!r}, expected {expected}; "
            "engine.server must be the URL of a `vpgea serve`"
        )

    def healthy(self) -> bool:
        """Call /health, for at most HEALTH_SECONDS."""
        try:
            # Not watched: this call is the watch, and must not wait to be hung up by itself.
            self._call("GET", "/health", None, HEALTH_SECONDS / 2, watched=False)
        except (TimeoutError, RolloutError):
            return False
        return True

    def lost(self, why: str) -> RolloutError:
        """Make the error for a server that does not answer."""
        if not self.answered:
            return RolloutError(
                f"no rollout server answers at {self.url} ({why}); start one with `vpgea serve`, "
                "or correct engine.server"
            )
        return RolloutError(
            f"the rollout server at {self.url} is gone ({why}); start it again with `vpgea serve` "
            "and go on with --resume: the last checkpoint is good"
        )

    def hang_up(self) -> None:
        """End the calls that wait for an answer."""
        # `shutdown`, because `close` would not wake a thread that reads; a copy of the set, because
        # those threads then take their sockets out of it.
        for each in list(self.waiting):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """End all calls and the watching thread; later calls fail."""
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
            misses = misses + 1 if self.waiting and not self.healthy() else 0
            if misses < MISSES:
                self.silence = ""
            else:
                # Before the hang-up: the calls that it ends give this as their reason.
                self.silence = f"{MISSES} calls of /health were not answered"
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
        if key := read_key():  # read anew each time, and never kept or shown
            headers["Authorization"] = f"Bearer {key}"
        data = None if body is None else json.dumps(body)
        with self._connected(seconds, watched=watched) as connection:
            try:
                connection.request(method, path, body=data, headers=headers)
                response = connection.getresponse()
                reply = response.read()
            except TimeoutError:  # an OSError, but the caller decides what lateness means
                raise
            except (OSError, http.client.HTTPException) as error:
                raise self.lost(self.silence or f"{type(error).__name__}: {error}") from error
        self.answered = True
        if response.status == 401:
            raise RolloutError(f"the server at {self.url} wants another key: set {KEY} as there")
        if response.status >= 400:
            raise RolloutError(
                f"the server at {self.url} refuses {path}: {response.status} "
                f"{reply[:400].decode(errors='replace')}; start it with this version's "
                "`vpgea serve`"
            )
        try:
            # /health answers with an empty body.
            return json.loads(reply) if reply.strip() else None
        except ValueError:
            raise self._stranger(path, reply[:80], "JSON") from None

    @contextmanager
    def _connected(self, seconds: float, *, watched: bool) -> Iterator[http.client.HTTPConnection]:
        """Open a connection, whose answer may take `seconds`."""
        kind = http.client.HTTPSConnection if self.secure else http.client.HTTPConnection
        patience = CONNECT_SECONDS if watched else HEALTH_SECONDS / 2
        connection = kind(self.host, self.port, timeout=patience)
        try:
            connection.connect()
        except TimeoutError:
            raise
        except OSError as error:
            raise self.lost(self.silence or f"{type(error).__name__}: {error}") from error
        # The time-out is of one read, but vLLM sends an answer when it is whole, not bit by bit.
        connection.sock.settimeout(seconds)
        end = connection.sock  # http.client may forget it once the answer has begun
        if watched:
            self.waiting.add(end)
        try:
            # Looked at when the socket is in the set: a close before now has not hung it up.
            if self.closed.is_set():
                raise self.lost("this side has closed")
            yield connection
        finally:
            self.waiting.discard(end)
            connection.close()
