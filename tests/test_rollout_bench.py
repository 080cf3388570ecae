"""benchmarks/rollout_bench.py in process: who is right, and what it says at the end."""

import importlib
import json
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.around

ROOT = Path(__file__).parents[1]
FEW = "--questions 2 --paths 2 --tokens 5 --prompt 3 --layers 1 --hidden 64 --vocabulary 50".split()
TWO = ("--engines", "hf", "generate")


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("rollout_bench")


@pytest.mark.parametrize("model", [[], ["--model", "tiny"]])
def test_hf_and_generate_draw_equally_many_tokens(bench, tmp_path, monkeypatch, capsys, model):
    monkeypatch.chdir(tmp_path)
    bench.main([*FEW, *TWO, *model, "--repeats", "2", "--out", "out.json"])
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]
    result = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    hf, generate = result["rows"]
    assert (hf["engine"], generate["engine"]) == ("hf", "generate")
    for row in (hf, generate):
        assert row["gap"] <= 1e-4
        assert row["tokens_per_s"] == pytest.approx(5 * row["paths_per_s"])
        assert row["kinds"]["products"] > 0
    assert hf["prefix_hit_rate"] == 0.5
    *_, ratio, bound = result["words"]
    assert ratio.startswith("hf draws ")
    assert bound.startswith("the matrix products of hf take ")
    assert ratio in capsys.readouterr().out


def test_an_engine_with_wrong_log_probs_is_not_timed(bench, monkeypatch):
    """`generate` that samples another model than the one which is asked for log-probs."""
    right = bench.Generate.generate

    def other(self, requests, sampling, **named):
        with torch.no_grad():
            self.model.lm_head.weight[7] += 1.0
        try:
            return right(self, requests, sampling, **named)
        finally:
            with torch.no_grad():
                self.model.lm_head.weight[7] -= 1.0

    monkeypatch.setattr(bench.Generate, "generate", other)
    with pytest.raises(SystemExit, match=r"generate: log-probs are off by .*; not timed"):
        bench.main([*FEW, *TWO])


def test_it_ends_in_words(bench):
    kinds = {"products": 0.5, "attention": 0.1, "drawing": 0.0, "other": 0.2, "rest": 0.2}
    hf = {"engine": "hf", "seconds": [1.0, 1.1, 0.9], "kinds": kinds}
    generate = {"engine": "generate", "seconds": [2.0, 2.2, 1.8], "kinds": kinds}
    said = "matrix products 50%, other operations 20%, Python and dispatch 20%, attention 10%"
    assert bench.closing_words([hf, generate], cuda=False) == [
        f"hf: {said}",
        f"generate: {said}",
        "hf draws 2.00x the paths per second of generate (by round 2.00 to 2.00)",
        "the matrix products of hf take 0.500 s of 1.000 s: alone they would be 4.00x generate",
    ]
    compiled = {"engine": "compiled", "seconds": [0.5, 0.4, 0.6]}
    *_, hf_beside, beside, bound = bench.closing_words([hf, compiled, generate], cuda=False)
    assert hf_beside.startswith("hf draws 2.00x ")
    assert beside.startswith(
        "compiled draws 4.00x the paths per second of generate (by round 3.00 to"
    )
    assert bound.startswith("the matrix products of hf take")
    assert bench.closing_words([hf], cuda=False) == [f"hf: {said}"]
