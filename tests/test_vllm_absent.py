"""What a machine without vLLM, or with another one than this project knows, is told."""

import http.server
import re
import socket
import threading
from pathlib import Path

import pytest
import torch

from vpgea_fast.cli import main
from vpgea_fast.config import ConfigError, VllmEngineConfig
from vpgea_fast.distributed import World
from vpgea_fast.rollout.engine import RolloutError
from vpgea_fast.rollout.vllm import versions
from vpgea_fast.rollout.vllm.engine import VllmEngine
from vpgea_fast.rollout.vllm.remote import ServerEngine


@pytest.fixture(params=["run", "dry run"])
def refused(request, tiny_words, tmp_path, capsys):
    """What a run with vLLM, or a dry run, ends with: `refused("--engine.tensor_parallel", "2")`."""

    def say(*more):
        words = tiny_words({"engine.name": "vllm"})("run", *more)
        dry = ["--dry-run"] * (request.param == "dry run")
        assert main(["train", "configs/tiny.yaml", *words, *dry]) == 2
        assert not list(tmp_path.iterdir())
        return capsys.readouterr().err

    return say


def test_without_vllm_the_error_names_the_extra_and_the_other_engine(refused, monkeypatch):
    monkeypatch.setattr(versions, "find_spec", lambda _: None)
    said = refused()
    assert "vpgea_fast[vllm]" in said
    assert "set engine.name 'hf'" in said


def test_another_vllm_is_refused_with_the_table(refused, monkeypatch):
    monkeypatch.setattr(versions, "find_spec", lambda _: True)
    monkeypatch.setattr(versions, "FITS", {"0.1": ("1.0", "4.0", "4.1")})
    assert "expected vllm 0.1.x with torch 1.0.x and transformers 4.0 to below 4.1" in refused()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["--engine.tensor_parallel", "2"],
            "engine.tensor_parallel: got 2, expected a divisor of the 1 processes",
        ),
        (
            ["--engine.tensor_parallel", "2", "--engine.process", "own"],
            "engine.tensor_parallel: got 2 with engine.process 'own'",
        ),
        (["--model.dtype", "float64"], "float32, bfloat16 or float16, got torch.float64"),
    ],
)
def test_what_no_vllm_can_do_is_refused_with_or_without_it(words, said, refused):
    assert said in refused(*words)


FITTING = {"vllm": "0.32.0", "torch": "2.13.0+cpu", "transformers": "5.19.0"}


@pytest.mark.parametrize(
    "found",
    [
        FITTING,
        {**FITTING, "transformers": "5.16.1"},
        {**FITTING, "vllm": "0.32.1+cu130", "torch": "2.13.1"},
    ],
)
def test_versions_that_fit(found):
    versions.check_versions(found)


@pytest.mark.parametrize(
    "change",
    [
        {"vllm": "0.33.0"},
        {"torch": "2.11.0"},
        {"torch": "2.130.0"},
        {"transformers": "5.20.0"},
        {"transformers": "5.16.0"},
    ],
)
def test_versions_that_do_not_fit_are_shown_beside_those_that_do(change):
    with pytest.raises(ConfigError, match=r"fit together: .*expected vllm 0\.32\.x with torch"):
        versions.check_versions({**FITTING, **change})


def test_a_build_without_metadata_does_not_pass_as_any_version():
    with pytest.raises(ConfigError, match="do not fit together"):
        versions.check_versions({"torch": "2.13.0", "transformers": "5.19.0"})


def test_a_server_beyond_this_machine_needs_a_key(monkeypatch, capsys):
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    assert main(["serve", "some/model", "--host", "0.0.0.0", "--print"]) == 2
    assert "set VLLM_API_KEY to a secret" in capsys.readouterr().err
    assert main(["serve", "some/model", "--print"]) == 0
    command = capsys.readouterr().out
    assert "--host 127.0.0.1" in command
    assert "--middleware vpgea_fast.rollout.vllm.serve.require_key" in command
    assert "trust-remote-code" not in command


@pytest.mark.parametrize("key", ["abc\n", "a b", "k\u00e9y"])
def test_a_key_that_no_header_can_hold_is_refused_and_not_shown(key, monkeypatch, capsys):
    monkeypatch.setenv("VLLM_API_KEY", key)
    assert main(["serve", "some/model", "--print"]) == 2
    said = capsys.readouterr().err
    assert "VLLM_API_KEY: got a key with a line end, a space" in said
    assert key.strip() not in said


def test_an_empty_key_is_none(monkeypatch, capsys):
    monkeypatch.setenv("VLLM_API_KEY", "")
    assert main(["serve", "some/model", "--host", "0.0.0.0", "--print"]) == 2
    assert "set VLLM_API_KEY to a secret" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("http://127.0.0.1:99999", "Port out of range"),
        ("http://127.0.0.1:8000/v1", "and no path"),
        ("ftp://127.0.0.1:8000", "expected http"),
        ("127.0.0.1:8000", "expected http"),
        ("http://", "expected http"),
    ],
)
def test_a_url_that_is_none(url, said, connect):
    with pytest.raises(ConfigError, match=rf"engine\.server: got .*{said}"):
        connect(url)


@pytest.fixture
def connect(random_qwen2, tmp_path):
    def make(url):
        random_qwen2().config.save_pretrained(tmp_path)
        return ServerEngine(
            str(tmp_path),
            cfg=VllmEngineConfig(server=url),
            world=World(torch.device("cpu")),
            max_batch=4,
            dtype=torch.float32,
        )

    return make


def test_a_server_that_is_not_there(connect):
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        with pytest.raises(RolloutError, match=f"no rollout server answers at {url}.*vpgea serve"):
            connect(url)


@pytest.mark.parametrize(
    ("status", "body", "said"),
    [
        (200, b"<html>hello</html>", r"with b'<html>hello</html>', expected JSON"),
        (200, b'{"data": []}', "with .*, expected one answer of each worker"),
        (200, b"", "with None, expected one answer of each worker"),
        (404, b'{"detail": "Not Found"}', "refuses /collective_rpc: 404.*start it with"),
    ],
)
def test_a_server_that_is_something_else(status, body, said, connect):
    class Other(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Other) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        try:
            with pytest.raises(RolloutError, match=said):
                connect(f"http://127.0.0.1:{other.server_address[1]}")
        finally:
            other.shutdown()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--engine.sync", "nccl"], "engine.sync: got 'nccl' without engine.server"),
        (
            ["--engine.sync", "nccl", "--engine.server", "http://127.0.0.1:8000"],
            "engine.sync: got 'nccl' without a CUDA device",
        ),
        (
            ["--engine.tensor_parallel", "2", "--engine.server", "http://127.0.0.1:8000"],
            "which only an engine in the training processes has; give them to `vpgea serve`",
        ),
    ],
)
def test_settings_that_a_server_or_its_absence_makes_void(words, said, tiny_words, capsys):
    words = tiny_words({"engine.name": "vllm", "model.device": "cpu"})("run", *words)
    assert main(["train", "configs/tiny.yaml", *words]) == 2
    assert said in capsys.readouterr().err


def test_every_extra_with_a_server_bounds_its_starlette():
    """Before 1.1 a Host header could change the path of a request, and so walk around the key."""
    setup = (Path(__file__).parents[1] / "setup.py").read_text()
    extras = [line for line in setup.splitlines() if re.search(r'"vllm(-cpu)?==', line)]
    assert len(extras) == 2
    assert all('"starlette>=1.1"' in line for line in extras)


def test_a_server_that_the_engine_would_not_ask(capsys):
    words = ["--engine", "hf", "--engine.server", "http://127.0.0.1:8000", "--print-config"]
    assert main(["train", "configs/tiny.yaml", *words]) == 2
    error = capsys.readouterr().err
    assert "engine.server: " in error
    assert error.count("\n") == 1


def test_words_behind_two_dashes_go_to_vllm_alone(capsys):
    assert main(["serve", "some/model", "--print", "--", "--data-parallel-size", "8"]) == 0
    assert capsys.readouterr().out.rstrip().endswith("--data-parallel-size 8")
    refused = ("--host=0.0.0.0", "--port", "--ssl-keyfile", "--middleware=none")
    for word in (
        *refused,
        "--api_key",
        "--hos",
        "--weight_transfer_config.backend",
        "--ssl_keyfile",
    ):
        assert main(["serve", "some/model", "--print", "--", word, "0.0.0.0"]) == 2
        assert f"got '{word.partition('=')[0]}' after --, which" in capsys.readouterr().err
    for word in ("--api-server-count", "--chat-template", "--swap-space", "-O3"):
        assert main(["serve", "some/model", "--print", "--", word, "2"]) == 0
    capsys.readouterr()
    assert main(["report", "runs/a", "--", "--optim.lr", "1"]) == 2
    assert "got '--optim.lr' after --; only serve" in capsys.readouterr().err


def test_a_cut_distribution_is_refused_for_training(capsys):
    words = ["--engine", "vllm", "--rollout.top_p", "0.9", "--print-config"]
    assert main(["train", "configs/tiny.yaml", *words]) == 2
    assert "log-probs of the cut distribution" in capsys.readouterr().err


class Recorder:
    """Stands for vLLM's engine where there is no GPU: what it is told, in order."""

    def __init__(self):
        self.told = []

    def sleep(self, level):
        self.told.append(f"sleep {level}")

    def wake_up(self, tags):
        self.told.append(f"wake {' '.join(tags)}")

    def collective_rpc(self, method, kwargs):
        named = [name for name, _ in kwargs["weights_iterator"]]
        self.told.append(f"{method} {len(named)}")

    def reset_prefix_cache(self):
        self.told.append("reset")
        return True


class OnCuda(VllmEngine):
    def _start(self, *_):
        return Recorder()


def test_a_sleeping_engine_wakes_weights_then_loads_then_wakes_the_cache(
    random_qwen2, tmp_path, monkeypatch
):
    free = iter([0, 1 * 2**30, 3 * 2**30, 5 * 2**30])
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (next(free), 8 * 2**30))
    model = random_qwen2()
    model.config.save_pretrained(tmp_path)
    cuda = torch.device("cuda", 0)
    engine = OnCuda(str(tmp_path), max_batch=4, dtype=torch.bfloat16, device=cuda)
    weights = len(list(model.named_parameters()))
    assert engine.usage().freed_bytes == 2**30
    engine.load_weights(model.named_parameters())
    engine.rest()
    engine.rest()
    assert not engine.complete
    assert engine.usage().freed_bytes == 2 * 2**30
    assert engine.usage().freed_bytes == 0
    engine.load_weights(model.named_parameters())
    load = f"reload_weights {weights}"
    woken = ("wake weights", load, "wake kv_cache", "reset")
    assert engine.llm.told == ["sleep 2", *woken, "sleep 2", *woken]
    assert engine.complete
    with pytest.raises(ConfigError, match=r"float32, bfloat16 or float16, got torch\.float64"):
        OnCuda(str(tmp_path), max_batch=4, dtype=torch.float64, device=cuda)
