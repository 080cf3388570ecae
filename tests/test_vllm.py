"""vLLM, for real, on a CPU: whole runs, hand-overs that fail, processes that die. The contract that
it shares with the other engine is in test_rollout.py."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from vpgea_fast import checkpoint, config
from vpgea_fast.cli import main
from vpgea_fast.config import VllmEngineConfig
from vpgea_fast.distributed import Stopped, World
from vpgea_fast.estimate import estimate_memory, model_shape
from vpgea_fast.evaluation.records import read_samples
from vpgea_fast.rollout.engine import RolloutError, Sampling
from vpgea_fast.rollout.vllm.engine import VllmEngine
from vpgea_fast.rollout.vllm.lifetime import LEAVE
from vpgea_fast.trainer import Trainer
from vpgea_fast.types import SampleRequest

pytestmark = pytest.mark.vllm
TINY = Path(__file__).parents[1] / "configs/tiny.yaml"
SMALL = VllmEngineConfig(kv_cache_gib=0.125)
CPU = torch.device("cpu")


VLLM = ("--engine", "vllm", "--engine.kv_cache_gib", "0.125")


@pytest.fixture
def hf_words(tiny_words):
    """Command-line words of five steps of the tiny task, without an evaluation."""
    return tiny_words(
        {
            "train.steps": 5,
            "train.questions_per_step": 4,
            "metrics.compare": "null",
            "metrics.diag_every": 0,
        }
    )


@pytest.fixture
def words(hf_words):
    """The same with vLLM."""
    return lambda name, *more: hf_words(name, *VLLM, *more)


@pytest.fixture
def make_engine(random_qwen2, tmp_path):
    """An engine with the weights of a random model: `engine, model = make_engine()`."""
    made = []

    def make(cfg=SMALL, kind=VllmEngine, **config):
        model = random_qwen2(hidden=64, **config)
        path = str(tmp_path / f"model{len(made)}")
        model.config.save_pretrained(path)
        engine = kind(path, max_batch=16, dtype=torch.float32, device=CPU, cfg=cfg)
        made.append(engine)
        engine.load_weights(model.named_parameters())
        return engine, model

    yield make
    for engine in made:
        engine.close()


def requests(count=4, prompt=(4, 5, 6)):
    return [
        SampleRequest(
            question_id="q", stream="prior", index=i, prompt_ids=torch.tensor(prompt), seed=i
        )
        for i in range(count)
    ]


def lines(run_dir):
    return [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]


# --- whole runs -----------------------------------------------------------------------------------


def test_five_steps_as_with_the_transformers_engine(words, hf_words, tmp_path, capsys):
    """Log-probs within 1e-4 before every sync (what was sampled, against the trainer that has not
    moved since) and after it (the probe); the same lines in metrics.jsonl, probe aside."""
    assert main(["train", str(TINY), *words("vllm")]) == 0
    assert main(["train", str(TINY), *hf_words("hf")]) == 0
    capsys.readouterr()
    ours, theirs = lines(tmp_path / "vllm"), lines(tmp_path / "hf")
    assert len(ours) == len(theirs) == 5
    for line, other in zip(ours, theirs, strict=True):
        assert line.keys() - other.keys() == {"probe_mean", "probe_max"}
        assert other.keys() <= line.keys()
        assert line["probe_max"] <= 1e-4
        assert line["mismatch_max"] <= 1e-4
        assert line["skipped"] == 0
        assert line["mismatch_outside"] == 0
        assert line["len_prior"] == pytest.approx(other["len_prior"], rel=0.5)


def test_two_training_processes_see_what_one_sees(words, tmp_path):
    """From start to export; an engine each, or one that both share (tensor parallel)."""
    results = {}
    for name, processes, share in (("one", 1, 1), ("two", 2, 1), ("shared", 2, 2)):
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command = [*torchrun, "--nproc-per-node", str(processes), "-m", "vpgea_fast.cli", "train"]
        more = ["--parallel.shard", "always", "--engine.tensor_parallel", str(share)]
        done = subprocess.run(
            [*command, str(TINY), *map(str, words(name, *more))],
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            check=False,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        results[name] = lines(tmp_path / name)
        assert len(results[name]) == 5
        assert (tmp_path / name / "export/model.safetensors").is_file()
    for name in ("two", "shared"):
        for one, other in zip(results["one"], results[name], strict=True):
            assert one.keys() == other.keys()
            assert max(one["probe_max"], other["probe_max"]) <= 1e-4
            assert max(one["mismatch_max"], other["mismatch_max"]) <= 1e-4
            assert other["loss"] == pytest.approx(one["loss"], rel=1e-3)
            assert other["tokens_generated"] == one["tokens_generated"]


@pytest.mark.parametrize("dry", [[], ["--dry-run"]], ids=["run", "dry run"])
def test_a_context_that_is_too_small_is_refused_by_run_and_dry_run(words, dry, tmp_path, capsys):
    """A teacher prompt of 11 tokens and 246 new ones, before any weight is loaded."""
    assert main(["train", str(TINY), *words("run", "--engine.context", "200", *dry)]) == 2
    said = capsys.readouterr().err
    assert "new ones need " in said
    assert "but the model has 200 (engine.context)" in said
    assert not list(tmp_path.iterdir())


def test_temperature_and_truncated_importance_weights(words, capsys):
    """At temperature 0.7 the log-probs still agree, so no ratio reaches the cap."""
    more = ["--rollout.temperature", "0.7", "--rollout.importance_cap", "2", "--train.steps", "2"]
    cfg = config.load(TINY, words("cool", *more))
    with Trainer(cfg) as trainer:
        for _ in range(2):
            metrics = trainer.train_step().metrics
            assert metrics["importance_capped"] == 0
            assert 0 < metrics["mismatch_max"] <= 1e-4
            trainer.state.step += 1
    capsys.readouterr()


@pytest.mark.parametrize(
    "more",
    [
        ["--train.resample_rounds", "1", "--eval.every", "1", "--eval.limit", "8"],
        ["--scoring.u_source", "accuracy", "--scoring.answer_samples", "2"],
    ],
)
def test_whatever_samples_in_a_step_comes_before_the_engine_rests(words, tiny_world, more, capsys):
    """An engine that rests refuses to sample until it is given weights."""
    more = [*more, "--eval.data", f"[{tiny_world.test_path}]", "--eval.samples", "0"]
    with Trainer(config.load(TINY, words("rest", *more))) as trainer:
        for _ in range(2):
            stats = trainer.train_step()
            assert stats.metrics["tokens_generated"] > 0
            trainer.state.step += 1
        trainer.stages.engine.rest()
        with pytest.raises(ValueError, match="load_weights first"):
            trainer.train_step()
    capsys.readouterr()


def test_a_resume_may_change_the_engine(hf_words, tmp_path, capsys):
    """hf to vLLM and back, as the messages of a lost engine advise."""
    run = tmp_path / "run"
    assert main(["train", str(TINY), *hf_words("run", "--train.steps", "1")]) == 0
    for steps, engine in ((2, VLLM), (3, ("--engine", "hf"))):
        more = ["--train.steps", str(steps), *engine]
        assert main(["train", "--resume", str(run), *more]) == 0
        assert json.loads((run / "environment.json").read_text())["rollout_engine"] == engine[1]
    said = capsys.readouterr()
    assert 'changed at step 1: engine.name "hf" -> "vllm"' in said.out
    assert "engine.name 'hf' leaves out the file's engine.process, engine.server" in said.err
    assert [("probe_mean" in line) for line in lines(run)] == [False, True, False]


def test_evaluation(tiny_world, tmp_path, capsys):
    """The tiny base is right nearly always when greedy; both engines say the same."""
    out = {}
    for engine, more in (("hf", ()), ("vllm", VLLM)):
        folder = tmp_path / engine
        status = main(
            [
                *("eval", str(tiny_world.base_dir), str(tiny_world.test_path)),
                *("--config", str(TINY), "--eval.limit", "24", "--eval.samples", "0"),
                *(*more, "--out", str(folder)),
            ]
        )
        assert status == 0, capsys.readouterr().err
        written = json.loads((folder / "result.json").read_text())
        assert len((folder / "samples.jsonl").read_text().splitlines()) == 24
        section = written["settings"]["engine"]
        assert section["name"] == engine
        assert section.get("kv_cache_gib") == (None if engine == "hf" else 0.125)
        out[engine] = written["greedy"]
    assert out["vllm"]["acc"] == out["hf"]["acc"] > 0.9
    assert out["vllm"]["tokens"] == out["hf"]["tokens"]
    assert out["vllm"]["errors"] == 0


def test_an_evaluation_that_was_killed_goes_on_with_the_same_verdicts(tiny_world, tmp_path, capsys):
    """At five random bytes: what is there stays, only the rest is drawn, in batches of its own."""

    def evaluate(folder, *more):
        asked = ("eval", str(tiny_world.base_dir), str(tiny_world.test_path), "--out", str(folder))
        keys = ("--config", str(TINY), "--eval.limit", "12", "--eval.samples", "2")
        assert main([*asked, *keys, "--verify.name", "number", *VLLM, *more]) == 0
        said = capsys.readouterr().out
        result = json.loads((folder / "result.json").read_text())
        rights = Counter((s.mode, s.correct) for s in read_samples(folder))
        return said, rights, {mode: result[mode]["acc"] for mode in ("sampled", "greedy")}

    whole = tmp_path / "whole"
    _, rights, accs = evaluate(whole)
    text = (whole / "samples.jsonl").read_bytes()
    keys = {s.key for s in read_samples(whole)}
    assert len(keys) == 36
    assert rights["greedy", 1] > 10
    for seed in range(5):
        out = shutil.copytree(whole, tmp_path / f"cut-{seed}")
        (out / "result.json").unlink()
        kept = text[: random.Random(seed).randrange(len(text))]
        (out / "samples.jsonl").write_bytes(kept)
        kept = kept[: kept.rfind(b"\n") + 1]
        said, *found = evaluate(out, "--resume")
        assert found == [rights, accs]
        assert {s.key for s in read_samples(out)} == keys
        assert (out / "samples.jsonl").read_bytes().startswith(kept)
        count = kept.count(b"\n")
        assert not count or f"goes on behind {count} of 36 answers" in " ".join(said.split())


def test_the_estimated_cache_is_the_one_that_vllm_allocates(make_engine):
    engine, model = make_engine()
    cfg = config.resolve(
        {
            "model": {"dtype": "float32"},
            "engine": {"name": "vllm", "kv_cache_gib": SMALL.kv_cache_gib},
        }
    )
    found = estimate_memory(
        model_shape(model.config), cfg, cuda=False, context=512, prompt=3
    ).engine
    settings = engine.llm.llm_engine.vllm_config.cache_config
    assert found.tokens == settings.num_gpu_blocks * settings.block_size


# --- weights --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rate", "most"), [("1e-6", 1), ("1e-7", 3)])
def test_a_skipped_sync_stops_the_run(words, monkeypatch, rate, most):
    """The engine swallows all weights from the third set on, after one update that it took. A step
    at 1e-6 moves the probe's log-probs by a mean of 2e-5, a fifth of the tolerance and five times
    what can be rounding: found at once. One at 1e-7 moves them by 2e-6: two of them are found."""
    more = ("--optim.lr", rate, "--optim.schedule", "constant", "--train.steps", "20")
    cfg = config.load(TINY, words("skipped", *more))
    load, calls = VllmEngine.load_weights, []

    def swallow(engine, named):
        calls.append(1)
        if len(calls) >= 3:
            for _ in named:
                pass
            engine.complete = True
        else:
            load(engine, named)

    monkeypatch.setattr(VllmEngine, "load_weights", swallow)
    with Trainer(cfg) as trainer:
        trainer.train_step()
        trainer.state.step += 1

        def skip():
            for _ in range(most):
                trainer.train_step()
                trainer.state.step += 1

        with pytest.raises(RolloutError, match=r"did not take over the new weights.*same bits"):
            skip()


def test_a_partial_sync_stops_the_run(words, monkeypatch):
    """One layer of the second set is the first's again."""
    cfg = config.load(TINY, words("partial"))
    as_loaded, old = VllmEngine._as_loaded, {}

    def partial(engine, named):
        for name, tensor in as_loaded(engine, named):
            if "layers.1.mlp" in name:
                yield name, old.setdefault(name, tensor)
            else:
                yield name, tensor

    monkeypatch.setattr(VllmEngine, "_as_loaded", partial)
    with Trainer(cfg) as trainer, pytest.raises(RolloutError, match="engine and trainer disagree"):
        trainer.train_step()


def test_a_reload_that_vllm_leaves_out_is_noticed_at_once(make_engine, monkeypatch):
    """At any learning rate: every weight must have been asked for."""
    engine, model = make_engine()
    monkeypatch.setattr(engine.llm, "collective_rpc", lambda *_, **__: None)
    with pytest.raises(ValueError, match=r"missing model\.embed_tokens\.weight; missing"):
        engine.load_weights(model.named_parameters())
    with pytest.raises(ValueError, match="load_weights first"):
        engine.generate(requests(), Sampling(4, think_close_id=3, eos_ids=(1,)))


class Tied(VllmEngine):
    def _start(self, path, max_batch, seed):
        self.untied = False
        return super()._start(path, max_batch, seed)


def test_why_the_tied_head_is_untied_on_a_cpu(make_engine):
    """vLLM 0.32 refreshes all but its packed copy of a tied head. If this fails, untie no more."""
    worst = {}
    for kind in (Tied, VllmEngine):
        engine, model = make_engine(kind=kind)
        paths = engine.generate(requests(), Sampling(8, think_close_id=1000, eos_ids=()))
        gaps = []
        for path in paths:
            ids = torch.cat([torch.tensor([4, 5, 6]), path.z_ids])[None]
            with torch.no_grad():
                logp_TV = model(ids).logits[0, 2:-1].log_softmax(-1)
            gaps.append((logp_TV.gather(-1, path.z_ids[:, None])[:, 0] - path.logps).abs().max())
        worst[kind] = max(gaps).item()
        engine.close()
    assert worst[VllmEngine] < 1e-4
    assert worst[Tied] > 0.1


def test_the_prefix_cache_is_used_and_forgotten_at_a_sync(make_engine, random_qwen2):
    engine, _ = make_engine()
    sampling = Sampling(4, think_close_id=3, eos_ids=(1,))
    prompt = torch.arange(4, 44) % 40 + 4
    asked = [
        SampleRequest(question_id="q", stream="prior", index=i, prompt_ids=prompt, seed=i)
        for i in range(4)
    ]
    engine.generate(asked, sampling)
    engine.usage()
    engine.generate(asked, sampling)
    usage = engine.usage()
    assert usage.prompt_tokens == 4 * 40
    assert usage.cached_tokens == 4 * 32  # whole blocks of 32
    engine.load_weights(random_qwen2(hidden=64, seed=1).named_parameters())
    engine.generate(asked[:1], sampling)
    assert engine.usage().cached_tokens == 0


# --- robustness -----------------------------------------------------------------------------------


def test_two_policies_take_turns_and_one_that_does_not_come_is_found(words, monkeypatch):
    """Each hinted path has the log-probs of the posterior policy, in the second step too, when it
    has moved; an engine that keeps the policy's weights instead is found before it draws."""
    more = {
        "objective": "vr",
        "objective.share_params": "false",
        "objective.group_size": 4,
        "objective.prior_samples": 2,
        "scoring.answer_samples": 2,
        "rollout.max_new_tokens": 48,
        "posterior.lr": "1e-3",
        "optim.warmup_steps": 0,
    }
    cfg = config.load(TINY, words("two", *(w for k, v in more.items() for w in (f"--{k}", str(v)))))
    load = VllmEngine.load_weights
    with Trainer(cfg) as trainer:
        for _ in range(2):
            rollout = trainer.draw()
            trainer.state.rollout = rollout
            trainer.train_step()
            trainer.state.step += 1
            posterior = rollout.batch.posterior
            (score,) = (s for s in rollout.batch.logps if s.who == "posterior")
            found = rollout.batch.logps[score]
            gaps = [found[path.key] - path.logps for path in posterior.flat]
            assert torch.cat(gaps).abs().mean() <= 1e-4
            assert trainer.stages.turns.holds == "policy"

        def keep(_, named):
            for _ in named:
                pass

        monkeypatch.setattr(VllmEngine, "load_weights", keep)
        with pytest.raises(
            RolloutError, match="has the weights of the policy where those of the po"
        ):
            trainer.train_step()
        monkeypatch.setattr(VllmEngine, "load_weights", load)


def test_a_stop_leaves_nothing_in_the_scheduler(make_engine):
    engine, _ = make_engine()
    sampling = Sampling(200, think_close_id=1000, eos_ids=())
    expected = [path.z_ids.tolist() for path in engine.generate(requests(), sampling)]

    def stop(_):
        raise Stopped

    with pytest.raises(Stopped):
        engine.generate(requests(), sampling, stop)
    assert engine.llm.llm_engine.get_num_unfinished_requests() == 0
    assert [path.z_ids.tolist() for path in engine.generate(requests(), sampling)] == expected


def test_paths_that_take_too_long_cost_their_question_not_the_run(words, capsys):
    words = words("late", "--engine.timeout_s", "1e-9", "--train.steps", "1")
    cfg = config.load(TINY, words)
    with Trainer(cfg) as trainer:
        before = [p.clone() for p in trainer.stages.policy.parameters()]
        stats = trainer.train_step()
        assert stats.metrics["paths_error"] == 4 * 12
        assert stats.metrics["groups_dropped"] == 4
        assert "gave up a path of every question" in stats.skipped
        assert not {"acc_student", "len_prior", "accept_rate", "u_post"} & {*stats.metrics}
        trainer.finish_step(stats)
        assert all(map(torch.equal, before, trainer.stages.policy.parameters()))
    capsys.readouterr()


def test_closing_leaves_the_callers_process_group(make_engine):
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        engine, _ = make_engine()
        engine.generate(requests(), Sampling(4, think_close_id=3, eos_ids=(1,)))
        engine.close()
        assert dist.is_initialized()
        one = torch.ones(1)
        dist.all_reduce(one)
        assert one.item() == 1
        again, _ = make_engine()
        assert len(again.generate(requests(), Sampling(4, think_close_id=3, eos_ids=(1,)))) == 4
        again.close()
    finally:
        dist.destroy_process_group()


@pytest.fixture
def start(running, words, tmp_path):
    """A run with the engine in a process of its own, in a session of its own:
    `run = start("--engine.timeout_s", "10")`; `run.wait_for_lines(2)`, `run.end_by(time)`."""
    own = ["--engine.process", "own", "--train.steps", "4000", "--checkpoint.save_every", "1"]

    class Run(subprocess.Popen):
        def __init__(self, *more):
            command = [sys.executable, "-m", "vpgea_fast.cli", "train", str(TINY)]
            super().__init__(
                [*command, *words("run", *own, *more)],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                start_new_session=True,
                # A shell that starts a suite in the background has children ignore it.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )

        def processes(self, title=""):
            return [pid for pid, stat in running(session=self.pid).items() if title in stat]

        def wait_for(self, condition):
            deadline = time.monotonic() + 400
            while not (found := condition()):
                assert self.poll() is None, self.stderr.read()[-4000:]
                assert time.monotonic() < deadline
                time.sleep(0.05)
            return found

        def wait_for_lines(self, count):
            metrics = tmp_path / "run/metrics.jsonl"
            self.wait_for(lambda: metrics.exists() and len(lines(tmp_path / "run")) >= count)

        def end_by(self, deadline):
            """What it said on stderr; nothing of it may run on."""
            try:
                _, said = self.communicate(timeout=deadline - time.monotonic())
            finally:
                self.kill()
            while left := running(session=self.pid):
                assert time.monotonic() < deadline, left
                time.sleep(0.1)
            return said

    return Run


def check_saved(run_dir, least):
    saved = checkpoint.find_checkpoint(run_dir, world=World(CPU))
    assert saved is not None
    assert saved.step >= least
    assert all(bool(tensor.isfinite().all()) for tensor in saved.tensors().values())


@pytest.mark.parametrize("victim", ["engine", "trainer", "silent engine"])
def test_a_killed_process_ends_the_job_and_leaves_nothing(start, tmp_path, victim):
    """SIGKILL (for the last SIGSTOP) in the middle of a rollout, the engine in its own process."""
    with start("--engine.timeout_s", "10" if victim == "silent engine" else "600") as run:
        run.wait_for_lines(2)
        (engine,) = run.processes("(VLLM::EngineCor")
        killed = time.monotonic()
        signal_ = signal.SIGSTOP if victim == "silent engine" else signal.SIGKILL
        os.kill(run.pid if victim == "trainer" else engine, signal_)
        said = run.end_by(killed + 60)
    if victim != "trainer":
        assert run.returncode == 2
        assert "the vLLM engine's process is gone" in said, said
    check_saved(
        tmp_path / "run", 1
    )  # the second line of metrics.jsonl comes before the second save


def test_a_dead_child_is_the_reason_whatever_vllm_raises(make_engine, monkeypatch):
    """vLLM clears up in a thread of its own: a call may meet its sockets closed."""
    engine, _ = make_engine()
    core, sampling = engine.llm.llm_engine, Sampling(4, think_close_id=3, eos_ids=(1,))
    end, runs = core.engine_core.shutdown, [True]

    def closed(*_args, **_kwargs):
        raise OSError("not a socket")

    def end_badly(**how):
        end(**how)
        closed()

    # What watches a child; vLLM has made none in this process.
    engine.guard = SimpleNamespace(engine_runs=lambda: runs[0], waiting=lambda _: nullcontext())
    for call in ("step", "add_request"):
        runs[0] = engine.complete = engine.alive = True
        with monkeypatch.context() as patched:
            patched.setattr(core, call, closed)
            with pytest.raises(OSError, match="not a socket"):
                engine.generate(requests(), sampling)  # of one that lives
            runs[0] = False
            with pytest.raises(RolloutError, match="engine's process is gone"):
                engine.generate(requests(), sampling)
    monkeypatch.setattr(core.engine_core, "shutdown", end_badly)
    engine.close()


def test_a_signal_to_every_process_of_a_job_is_answered_by_the_trainer(start, tmp_path):
    """As terminals and schedulers send it: the engine goes on until the trainer has saved."""
    with start() as run:
        run.wait_for_lines(1)
        for signal_ in (signal.SIGINT, signal.SIGTERM):
            for process in run.processes("(VLLM::"):
                os.kill(process, signal_)
        run.wait_for_lines(3)
        assert len(run.processes("(VLLM::")) == 2
        os.killpg(run.pid, signal.SIGINT)
        said = run.end_by(time.monotonic() + 60)
    assert run.returncode == 143, said
    assert "Traceback" not in said
    assert "leaked" not in said  # shared memory of an engine that had to be killed
    check_saved(tmp_path / "run", 3)


@pytest.mark.parametrize(("signal_", "status"), [(signal.SIGKILL, -9), (signal.SIGINT, 130)])
def test_a_trainer_that_ends_while_its_engine_starts_leaves_nothing(start, signal_, status):
    with start() as run:
        run.wait_for(lambda: run.processes("(VLLM::EngineCor"))
        if signal_ == signal.SIGINT:
            os.killpg(run.pid, signal_)
        else:
            os.kill(run.pid, signal_)
        said = run.end_by(time.monotonic() + 60)
    assert run.returncode == status, said


FAMILY = """
import multiprocessing, os, sys, time
from vpgea_fast.rollout.vllm.lifetime import ending_with_this_process

def work(context):
    if context is not None:
        context.Process(target=work, args=(None,)).start()
    os.write(1, b"%d\\n" % os.getpid())  # in one piece
    time.sleep(600)

if __name__ == "__main__":
    context = multiprocessing.get_context(sys.argv[1])
    for _ in range(2):
        engine = context.Process(target=work, args=(context,))
        with ending_with_this_process():
            engine.start()
        if input() == "end":
            engine.terminate()
            engine.join()
            os.write(1, b"%d\\n" % engine.exitcode)
"""


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_children_and_theirs_end_with_a_process_or_at_its_word(method, tmp_path, running):
    """A stopped one too; and they do not end at a SIGINT or SIGTERM of others."""
    (tmp_path / "family.py").write_text(FAMILY)
    with subprocess.Popen(
        [sys.executable, str(tmp_path / "family.py"), method],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(TINY.parents[1])},
        start_new_session=True,
    ) as family:
        try:
            for ends in (f"{-LEAVE}", "killed"):
                engine, worker = sorted(int(family.stdout.readline()) for _ in "ew")
                for process in (engine, worker):
                    os.kill(process, signal.SIGINT)
                    os.kill(process, signal.SIGTERM)
                time.sleep(0.2)
                assert {engine, worker} <= running(session=family.pid).keys()
                os.kill(worker, signal.SIGSTOP)
                if ends == "killed":
                    family.kill()
                else:
                    print("end", file=family.stdin, flush=True)
                    assert family.stdout.readline() == f"{ends}\n"
                deadline = time.monotonic() + 5
                while left := {engine, worker} & running(session=family.pid).keys():
                    assert time.monotonic() < deadline, left
                    time.sleep(0.02)
        finally:
            family.kill()


# --- on a GPU -------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("process", ["shared", "own"])
def test_sleep_gives_memory_back_and_a_sync_fills_the_engine_again(process, random_qwen2, tmp_path):
    """`own` gets its weights by CUDA IPC. bfloat16, two models in turn, heads of 64."""
    device = torch.device("cuda", torch.cuda.current_device())
    shape = {"hidden": 256, "heads": 4, "dtype": torch.bfloat16, "initializer_range": 0.07}
    models = [random_qwen2(seed=seed, **shape).to(device) for seed in (0, 1)]
    models[0].config.save_pretrained(tmp_path)
    engine = VllmEngine(
        str(tmp_path),
        max_batch=8,
        dtype=torch.bfloat16,
        device=device,
        cfg=VllmEngineConfig(process=process, kv_cache_gib=1.0, gpu_memory=0.1),
    )
    try:
        for model in (*models, *models):
            engine.load_weights(model.named_parameters())
            paths = engine.generate(requests(8), Sampling(32, think_close_id=1000, eos_ids=()))
            awake, _ = torch.cuda.mem_get_info(device)
            engine.rest()
            asleep, _ = torch.cuda.mem_get_info(device)
            assert asleep - awake >= 2**30
            gaps = []
            for path in paths:
                ids = torch.cat([torch.tensor([4, 5, 6]), path.z_ids])[None].to(device)
                with torch.no_grad():
                    logp_TV = model(ids).logits[0, 2:-1].float().log_softmax(-1).cpu()
                drawn = logp_TV.gather(-1, path.z_ids[:, None])[:, 0]
                gaps.append((drawn - path.logps).abs().mean())
            assert torch.stack(gaps).mean() < 0.05  # the other model's differ by more than 0.5
    finally:
        engine.close()


@pytest.mark.gpu
@pytest.mark.parametrize("process", ["shared", "own"])
def test_five_steps_on_a_gpu(words, tmp_path, process, capsys):
    more = ["--model.device", "cuda", "--model.dtype", "bfloat16", "--engine.process", process]
    assert main(["train", str(TINY), *words("run", *more)]) == 0, capsys.readouterr().err
    for line in lines(tmp_path / "run"):
        assert line["probe_mean"] < 0.05
        assert line["mismatch_mean"] < 1.05
        assert line["rest_freed_mib"] >= 0.125 * 2**10
