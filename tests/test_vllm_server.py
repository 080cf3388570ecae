"""A real server on loopback, started by `vpgea serve`: whole runs, keys, stops, and its death."""

import asyncio
import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from safetensors import SafetensorError

from vpgea_fast import config
from vpgea_fast.cli import main
from vpgea_fast.config import ConfigError, VllmEngineConfig
from vpgea_fast.distributed import Stopped, World
from vpgea_fast.rollout.engine import RolloutError, Sampling
from vpgea_fast.rollout.vllm.client import KEY
from vpgea_fast.rollout.vllm.remote import ServerEngine
from vpgea_fast.rollout.vllm.serve import require_key
from vpgea_fast.rollout.vllm.transfer import write_weights
from vpgea_fast.spans import Tag
from vpgea_fast.trainer import Trainer
from vpgea_fast.types import SampleRequest

pytestmark = pytest.mark.vllm
TINY = Path(__file__).parents[1] / "configs/tiny.yaml"
SECRET = "only-for-this-test"
ROUTES = (
    *("/inference/v1/generate", "/v1/models", "/collective_rpc", "/reset_prefix_cache", "/pause"),
    *("/init_weight_transfer_engine", "/update_weights", "/sleep", "/inference/v1/abort_requests"),
)


class Served(NamedTuple):
    """A `vpgea serve`, and where it answers."""

    process: subprocess.Popen[bytes]
    port: int

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"

    def ask(self, method, path, key=None, **headers):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
        headers |= {} if key is None else {"Authorization": f"Bearer {key}"}
        body = "{}" if method == "POST" else None
        with contextlib.closing(connection):
            connection.request(method, path, body=body, headers=headers)
            return connection.getresponse().status


@contextlib.contextmanager
def serving(folder, *words, **environment):
    """`vpgea serve` with these words, from when it answers to its end."""
    log = folder / "log"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vpgea_fast.cli", "serve", *map(str, words)]
    environment = {**os.environ, KEY: SECRET, "OMP_NUM_THREADS": "1", **environment}
    with (
        log.open("wb") as said,
        subprocess.Popen(
            [*command, "--port", str(port)],
            env=environment,
            stdout=said,
            stderr=subprocess.STDOUT,
        ) as process,
    ):
        served = Served(process, port)
        try:
            deadline = time.monotonic() + 400
            while True:
                assert process.poll() is None, log.read_text()[-4000:]
                assert time.monotonic() < deadline
                try:
                    if served.ask("GET", "/health") == 200:
                        break
                except OSError:
                    time.sleep(0.5)
            yield served
        finally:
            process.terminate()


SMALL = ("--model.dtype", "float32", "--engine.kv_cache_gib", "0.25", "--engine.context", "512")


@pytest.fixture(scope="module")
def server(tiny_world, tmp_path_factory):
    with serving(tmp_path_factory.mktemp("server"), tiny_world.base_dir, *SMALL) as served:
        yield served


def core_of(processes):
    """The process among vLLM's that draws; the others only pass questions and answers on."""
    (core,) = [pid for pid, stat in processes.items() if "(VLLM::EngineCor" in stat]
    return core


@pytest.fixture
def vllm_itself(server, running):
    """The process below `vpgea serve` that answers; all of vLLM's are in its session."""
    (pid,) = running(parent=server.process.pid)
    return pid


@pytest.fixture
def connect(tiny_world, tmp_path, monkeypatch):
    """Makes engines over a server: `connect(server, sync_dir="/dev/shm")`."""
    monkeypatch.setenv(KEY, SECRET)
    made = []

    def make(server, path=tiny_world.base_dir, **settings):
        made.append(
            ServerEngine(
                str(path),
                cfg=VllmEngineConfig(**{"server": server.url} | settings),
                world=World(torch.device("cpu")),
                max_batch=16,
                dtype=torch.float32,
                files=settings.get("sync_dir") or str(tmp_path / "sync"),
            )
        )
        return made[-1]

    yield make
    for engine in made:
        engine.close()


@pytest.fixture
def engine(connect, server, tiny_model):
    made = connect(server)
    made.load_weights(tiny_model.named_parameters())
    return made


def requests(count=4):
    prompt = torch.tensor([5, 6, 7])
    return [
        SampleRequest(question_id="q", stream="prior", index=i, prompt_ids=prompt, seed=i)
        for i in range(count)
    ]


@pytest.fixture
def words(tiny_words, monkeypatch):
    monkeypatch.setenv(KEY, SECRET)
    return tiny_words(
        {
            "engine.name": "vllm",
            "train.steps": 5,
            "train.questions_per_step": 4,
            "metrics.compare": "null",
            "metrics.diag_every": 0,
        }
    )


def lines(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_five_steps_with_a_server(server, words, tmp_path, capsys):
    assert main(["train", str(TINY), *words("run", "--engine.server", server.url)]) == 0, (
        capsys.readouterr().err
    )
    records = lines(tmp_path / "run")
    assert len(records) == 5
    assert max(record["probe_max"] for record in records) <= 1e-4
    assert max(record["mismatch_max"] for record in records) <= 1e-4
    assert not list((tmp_path / "run/sync").iterdir())
    (tmp_path / "run/sync/weights-left").mkdir()  # by a run that was killed in a hand-over
    assert main(["train", "--resume", str(tmp_path / "run"), "--train.steps", "6"]) == 0
    assert not list((tmp_path / "run/sync").iterdir())


@pytest.mark.gpu
def test_weights_go_to_a_server_over_nccl(words, tiny_world, tmp_path, capsys):
    if torch.cuda.device_count() < 2:
        pytest.skip("NCCL needs a GPU for each side")
    share = ["--model.dtype", "bfloat16", "--engine.sync", "nccl"]
    more = ["--engine.kv_cache_gib", "0.25", "--engine.context", "512"]
    with serving(tmp_path, tiny_world.base_dir, *share, *more, CUDA_VISIBLE_DEVICES="1") as served:
        here = ["--model.device", "cuda", "--engine.server", served.url]
        status = main(["train", str(TINY), *words("run", *here, *share)])
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


@pytest.mark.parametrize("full", [False, True])
def test_a_server_draws_on_behind_a_tag_and_is_cut_there(engine, tiny_tokenizer, full):
    """It knows no text: its paths end elsewhere, and are cut as every engine's."""
    tag = Tag("</think>\\boxed", (6, 314), tiny_tokenizer.decode)
    assert tiny_tokenizer(tag.text)["input_ids"] == [*tag.ids]
    limits = {"eos_ids": (2,), "full_answer": full, "max_answer_tokens": 3, "temperature": 0.8}
    closing = Sampling(120, think_close_id=-1, tag=tag, **limits)
    free = Sampling(123, think_close_id=1000, eos_ids=(2,), temperature=0.8)
    ids = tiny_tokenizer("<s><|user|>4 A+three B-five<|assistant|><think>")["input_ids"]
    asked = [
        SampleRequest(
            question_id="q", stream="prior", index=i, prompt_ids=torch.tensor(ids), seed=i
        )
        for i in range(8)
    ]
    closed = 0
    for path, whole in zip(
        engine.generate(asked, closing), engine.generate(asked, free), strict=True
    ):
        drawn = whole.z_ids.tolist()
        end = next((n for n in range(1, 121) if tag.text in tag.decode(drawn[:n])), 0)
        assert path.closed == bool(end)
        assert path.z_ids.tolist() == drawn[: end or 120]
        assert path.answer_ids.tolist() == (drawn[end : end + 3] if full and end else [])
        torch.testing.assert_close(path.logps, whole.logps[: end or 120], rtol=0, atol=1e-4)
        assert path.finish == ("stop" if end and (not full or 2 in path.answer_ids) else "length")
        closed += path.closed
    assert closed > 4


def test_every_route_wants_the_key(server):
    for route in ROUTES:
        assert server.ask("POST", route) == server.ask("POST", route, "another") == 401
        assert server.ask("POST", route, Host="x/health?") in (400, 401)
    assert server.ask("GET", "/health") == 200
    assert server.ask("GET", "/v1/models", SECRET) == 200


def test_the_path_that_opens_is_the_request_line_and_no_header(monkeypatch):
    """starlette before 1.1 built `request.url` from any Host header."""
    monkeypatch.setenv(KEY, SECRET)

    async def go_on(_):
        return "open"

    def answer(path, host_path):
        url = SimpleNamespace(path=host_path)
        request = SimpleNamespace(url=url, scope={"path": path}, headers={})
        return asyncio.run(require_key(request, go_on))

    assert answer("/health", "/health") == "open"
    assert answer("/update_weights", "/health").status_code == 401


def test_a_wrong_key_is_named(connect, server, monkeypatch):
    monkeypatch.setenv(KEY, "another")
    with pytest.raises(RolloutError, match=f"wants another key: set {KEY}"):
        connect(server)


def test_another_model_is_refused(connect, server, random_qwen2, tmp_path):
    random_qwen2(layers=3, vocab=99).config.save_pretrained(tmp_path)
    with pytest.raises(
        ConfigError, match=r"another model .* there, vocab_size 99, .*layers 3 here"
    ):
        connect(server, tmp_path)


def test_weights_of_another_run_are_noticed(connect, server, engine, tiny_model):
    """As after a new start of the server, whose workers have no mark."""
    other = connect(server)
    other.load_weights(tiny_model.named_parameters())
    with pytest.raises(RolloutError, match="holds other weights than this run gave it"):
        engine.generate(requests(), Sampling(4, think_close_id=3, eos_ids=()))
    with pytest.raises(ValueError, match="load_weights first"):
        engine.generate(requests(), Sampling(4, think_close_id=3, eos_ids=()))
    sampling = Sampling(100, think_close_id=1000, eos_ids=())
    with pytest.raises(RolloutError, match="holds other weights"):
        other.generate(requests(), sampling, lambda _: engine.client.rpc("set_mark", "mine"))


def test_a_directory_that_cannot_be_written(connect, server, tiny_model, monkeypatch):
    with pytest.raises(RolloutError, match=r"engine\.sync_dir: cannot write below /proc/nothing"):
        connect(server, sync_dir="/proc/nothing").load_weights(tiny_model.named_parameters())

    def full(*_):
        raise SafetensorError("No space left on device")

    monkeypatch.setattr("vpgea_fast.rollout.vllm.transfer.save_file", full)
    with pytest.raises(RolloutError, match=r"engine\.sync_dir: cannot write weights .*No space"):
        connect(server).load_weights(tiny_model.named_parameters())


def test_time_outs_cost_their_questions_not_the_run(
    server, vllm_itself, running, words, monkeypatch, capsys
):
    core = core_of(running(session=vllm_itself))
    more = ["--engine.server", server.url, "--metrics.diag_every", "1"]
    with Trainer(config.load(TINY, words("run", *more))) as trainer:
        engine = trainer.stages.engine
        engine.cfg = VllmEngineConfig(server=server.url, timeout_s=0.3)
        check = engine._check_mark  # before the first draw, and after the last

        def asleep_between():
            os.kill(core, signal.SIGCONT)
            check()
            os.kill(core, signal.SIGSTOP)  # no path ends, however late its thread looks

        monkeypatch.setattr(engine, "_check_mark", asleep_between)
        monkeypatch.setattr(trainer, "sync_engine", lambda **_: {})  # its probe would time out too
        try:
            stats = trainer.train_step()
        finally:
            os.kill(core, signal.SIGCONT)
    assert stats.metrics["groups_dropped"] == 4
    assert "gave up a path of every question" in stats.skipped
    capsys.readouterr()


def test_a_stop_and_a_time_out(engine, server):
    sampling = Sampling(400, think_close_id=1000, eos_ids=())

    def stop(_):
        raise Stopped

    with pytest.raises(Stopped):
        engine.generate(requests(16), sampling, stop)
    engine.cfg = VllmEngineConfig(server=server.url, timeout_s=0.05)
    paths = engine.generate(requests(16), sampling)
    late = [path for path in paths if path.finish == "error"]
    assert late  # not all: a thread that the machine lets wait finds its answer there already
    assert {path.z_ids.numel() for path in late} == {0}


def test_weights_that_the_server_leaves_out(engine, tiny_model, monkeypatch):
    def one_more(named, directory):
        return write_weights(named, directory) + 1

    monkeypatch.setattr("vpgea_fast.rollout.vllm.remote.write_weights", one_more)
    with pytest.raises(RolloutError, match=r"the engine took 27 of 28 weights"):
        engine.load_weights(tiny_model.named_parameters())


def test_files_that_the_server_does_not_see(engine, tiny_model, monkeypatch):
    monkeypatch.setattr("vpgea_fast.rollout.vllm.remote.write_weights", lambda *_: None)
    with pytest.raises(RolloutError, match="refuses /collective_rpc"):
        engine.load_weights(tiny_model.named_parameters())
    with pytest.raises(ValueError, match="load_weights first"):
        engine.generate(requests(), Sampling(4, think_close_id=3, eos_ids=()))


def test_a_silent_server_is_noticed(engine, vllm_itself, tiny_model, monkeypatch):
    """Stopped, it keeps its connections open, as a machine that lost its power does. Seconds are a
    fifth of what they are in a run, where a call is lost within 40."""
    monkeypatch.setattr("vpgea_fast.rollout.vllm.client.HEALTH_SECONDS", 2.0)
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
    assert time.monotonic() - began < 60


def test_a_killed_server_is_noticed_and_leaves_nothing(engine, server, vllm_itself, running):
    began = time.monotonic()

    def kill(_):
        os.kill(vllm_itself, signal.SIGKILL)

    with pytest.raises(RolloutError, match=f"the rollout server at {server.url} is gone"):
        engine.generate(requests(16), Sampling(400, think_close_id=1000, eos_ids=()), kill)
    assert time.monotonic() - began < 60
    assert server.process.wait(60) == 128 + signal.SIGKILL
    assert not running(session=vllm_itself)


def test_an_engine_that_dies_in_a_hand_over(
    connect, tiny_world, tiny_model, tmp_path, running, monkeypatch
):
    """vLLM then waits for the end of the call that nobody will answer, and takes no other."""
    monkeypatch.setattr("vpgea_fast.rollout.vllm.client.HEALTH_SECONDS", 2.0)
    with serving(tmp_path, tiny_world.base_dir, *SMALL) as served:
        (session,) = running(parent=served.process.pid)
        core = core_of(running(session=session))
        engine = connect(served)
        os.kill(core, signal.SIGSTOP)  # so that the call does not end before
        threading.Timer(3.0, os.kill, (core, signal.SIGKILL)).start()
        began = time.monotonic()
        with pytest.raises(RolloutError, match=r"is gone|refuses /collective_rpc"):
            engine.load_weights(tiny_model.named_parameters())
        assert time.monotonic() - began < 60
        assert served.process.wait(90) == 128 + signal.SIGKILL
        assert not running(session=session)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_server_ends_with_the_command_that_started_it(number, tiny_world, tmp_path, running):
    with serving(tmp_path, tiny_world.base_dir, *SMALL) as served:
        (session,) = running(parent=served.process.pid)
        assert core_of(running(session=session))
        served.process.send_signal(number)
        deadline = time.monotonic() + 60
        while left := running(session=session):
            assert time.monotonic() < deadline, left
            time.sleep(0.2)
