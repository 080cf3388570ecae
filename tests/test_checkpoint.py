"""A save may be killed or refused at any file operation: what was durable before stays loadable.

transformers is imported where it is used: the process that forks imports this file, and 4 s less.
"""

import errno
import os
import random
import resource
import signal
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import pytest
import torch

from vpgea_fast.checkpoint import (
    CheckpointError,
    claim_run_dir,
    export_model,
    load_checkpoint,
    perform,
    restore_rng,
    rng_state,
    save_checkpoint,
    truncate_jsonl,
    write_text,
)


def save(run_dir, step, *, keep_last=3, do=perform, size=8):
    """Every number of checkpoint N is N, in each of its files."""
    return save_checkpoint(
        run_dir,
        step,
        model_state={"w": torch.full((size,), float(step))},
        optimizer_state={"state": {0: {"exp_avg": torch.full((size,), float(step))}}},
        trainer_state={"paths": step},
        keep_last=keep_last,
        do=do,
    )


def loaded_step(run_dir):
    found = load_checkpoint(run_dir, device="cpu")
    if found is None:
        return None
    moments = found.optimizer_state["state"][0]["exp_avg"]
    numbers = {*found.model_state["w"].tolist(), *moments.tolist(), found.trainer_state["paths"]}
    assert numbers == {found.step}
    return found.step


def steps_on_disk(run_dir):
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


class FailAt:
    """Performs file operations; the n-th raises: before it, or after it with its file cut."""

    def __init__(self, index=-1, *, torn=False):
        self.index, self.torn, self.count = index, torn, 0

    def __call__(self, operation, *args):
        self.count += 1
        if self.count - 1 != self.index:
            return operation(*args)
        if self.torn:
            operation(*args)
            if args[0].is_file():
                os.truncate(args[0], args[0].stat().st_size // 2)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def operations_of_a_save(run_dir):
    counting = FailAt()
    save(run_dir, 1, keep_last=1)
    save(run_dir, 2, keep_last=1, do=counting)
    return counting.count


def save_with_fault(run_dir, do):
    """(saved, message) of a save that met a fault."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            save(run_dir, 2, keep_last=1, do=do)
        except CheckpointError as error:
            return False, str(error)
    return True, str(caught[0].message)


@pytest.mark.parametrize("torn", [False, True], ids=["refused", "torn"])
def test_a_fault_at_every_file_operation_leaves_a_loadable_run(tmp_path, torn):
    total = operations_of_a_save(tmp_path / "count")
    assert total > 15
    for index in range(total):
        run_dir = tmp_path / str(index)
        save(run_dir, 1, keep_last=1)
        saved, message = save_with_fault(run_dir, FailAt(index, torn=torn))
        assert "No space left" in message
        assert ("cannot delete" in message) if saved else ("--resume" in message)
        assert saved or set(steps_on_disk(run_dir)) <= {"step_1", "step_2"}
        assert loaded_step(run_dir) in ((2,) if saved else (1, 2))
        save(run_dir, 3, keep_last=1)
        assert loaded_step(run_dir) == 3
        assert steps_on_disk(run_dir) == ["step_3"]


FORKING = """
import os, random, signal, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_checkpoint import loaded_step, operations_of_a_save, save, steps_on_disk

def in_child(work):
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os._exit(0)
    return pid

def die_at(index):
    seen = iter(range(10**6))
    def do(operation, *args):
        if next(seen) == index:
            os.kill(os.getpid(), signal.SIGKILL)
        return operation(*args)
    return do
"""


def run_forking(body, tmp_path):
    """A fresh process that may fork: this one has threads by now."""
    script = FORKING + textwrap.dedent(body)
    command = [sys.executable, "-c", script, str(Path(__file__).parent), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_kill_9_at_every_operation_and_at_random_moments(tmp_path):
    out = run_forking(
        """
        root = Path(sys.argv[2])
        for index in range(operations_of_a_save(root / "count")):
            run_dir = root / str(index)
            save(run_dir, 1, keep_last=1)
            pid = in_child(lambda: save(run_dir, 2, keep_last=1, do=die_at(index)))
            assert os.waitpid(pid, 0)[1] == signal.SIGKILL
            assert loaded_step(run_dir) in (1, 2), index
            assert all(name.startswith("step_") for name in steps_on_disk(run_dir))
        run_dir, rng, step = root / "random", random.Random(7), 0
        for _ in range(3):
            def save_for_ever(step=step):
                while step := step + 1:
                    save(run_dir, step, keep_last=2, size=50_000)
                    (root / f"durable_{step}").touch()
            pid = in_child(save_for_ever)
            while not (root / f"durable_{step + 1}").exists():
                time.sleep(0.001)
            time.sleep(rng.uniform(0.0, 0.2))
            os.kill(pid, signal.SIGKILL)
            assert os.waitpid(pid, 0)[1] == signal.SIGKILL
            durable = max(int(p.name.removeprefix("durable_")) for p in root.glob("durable_*"))
            step = loaded_step(run_dir)
            assert durable <= step <= durable + 1, (durable, step)
        print("survived", step)
        """,
        tmp_path,
    )
    assert out.startswith("survived")


def test_a_full_disk_is_a_clear_error_and_costs_nothing_that_was_saved(tmp_path):
    save(tmp_path, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (2_000, 160_500):  # the model does not fit; the model fits, the optimiser does not
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            with pytest.raises(CheckpointError, match=r"cannot save .*step_2.*Free disk space"):
                save(tmp_path, 2, size=40_000)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert steps_on_disk(tmp_path) == ["step_1"]
    assert loaded_step(tmp_path) == 1


def test_adamw_continues_bitwise_with_the_random_numbers(tmp_path):
    def start():
        torch.manual_seed(3)
        model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Dropout(0.3))
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-2, weight_decay=0.1)
        return model, optimizer

    def advance(model, optimizer):
        for _ in range(3):
            optimizer.zero_grad()
            (model(torch.randn(4, 5)).square().sum() * random.random()).backward()
            optimizer.step()

    straight, straight_optimizer = start()
    random.seed(3)
    advance(straight, straight_optimizer)
    lr = 0.1 + 0.2  # no short decimal
    save_checkpoint(
        tmp_path,
        3,
        model_state=straight.state_dict(),
        optimizer_state=straight_optimizer.state_dict(),
        trainer_state={"lr": lr},
        keep_last=1,
    )
    advance(straight, straight_optimizer)

    resumed, resumed_optimizer = start()
    found = load_checkpoint(tmp_path, device="cpu")
    assert found is not None
    assert found.trainer_state["lr"] == lr
    resumed.load_state_dict(found.model_state)
    resumed_optimizer.load_state_dict(found.optimizer_state)
    restore_rng(found.rng_state)
    advance(resumed, resumed_optimizer)
    for ours, theirs in zip(resumed.parameters(), straight.parameters(), strict=True):
        assert torch.equal(ours, theirs)
        for name in ("exp_avg", "exp_avg_sq", "step"):
            mine, its = (resumed_optimizer.state[ours], straight_optimizer.state[theirs])
            assert torch.equal(mine[name], its[name])


def test_states_of_another_number_of_gpus_are_refused_with_a_warning():
    state = rng_state()
    state["cuda"] = [torch.zeros(16, dtype=torch.uint8)] * (torch.cuda.device_count() + 1)
    with pytest.warns(UserWarning, match="GPUs, .* not restored"):
        restore_rng(state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64])
def test_tied_transposed_empty_and_scalar_tensors_come_back(tmp_path, dtype):
    weight = torch.arange(12).to(dtype).reshape(3, 4)
    state = {
        "embed": weight,
        "head": weight,
        "turned": weight.T,
        "empty": torch.empty(0, 4, dtype=dtype),
        "also_empty": torch.empty(0, 4, dtype=dtype),
        "scalar": torch.tensor(7, dtype=dtype),
    }
    path = save_checkpoint(
        tmp_path, 1, model_state=state, optimizer_state={}, trainer_state={}, keep_last=1
    )
    found = load_checkpoint(tmp_path, device="cpu")
    assert found is not None
    assert found.model_state.keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(found.model_state[name], tensor)
        assert found.model_state[name].dtype == dtype
    assert found.model_state["head"].data_ptr() == found.model_state["embed"].data_ptr()
    assert path == tmp_path / "checkpoints" / "step_1"


def test_keeps_the_last_k_by_number_not_by_name(tmp_path):
    for step in (8, 9, 10, 11):
        save(tmp_path, step, keep_last=2)
    assert steps_on_disk(tmp_path) == ["step_10", "step_11"]
    with pytest.raises(ValueError, match=r"checkpoint\.keep_last: got 0"):
        save(tmp_path, 12, keep_last=0)


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "cut": lambda path: os.truncate(path / "model.safetensors", 100),
    "empty": lambda path: os.truncate(path / "optimizer.pt", 0),
    "bit": lambda path: flip_a_bit(path / "model.safetensors"),
    "no manifest": lambda path: (path / "manifest.json").unlink(),
    "torn manifest": lambda path: os.truncate(path / "manifest.json", 40),
    "odd manifest": lambda path: (path / "manifest.json").write_text("[]"),
    "lost file": lambda path: (path / "rng.pt").unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_newest_falls_back_and_is_written_again(tmp_path, damage):
    for step in (1, 2):
        save(tmp_path, step)
    damage(tmp_path / "checkpoints" / "step_2")
    with pytest.warns(UserWarning, match=r"step_2: .*falling back"):
        assert loaded_step(tmp_path) == 1
    save(tmp_path, 2)
    assert loaded_step(tmp_path) == 2


def test_a_damaged_later_step_never_pushes_out_a_good_one(tmp_path):
    for step in (1, 5):
        save(tmp_path, step)
    os.truncate(tmp_path / "checkpoints" / "step_5" / "state.json", 1)
    save(tmp_path, 3, keep_last=1)
    with pytest.warns(UserWarning, match="step_5"):
        assert loaded_step(tmp_path) == 3


def test_nothing_to_load_and_leftovers_go(tmp_path):
    assert load_checkpoint(tmp_path / "none", device="cpu") is None
    (tmp_path / "checkpoints" / ".tmp-step_4-1").mkdir(parents=True)
    (tmp_path / "checkpoints" / ".tmp-step_4-1" / "model.safetensors").touch()
    (tmp_path / ".tmp-metrics.jsonl").touch()
    assert load_checkpoint(tmp_path, device="cpu") is None
    assert [path.name for path in tmp_path.rglob("*")] == ["checkpoints"]


def test_saving_a_step_twice_keeps_the_complete_one(tmp_path):
    path = save(tmp_path, 1)
    before = (path / "manifest.json").stat().st_mtime_ns
    refuse_everything = FailAt(0)
    assert save(tmp_path, 1, do=refuse_everything) == path
    assert (path / "manifest.json").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("model", "optimizer", "named"),
    [
        ({"w": torch.tensor([1.0, float("nan")])}, {}, r"model\.w"),
        ({"w": torch.tensor(float("inf"), dtype=torch.bfloat16)}, {}, r"model\.w"),
        ({}, {"state": {3: {"exp_avg": torch.tensor([float("-inf")])}}}, r"state\.3\.exp_avg"),
        ({}, {"param_groups": [{"lr": float("nan")}]}, r"param_groups\.0\.lr"),
    ],
)
def test_nan_and_infinity_are_never_saved(tmp_path, model, optimizer, named):
    save(tmp_path, 1)
    with pytest.raises(CheckpointError, match=named):
        save_checkpoint(
            tmp_path,
            2,
            model_state=model,
            optimizer_state=optimizer,
            trainer_state={},
            keep_last=1,
        )
    assert loaded_step(tmp_path) == 1


def test_truncate_drops_lost_steps_and_torn_lines_and_keeps_bytes(tmp_path):
    path = tmp_path / "metrics.jsonl"
    kept = ['{"step": 1, "x": 0.1}\n', '{"note":  "é"}\n', '{"x": null, "step": 2}\n']
    path.write_text("".join(kept) + '{"step": 3}\n[1]\n{"step": 2, "x"\n{"step": 1}', "utf-8")
    assert truncate_jsonl(path, upto=2) == 4
    assert path.read_text("utf-8") == "".join(kept)
    assert truncate_jsonl(path, upto=2) == 0
    assert truncate_jsonl(tmp_path / "missing.jsonl", upto=2) == 0
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_text_is_replaced_whole(tmp_path):
    path = tmp_path / "eval.json"
    for text in ("first", "é" * 9):
        write_text(path, text)
        assert path.read_text("utf-8") == text
    assert [entry.name for entry in tmp_path.iterdir()] == ["eval.json"]


def test_rewriting_on_a_full_disk_leaves_the_file(tmp_path):
    path = tmp_path / "paths.jsonl"
    path.write_text('{"step": 1}\n' * 1000)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, hard))
    try:
        with pytest.raises(CheckpointError, match="cannot rewrite"):
            truncate_jsonl(path, upto=1)
        with pytest.raises(CheckpointError, match="cannot write"):
            write_text(path, "x" * 6_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.stat().st_size == 12_000
    assert [entry.name for entry in tmp_path.iterdir()] == ["paths.jsonl"]


def test_an_existing_run_is_never_overwritten(tmp_path):
    run_dir = tmp_path / "a" / "run"
    with claim_run_dir(run_dir):
        pass
    with claim_run_dir(run_dir):  # claimed but never begun
        (run_dir / "config.yaml").write_text("{}")
    with pytest.raises(CheckpointError, match=r"never overwritten.*--resume .*run.*--run\.dir"):
        claim_run_dir(run_dir)
    with claim_run_dir(run_dir, resume=True):
        assert (run_dir / "config.yaml").exists()


def test_a_start_that_failed_leaves_nothing_and_one_that_wrote_stays(tmp_path):
    for name in ("failed", "wrote"):
        claim = claim_run_dir(tmp_path / name)
        if name == "wrote":
            (tmp_path / name / "config.yaml").touch()
        claim.abandon()
    assert [path.name for path in tmp_path.iterdir()] == ["wrote"]


def test_directories_that_cannot_be_runs(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="is a file"):
        claim_run_dir(tmp_path / "file")
    with pytest.raises(CheckpointError, match=r"cannot write .*writable --run\.dir"):
        claim_run_dir(tmp_path / "file" / "run")
    for missing in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(CheckpointError, match=r"is no run .*without --resume"):
            claim_run_dir(missing, resume=True)


def test_two_processes_never_write_one_run(tmp_path):
    hold = (
        "import fcntl, sys, time\n"
        "lock = open(sys.argv[1], 'a+')\n"
        "fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)\n"
        "print('held', flush=True)\n"
        "time.sleep(60)"
    )
    command = [sys.executable, "-S", "-c", hold, str(tmp_path / ".lock")]
    (tmp_path / "config.yaml").touch()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(CheckpointError, match=r"cannot lock .*process unknown"):
            claim_run_dir(tmp_path, resume=True)
        other.send_signal(signal.SIGKILL)
    with claim_run_dir(tmp_path, resume=True):  # a killed owner needs no cleaning
        refused = subprocess.run(command, capture_output=True, text=True, check=False)
        assert "BlockingIOError" in refused.stderr
        assert (tmp_path / ".lock").read_text() == f"{os.getpid()}\n"


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({"<unk>": 0, "2": 1, "+": 2}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    return tokenizer


def tiny_model(*, tied):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=tied,
    )
    return Qwen2ForCausalLM(config).eval()


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_the_export_loads_in_transformers_with_equal_logits(tmp_path, tokenizer, tied):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = tmp_path / "run" / "export"
    export_model(tiny_model(tied=not tied), tokenizer, out)
    model = tiny_model(tied=tied)
    with pytest.raises(CheckpointError, match="not empty"):
        export_model(model, tokenizer, out)
    export_model(model, tokenizer, out, replace=True)
    assert [path.name for path in out.parent.iterdir()] == ["export"]
    assert {oct(path.stat().st_mode) for path in out.iterdir()} == {
        oct((out / "config.json").stat().st_mode)
    }
    again = AutoModelForCausalLM.from_pretrained(out).eval()
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
    assert AutoTokenizer.from_pretrained(out).chat_template == tokenizer.chat_template


def test_an_export_that_fails_leaves_the_old_one(tmp_path, tokenizer):
    out = tmp_path / "export"
    model = tiny_model(tied=True)
    export_model(model, tokenizer, out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with torch.no_grad():
        model.model.norm.weight[3] = float("nan")
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight holds NaN"):
        export_model(model, tokenizer, out, replace=True)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3_000, hard))
    try:
        with pytest.raises(CheckpointError, match="cannot write the export"):
            export_model(tiny_model(tied=True), tokenizer, out, replace=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["export"]
