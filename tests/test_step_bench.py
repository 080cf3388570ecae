"""benchmarks/step_bench.py in process, on a few short paths: what it checks, counts and says."""

import importlib
import importlib.util
import json
import time
import types
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.around

ROOT = Path(__file__).parents[1]
needs_trl = pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="needs trl")


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("step_bench")


@pytest.fixture
def engines(bench):
    return importlib.import_module(bench.Trl.__module__)


@pytest.fixture
def kinds(bench):
    return importlib.import_module(bench.profiled.__module__)


@needs_trl
@pytest.mark.filterwarnings("default")
def test_both_train_the_same_before_a_step_is_timed(bench, tmp_path, capsys):
    """Four paths of the tiny base: both gradients are those of float64, then equal work."""
    out = tmp_path / "result.json"
    assert bench.main(["--quick", "--repeats", "2", "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert text.index("TRL on the same paths: ok") < text.index("one GRPO step of 4 paths")
    result = json.loads(out.read_text(encoding="utf-8"))
    ours, trl = (result["correctness"][name] for name in ("ours", "TRL"))
    for checked in (ours, trl):
        assert 0 < checked["error_logp"] <= 1e-5
        assert 0 < checked["error_gradient"] <= 1e-5
    assert trl["check_tokens"] > ours["check_tokens"]  # it pads
    assert result["environment"]["peers"]["trl"]
    assert result["command"].startswith("python benchmarks/step_bench.py --quick")
    ours, trl = result["records"]
    assert (ours["engine"], trl["engine"]) == ("ours", "TRL")
    assert ours["tokens"] == trl["tokens"] > 4 * 2
    for record in (ours, trl):
        assert record["tokens_per_s"] * record["p50_s"] == pytest.approx(record["tokens"])
        assert len(record["seconds"]) == 2
        phases = [record[f"{part}_s"] for part in bench.PARTS]
        # Medians of each phase, so their sum is the median step's only about.
        assert 0.5 * min(record["seconds"]) < sum(phases) < 1.5 * max(record["seconds"])
        assert record["rollout_s"] > 0
        assert record["train_s"] > 0
        assert record["sync_s"] < 0.01 * record["p50_s"]  # the trained module samples
        # Gradients are added, moments are held: two of the size of the parameters, and these.
        size = 4 * result["parameters"] / 2**20
        assert record["added_mib"] > size
        assert record["held_mib"] == pytest.approx(3 * size, rel=0.01)
        assert record["peak_mib"] == record["added_mib"] + record["held_mib"]
        assert all(place["products"] > 0 for place in record["kinds"].values())
    assert result["faster"] == trl["p50_s"] / ours["p50_s"]
    assert len(result["faster_by_round"]) == 2
    assert result["added_of_trl"] == ours["added_mib"] / trl["added_mib"]
    packed = "".join(text.split())  # a console folds long lines
    assert all("".join(line.split()) in packed for line in result["words"])


@needs_trl
@pytest.mark.filterwarnings("default")
def test_nothing_is_timed_when_they_train_another_loss(
    bench, engines, tmp_path, capsys, monkeypatch
):
    """TRL's mean over all tokens instead of the mean over each path's."""
    base = engines.TrlTrainer
    right = base.open
    monkeypatch.setattr(
        base, "open", lambda self, *a, **w: right(self, *a, **(w | {"loss_type": "bnpo"}))
    )
    out = tmp_path / "result.json"
    assert bench.main(["--quick", "--out", str(out)]) == 1
    text = capsys.readouterr().out
    assert "ours on the same paths: ok" in text
    assert "TRL on the same paths: refused" in text
    assert "nothing is timed" in text
    assert not out.exists()


def test_lengths_are_a_function_of_the_path(engines):
    equal = engines.Lengths(20, 0.0)
    assert {equal(f"q{i}", i) for i in range(9)} == {20} == {equal.longest}
    spread = engines.Lengths(60, 0.6)
    drawn = [spread(f"q{i // 8}", i % 8) for i in range(4000)]
    assert drawn == [spread(f"q{i // 8}", i % 8) for i in range(4000)]
    assert drawn != [engines.Lengths(60, 0.6, seed=1)(f"q{i // 8}", i % 8) for i in range(4000)]
    assert 2 <= min(drawn) < max(drawn) <= spread.longest == 240
    # The cap at 4 means takes a little of the mean.
    assert sum(drawn) / 4000 == pytest.approx(60, rel=0.05)
    assert torch.tensor(drawn).log().std().item() == pytest.approx(0.6, rel=0.05)


def test_a_path_ends_at_its_length_and_nowhere_before(engines):
    """Three rows of lengths 1, 2 and 3 behind a prompt of four tokens; 0 ends, 5 does so too."""
    ends = engines.EndsAt([1, 2, 3], [0, 5])
    ends.width = 4
    for step in range(3):
        scores = ends(torch.zeros(3, 4 + step, dtype=torch.int64), torch.ones(3, 6))
        for row in range(3):
            alive = scores[row].isfinite().nonzero()[:, 0].tolist()
            assert alive == ([0] if row == step else [1, 2, 3, 4])


def test_rows_of_trl_fill_the_budget_in_equal_parts(bench):
    assert bench.rows_per_batch(paths=32, widest=100, budget=850) == 8
    assert bench.rows_per_batch(paths=12, widest=100, budget=599) == 4
    assert bench.rows_per_batch(paths=12, widest=100, budget=50) == 1


def record(name, seconds, **more):
    phases = {"rollout_s": 0.6, "score_s": 0.0, "train_s": 0.4, "sync_s": 0.0, "other_s": 0.0}
    phases = {key: value * seconds for key, value in phases.items()}
    place = {"products": 0.1, "attention": 0.0, "drawing": 0.001, "other": 0.1, "rest": 0.3}
    whole = {"rollout": place, "outside": place}
    return {"engine": name, "p50_s": seconds, "kinds": whole, **phases, **more}


def test_it_ends_in_words(bench):
    ours = record("ours", 1.0, tokens_per_s=3000.0, added_mib=30.0, peak_mib=130.0)
    trl = record("TRL", 3.5, tokens_per_s=857.1, added_mib=100.0, peak_mib=200.0)
    memory = (
        "tiny: our step adds 30 MiB, 0.30 of TRL's (gradients alone are 10); with parameters and "
        "optimiser 130 beside 200"
    )
    result = {
        "records": [ours, trl],
        "parameters": 10 * 2**18,
        "environment": {"device": "cpu"},
        "faster": 3.5,
        "faster_by_round": [3.2, 3.5, 3.6],
        "added_of_trl": 0.3,
    }
    assert bench.closing_words(result, "tiny") == [
        "tiny: ours is 3.50x as fast: ours 3000 tok/s, TRL 857 (by round 3.20 to 3.60)",
        memory,
        "ours: rollout 60%, train 40% of 1.000 s",
        "  rollout: Python and dispatch 60%, matrix products 20%, other operations 20%",
        "  beside the rollout: Python and dispatch 60%, matrix products 20%, other operations 20%",
        "TRL: rollout 60%, train 40% of 3.500 s",
        "  rollout: Python and dispatch 60%, matrix products 20%, other operations 20%",
        "  beside the rollout: Python and dispatch 60%, matrix products 20%, other operations 20%",
        "tiny: our matrix products take 0.200 s; alone they would be 17.5x as fast as TRL's step",
    ]
    slower = bench.closing_words(result | {"faster": 0.5}, "tiny")
    assert slower[0].startswith("tiny: TRL is 2.00x as fast")


def test_seconds_are_sorted_by_kind_and_place(kinds):
    """Microseconds by hand: a rollout of 100 with 60 of operations, then 50 with 45."""
    host = torch.autograd.DeviceType.CPU

    def event(name, start, end, self_us):
        span = types.SimpleNamespace(start=start, end=end, elapsed_us=lambda: end - start)
        return types.SimpleNamespace(
            name=name, time_range=span, self_cpu_time_total=self_us, device_type=host
        )

    events = [
        event(kinds.ROLLOUT, 0, 100, 40),
        event("aten::linear", 10, 60, 10),
        event("aten::addmm", 15, 55, 40),
        event("aten::cumsum", 70, 80, 10),
        event("autograd::engine::evaluate_function: MmBackward0", 110, 140, 5),
        event("aten::mm", 115, 135, 20),
        event("aten::_scaled_dot_product_flash_attention_for_cpu", 140, 165, 25),
    ]
    found = kinds.sorted_out(events, 200e-6, cuda=False)
    whole = {"products": 40e-6, "attention": 0.0, "drawing": 10e-6, "other": 10e-6, "rest": 40e-6}
    assert found["rollout"] == pytest.approx(whole)
    whole = {"products": 20e-6, "attention": 25e-6, "drawing": 0.0, "other": 0.0, "rest": 55e-6}
    assert found["outside"] == pytest.approx(whole)
    assert kinds.kind_of("sm90_xmma_gemm_bf16bf16_f32", cuda=True) == "products"
    assert kinds.kind_of("void at::native::elementwise_kernel", cuda=True) == "other"
    assert kinds.kind_of("Optimizer.step#AdamW.step") is None


def test_a_real_profile_holds_the_products_of_the_call(kinds):
    left = torch.randn(64, 256)
    start = time.perf_counter()

    def call():
        for _ in range(3):
            left @ left.T

    found = kinds.profiled(call, torch.device("cpu"))
    wall = time.perf_counter() - start
    assert found["rollout"] == dict.fromkeys(found["rollout"], 0.0)
    assert 0 < found["outside"]["products"] < sum(found["outside"].values()) <= wall


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--questions", "0"], "expected at least 1"),
        (["--group", "1"], "at least 2"),
        (["--sigma", "-1"], "expected 0 or more"),
        (["--trl-batch", "3"], "expected a divisor of the paths"),
        (["--model", "8b"], "invalid choice"),
        (["--model", "qwen2.5-1.5b"], "does not fit this machine's memory twice; take a smaller"),
    ],
)
def test_bad_words_say_what_to_do(bench, capsys, monkeypatch, words, said):
    monkeypatch.setattr(bench, "free_memory", lambda: 2**34)
    with pytest.raises(SystemExit):
        bench.main(words)
    assert said in capsys.readouterr().err


def test_without_trl_it_says_so(bench, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "version", lambda _: None)
    assert bench.main(["--quick", "--out", str(tmp_path / "x.json")]) == 2
    assert "trl is not installed" in capsys.readouterr().out
    assert not (tmp_path / "x.json").exists()
