"""A real server on loopback, started by `vpgea serve`: whole runs, keys, stops, and its death."""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from vpgea_fast.cli import main
from vpgea_fast.config import VllmEngineConfig
from vpgea_fast.distributed import Stopped, World
from vpgea_fast.rollout.engine import RolloutError, Sampling
from vpgea_fast.rollout.server import KEY, ServerEngine
from vpgea_fast.types import SampleRequest

pytestmark = pytest.mark.vllm
TINY = Path(__file__).parents[1] / "configs/tiny.yaml"
with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    PORT = probe.getsockname()[1]
URL = f"http://127.0.0.1:{PORT}"
SECRET = "only-for-this-test"
ROUTES = (
    *("/inference/v1/generate", "/v1/models", "/collective_rpc", "/reset_prefix_cache", "/pause"),
    *("/init_weight_transfer_engine", "/update_weights", "/sleep", "/inference/v1/abort_requests"),
)


def ask(method, path, key=None):
    connection = http.client.HTTPConnection("127.0.0.1", PORT, timeout=5)
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    try:
        connection.request(method, path, body="{}" if method == "POST" else None, headers=headers)
        return connection.getresponse().status
    finally:
        connection.close()


@contextmanager
def serving(folder, *words, **environment):
    """The process of `vpgea serve` with these words, from when it answers to its end."""
    log = folder / "log"
    command = [sys.executable, "-m", "vpgea_fast.cli", "serve", *map(str, words)]
    environment = {**os.environ, KEY: SECRET, "OMP_NUM_THREADS": "1", **environment}
    with (
        log.open("wb") as said,
        subprocess.Popen(
            [*command, "--port", str(PORT)],
            env=environment,
            stdout=said,
            stderr=subprocess.STDOUT,
        ) as process,
    ):
        try:
            deadline = time.monotonic() + 400
            while True:
                assert process.poll() is None, log.read_text()[-4000:]
                assert time.monotonic() < deadline
                try:
                    if ask("GET", "/health") == 200:
                        break
                except OSError:
                    time.sleep(0.5)
            yield process
        finally:
            process.terminate()


SMALL = ("--model.dtype", "float32", "--vllm.kv_cache_gib", "0.25", "--vllm.context", "512")


@pytest.fixture(scope="module")
def server(tiny_world, tmp_path_factory):
    with serving(tmp_path_factory.mktemp("server"), tiny_world.base_dir, *SMALL) as started:
        yield started


@pytest.fixture
def vllm_itself(server, running):
    """The process below `vpgea serve` that answers; all of vLLM's are in its session."""
    (pid,) = running(parent=server.pid)
    return pid


@pytest.fixture
def engine(server, tiny_world, tiny_model, tmp_path, monkeypatch):
    assert server.poll() is None
    monkeypatch.setenv(KEY, SECRET)
    made = ServerEngine(
        str(tiny_world.base_dir),
        cfg=VllmEngineConfig(server=URL),
        world=World(torch.device("cpu")),
        max_batch=16,
        dtype=torch.float32,
        files=str(tmp_path / "sync"),
    )
    made.load_weights(tiny_model.named_parameters())
    yield made
    made.close()


def requests(count=4):
    prompt = torch.tensor([5, 6, 7])
    return [SampleRequest("q", "prior", i, prompt, seed=i) for i in range(count)]


@pytest.fixture
def words(tiny_words, monkeypatch):
    monkeypatch.setenv(KEY, SECRET)
    return tiny_words(
        {
            "rollout.engine": "vllm",
            "vllm.server": URL,
            "train.steps": 5,
            "train.questions_per_step": 4,
            "metrics.compare": "null",
            "metrics.diag_every": 0,
        }
    )


def lines(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.usefixtures("server")
def test_five_steps_with_a_server(words, tmp_path, capsys):
    assert main(["train", str(TINY), *words("run")]) == 0, capsys.readouterr().err
    records = lines(tmp_path / "run")
    assert len(records) == 5
    assert max(record["probe_max"] for record in records) <= 1e-4
    assert max(record["mismatch_max"] for record in records) <= 1e-4
    assert not list((tmp_path / "run/sync").iterdir())


@pytest.mark.gpu
def test_weights_go_to_a_server_over_nccl(words, tiny_world, tmp_path, capsys):
    if torch.cuda.device_count() < 2:
        pytest.skip("NCCL needs a GPU for each side")
    share = ["--model.dtype", "bfloat16", "--vllm.sync", "nccl"]
    more = ["--vllm.kv_cache_gib", "0.25", "--vllm.context", "512"]
    with serving(tmp_path, tiny_world.base_dir, *share, *more, CUDA_VISIBLE_DEVICES="1"):
        status = main(["train", str(TINY), *words("run", "--model.device", "cuda", *share)])
        assert status == 0, capsys.readouterr().err
    assert max(record["probe_mean"] for record in lines(tmp_path / "run")) < 0.05


def test_log_probs_stops_and_order_of_a_server(engine, tiny_model):
    sampling = Sampling(24, think_close_id=1000, eos_ids=(), temperature=0.8)
    asked = requests(8)
    paths = engine.generate(asked, sampling)
    assert [path.index for path in paths] == list(range(8))
    for request, path in zip(asked, paths, strict=True):
        assert path.length == 24
        assert path.finish == "length"
        ids = torch.cat([request.prompt_ids, path.z_ids])[None]
        with torch.no_grad():
            logp_TV = (tiny_model(ids).logits[0, 2:-1] / 0.8).log_softmax(-1)
        expected = logp_TV.gather(-1, path.z_ids[:, None])[:, 0]
        torch.testing.assert_close(path.logps, expected, rtol=0, atol=1e-4)
    again = engine.generate(asked[::-1], sampling)[::-1]
    assert [p.z_ids.tolist() for p in again] == [p.z_ids.tolist() for p in paths]
    with pytest.raises(ValueError, match="max_model_len of the server"):
        engine.generate(asked, Sampling(512, think_close_id=3, eos_ids=()))


@pytest.mark.usefixtures("server")
def test_every_route_wants_the_key():
    for route in ROUTES:
        assert ask("POST", route) == ask("POST", route, "another") == 401
    assert ask("GET", "/health") == 200
    assert ask("GET", "/v1/models", SECRET) == 200


@pytest.mark.usefixtures("server")
def test_a_wrong_key_is_named(tiny_world, monkeypatch):
    monkeypatch.setenv(KEY, "another")
    options = {"cfg": VllmEngineConfig(server=URL), "world": World(torch.device("cpu"))}
    with pytest.raises(RolloutError, match=f"wants another key: set {KEY}"):
        ServerEngine(str(tiny_world.base_dir), max_batch=4, dtype=torch.float32, **options)


def test_a_stop_and_a_time_out(engine):
    sampling = Sampling(400, think_close_id=1000, eos_ids=())

    def stop(_):
        raise Stopped

    with pytest.raises(Stopped):
        engine.generate(requests(16), sampling, stop)
    engine.cfg = VllmEngineConfig(server=URL, timeout_s=0.05)
    paths = engine.generate(requests(16), sampling)
    assert {path.finish for path in paths} == {"error"}
    assert {path.z_ids.numel() for path in paths} == {0}


def test_files_that_the_server_does_not_see(engine, tiny_model, monkeypatch):
    monkeypatch.setattr("vpgea_fast.rollout.server.write_weights", lambda *_: None)
    with pytest.raises(RolloutError, match="refuses /collective_rpc"):
        engine.load_weights(tiny_model.named_parameters())
    with pytest.raises(ValueError, match="load_weights first"):
        engine.generate(requests(), Sampling(4, think_close_id=3, eos_ids=()))


def test_a_silent_server_is_noticed(engine, vllm_itself, tiny_model, monkeypatch):
    """Stopped, it keeps its connections open, as a machine that lost its power does. Seconds are a
    fifth of what they are in a run, where a call is lost within 40."""
    monkeypatch.setattr("vpgea_fast.rollout.server.HEALTH_SECONDS", 2.0)
    began = time.monotonic()

    def stop(_):
        os.kill(vllm_itself, signal.SIGSTOP)

    sampling = Sampling(400, think_close_id=1000, eos_ids=())
    try:
        with pytest.raises(RolloutError, match=r"is gone \(2 calls of /health were not answered"):
            engine.generate(requests(16), sampling, stop)
        with pytest.raises(RolloutError, match="is gone"):
            engine.load_weights(tiny_model.named_parameters())
    finally:
        os.kill(vllm_itself, signal.SIGCONT)
    assert time.monotonic() - began < 40


def test_a_killed_server_is_noticed_and_leaves_nothing(engine, server, vllm_itself, running):
    began = time.monotonic()

    def kill(_):
        os.kill(vllm_itself, signal.SIGKILL)

    with pytest.raises(RolloutError, match=f"the rollout server at {URL} is gone"):
        engine.generate(requests(16), Sampling(400, think_close_id=1000, eos_ids=()), kill)
    assert time.monotonic() - began < 30
    assert server.wait(30) == 128 + signal.SIGKILL
    assert not running(session=vllm_itself)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_server_ends_with_the_command_that_started_it(number, tiny_world, tmp_path, running):
    with serving(tmp_path, tiny_world.base_dir, *SMALL) as process:
        (session,) = running(parent=process.pid)
        assert any("(VLLM::EngineCor" in stat for stat in running(session=session).values())
        process.send_signal(number)
        deadline = time.monotonic() + 60
        while left := running(session=session):
            assert time.monotonic() < deadline, left
            time.sleep(0.2)
