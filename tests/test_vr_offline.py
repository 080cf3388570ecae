"""The recipe of docs/vr.md that goes from model to model: its own commands, on the tiny base."""

import json
import math
import re
import shlex
from collections import Counter, defaultdict
from pathlib import Path

import pytest
import torch
from chat_models import save_hollow_qwen3
from test_formulas import logps_of

from vpgea_fast import config
from vpgea_fast.check import target
from vpgea_fast.cli import main
from vpgea_fast.estimate import GIB, RESERVE, choose, estimate_memory, model_shape
from vpgea_fast.metrics import PhaseTimer
from vpgea_fast.rollout.factory import positions
from vpgea_fast.trainer import Trainer
from vpgea_fast.verify import Verifier
from vpgea_fast.weights import load_config

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/vr.md").read_text(encoding="utf-8")
STAGES = {
    Path(words[words.index("--run.dir") + 1]).name: words[3:]
    for line in re.findall(r"^vpgea train vr-4b (?:\\\n|.)+", PAGE, re.MULTILINE)
    if (words := shlex.split(line.replace("\\\n", " ")))
}
"""Name of a stage -> the words of its command behind `vpgea train`."""
TINY = config.load(ROOT / "configs/vr-tiny.yaml")
QUESTIONS, K, J = 5, 3, 4
RECORDS = ("traces", "weights", "originals")


def of_the_page(stage, world, tmp_path, *more):
    """The words of a stage, on the tiny world. Behind them, so that it wins, stands what only the
    size of it asks for: each key here is of the model, the data or a length."""
    small = {
        "model.dtype": "float64",
        "model.device": "cpu",
        "model.activation_checkpointing": "none",
        "data.train": world.train_path,
        "data.question_key": "question",
        "data.answer_key": "answer",
        "data.solution_key": "solution",
        "data.response_key": "solution",
        "data.max_prompt_tokens": 64,
        "data.limit": QUESTIONS,
        "rollout.max_new_tokens": 120,
        "rollout.max_answer_tokens": 6,
        "rollout.max_batch": 64,
        "scoring.answer_samples": J,
        "scoring.answer_temperature": 2.6,
        "verify.name": "number",
        "verify.workers": 1,
        "optim.warmup_steps": 0,
        "train.questions_per_step": 2,
        "train.steps": 3 if stage in RECORDS else 2,
        "train.micro_batch_tokens": 4096,
        "metrics.diag_every": 0,
        "metrics.figure": "false",
    }
    if "sft" not in STAGES[stage]:
        small["objective.group_size"] = K
    if stage != "originals":  # whose norm nothing reads
        small["objective.norm_constant"] = 11.0
    words = [str(tmp_path / w) if w.startswith("runs/") else w for w in STAGES[stage]]
    words = [w.replace("runs/", f"{tmp_path}/runs/") if w.startswith("[") else w for w in words]
    if "--model.path" not in words:  # the base, which has to be said here
        words += ["--model.path", str(world.base_dir)]
    if stage == "traces":
        words[words.index("--engine") + 1] = "hf"
        at = words.index("--engine.gpu_memory")
        del words[at : at + 2]
    for key in ("student", "teacher", "think_open", "think_close", "think_prefix", "answer_cue"):
        small[f"prompt.{key}"] = getattr(TINY.prompt, key)
    small["prompt.answer_target"] = TINY.prompt.answer_target
    own = [word for key, value in small.items() for word in (f"--{key}", str(value))]
    return [*words, *own, *more]


@pytest.fixture(scope="module")
def recipe(tiny_world, tmp_path_factory):
    """All stages in the order of the page, each run by its command. `recipe(stage)` is its run
    directory, `recipe.words(stage, ...)` its words."""
    tmp_path = tmp_path_factory.mktemp("recipe")

    def words(stage, *more):
        return of_the_page(stage, tiny_world, tmp_path, *more)

    for stage in STAGES:
        assert main(["train", str(ROOT / "configs/vr-4b.yaml"), *words(stage)]) == 0, stage
    return tmp_path / "runs/vr-4b", words


@pytest.fixture(scope="module")
def shape_4b(tiny_tokenizer, tmp_path_factory):
    return model_shape(
        load_config(str(save_hollow_qwen3(tmp_path_factory.mktemp("4b"), tiny_tokenizer)))
    )


def lines(run, stream=None):
    found = [json.loads(line) for line in (run / "paths.jsonl").read_text().splitlines()]
    return [line for line in found if stream in (None, line["stream"])]


def loaded(run):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(run / "export", dtype=torch.float64).eval()


def prompts(words):
    """The prompted questions of a run, by id."""
    from vpgea_fast.intake import ALONE, open_text, read

    cfg = config.load(ROOT / "configs/vr-4b.yaml", words)
    with Verifier.configured(cfg.verify) as verifier:
        intake = read(cfg, open_text(cfg), verifier.accepts_itself, ALONE)
    return {q.question.id: q for q in intake.questions}


def right_answers(line):
    return [line["attempt_ids"][i] for i in line["attempts"] if line["attempt_right"][i]]


def test_every_stage_is_on_the_page():
    expected = ["theta0", "phi", "traces", "weights", "originals", "theta-17k", "theta-1k"]
    assert [*STAGES] == expected


def test_the_record_holds_every_question_and_trains_nothing(recipe):
    run, _ = recipe
    traces = Counter(line["question_id"] for line in lines(run / "traces"))
    # Five questions in steps of two: the last step has the one that is left.
    assert sorted(traces.values()) == [K] * QUESTIONS
    assert not (run / "traces/export").exists()
    for stage in RECORDS:
        steps = [json.loads(x) for x in (run / stage / "metrics.jsonl").read_text().splitlines()]
        assert [step["grad_norm"] for step in steps] == [0.0] * 3
    for stage in ("theta0", "phi", "theta-17k", "theta-1k"):
        steps = [json.loads(x) for x in (run / stage / "metrics.jsonl").read_text().splitlines()]
        assert min(step["grad_norm"] for step in steps) > 0


@pytest.mark.parametrize("stage", STAGES)
def test_the_dry_run_says_what_a_stage_needs(stage, recipe, capsys):
    _, words = recipe
    assert main(["train", str(ROOT / "configs/vr-4b.yaml"), *words(stage, "--dry-run")]) == 0
    shown = capsys.readouterr().out
    table = {line[2:19].strip() for line in shown.splitlines() if line.startswith("  ")}
    # What only records has no optimiser and no gradient; what only reads, no engine's cache.
    assert ({"optimiser", "gradients"} <= table) == (stage not in RECORDS)
    assert ("optimiser" in table) == ("gradients" in table)
    assert ("activations" in table) == (stage not in ("traces", "originals"))
    assert ("kv cache" in table) == (stage in ("traces", "weights"))
    passes = "one pass over 5 questions takes " + ("3 steps" if stage in RECORDS else "2 steps")
    assert passes in shown


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_fits_80_gb_at_its_limits(stage, shape_4b):
    """Prompts, thoughts and answers as long as its keys allow, on eight devices."""
    cfg = config.load(ROOT / "configs/vr-4b.yaml", STAGES[stage]).asked
    on = target(cfg, processes=8, device_gib=79.2)
    asked = {
        "world": 8,
        "context": positions(cfg),
        "prompt": cfg.data.max_prompt_tokens,
        "device_bytes": on.device_bytes,
    }
    choice = choose(lambda: shape_4b, cfg, cuda=True, **asked)
    found = estimate_memory(shape_4b, choice.made(cfg), **asked)
    assert found.peak <= (1 - RESERVE) * on.device_bytes
    assert on.device_bytes - found.peak >= 5 * GIB


@pytest.mark.slow
def test_the_stages_fit_the_machine_that_the_configuration_names(tiny_tokenizer, tmp_path, capsys):
    """Eight devices of 80 GB; the paper's data is not at hand, so 200 questions stand in."""
    model = save_hollow_qwen3(tmp_path / "qwen3", tiny_tokenizer)
    parts = {"think_content": "so " * 50, "solution_content": "It is \\boxed{5}."}
    rows = [{"question_content": f"{n} + {5 - n}?", **parts} for n in range(200)]
    data = tmp_path / "stratos.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    peaks = {}
    for stage in ("theta0", "phi", "traces", "originals"):
        words = [*STAGES[stage], "--model.path", str(model), "--data.train", str(data)]
        machine = ["--dry-run", "--processes", "8", "--device-gib", "79.2"]
        assert main(["train", str(ROOT / "configs/vr-4b.yaml"), *words, *machine]) == 0
        shown = capsys.readouterr().out
        assert "memory estimate for one of 8 devices: 4022.5 M parameters" in shown
        assert "more than it holds" not in shown
        assert "set engine vllm" not in shown
        (peak,) = re.findall(r"peak ([0-9.]+) GiB", shown)
        peaks[stage] = float(peak)
    head = (ROOT / "configs/vr-4b.yaml").read_text()
    said = re.search(r"of a training stage on each of\s*# eight GPUs of 80 GB: (\d+) GiB", head)
    assert said is not None
    assert int(said[1]) == pytest.approx(max(peaks["theta0"], peaks["phi"]), abs=0.55)


def test_recorded_weights_are_those_of_the_formula(recipe):
    """w_k by log pi of theta0, the recorded log q of phi, and the verdicts."""
    run, words = recipe
    asked, theta0, phi = prompts(words("weights")), loaded(run / "theta0"), loaded(run / "phi")
    drawn = {(x["question_id"], x["index"]): x for x in lines(run / "traces")}
    by_question = defaultdict(list)
    for line in lines(run / "weights"):
        question, z = asked[line["question_id"]], torch.tensor(line["ids"])
        source = drawn[line["question_id"], line["index"]]
        assert source["ids"] == line["ids"]
        log_q = torch.tensor(source["logps"], dtype=torch.float64)
        # The sampler's, float32: of phi behind the teacher's prompt, at the sampling temperature.
        assert torch.allclose(log_q, logps_of(phi, question.teacher_ids, z, 0.7), atol=1e-5)
        log_pi = logps_of(theta0, question.student_ids, z, 0.7)
        right = right_answers(line) if line["closed"] else []
        rho = math.exp((log_pi - log_q).mean().item()) * len(right) / J
        by_question[line["question_id"]].append((rho, line["share"]))
        assert ("attempts" in line) == line["closed"]
    kinds = set()
    for pairs in by_question.values():
        whole = sum(rho for rho, _ in pairs)
        kinds |= {bool(rho) for rho, _ in pairs}
        for rho, share in pairs:
            assert share == pytest.approx(rho / whole if whole else 0.0, abs=1e-9)
    assert kinds == {True, False}


def test_weights_are_replayed_bit_for_bit_and_no_answer_is_drawn_again(recipe, tmp_path):
    run, words = recipe
    again = ["--run.dir", str(tmp_path / "again"), "--run.seed", "0"]
    record = run / "weights/paths.jsonl"
    own = [*words("weights", *again), "--engine.paths", f"[{record}]"]
    assert main(["train", str(ROOT / "configs/vr-4b.yaml"), *own]) == 0
    assert (tmp_path / "again/paths.jsonl").read_bytes() == record.read_bytes()
    # Other verdicts, other weights: they are read.
    changed = lines(run / "weights")
    for line in changed:
        line["attempt_right"] = [not right for right in line.get("attempt_right", ())]
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps(line) + "\n" for line in changed))
    own = [*words("weights"), "--run.dir", str(tmp_path / "b"), "--engine.paths", f"[{other}]"]
    assert main(["train", str(ROOT / "configs/vr-4b.yaml"), *own]) == 0
    pairs = zip(lines(tmp_path / "b"), lines(run / "weights"), strict=True)
    assert any(a["answered"] != b["answered"] for a, b in pairs)


def test_a_record_without_its_answers_or_with_others_is_refused(recipe, tmp_path, capsys):
    run, words = recipe
    bare = [
        {key: value for key, value in line.items() if not key.startswith("attempt")}
        for line in lines(run / "weights")
    ]
    file = tmp_path / "bare.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in bare))
    for number, (more, said) in enumerate(
        [
            (["--engine.paths", f"[{file}]"], "weight is recorded without answers behind its"),
            (["--scoring.answer_samples", "9"], "4 answers are recorded behind path"),
        ]
    ):
        own = words("theta-1k", "--run.dir", str(tmp_path / str(number)), *more)
        assert main(["train", str(ROOT / "configs/vr-4b.yaml"), *own]) == 2
        assert said in capsys.readouterr().err


@pytest.mark.parametrize("stage", ["theta-17k", "theta-1k"])
def test_the_last_stage_descends_the_weighted_likelihood(stage, recipe, tmp_path):
    run, words = recipe
    known = defaultdict(list)
    for line in lines(run / "weights"):
        known[line["question_id"]].append(line)
    originals = {line["question_id"]: line for line in lines(run / "originals")}
    cfg = config.load(ROOT / "configs/vr-4b.yaml", words(stage, "--run.dir", str(tmp_path / "run")))
    used = Counter()
    with Trainer(cfg) as trainer:
        rows = trainer.draw().rows
        model = trainer.stages.policy.causal_lm
        trainer.stages.gradients.accumulate(rows)
        found = [p.grad.clone() for p in model.parameters()]
        trainer.stages.optimizer.zero_grad(set_to_none=True)
        questions = trainer.stages.collector.collect(0, PhaseTimer(), {})[0].questions
        loss = torch.zeros((), dtype=torch.float64)
        for question in questions:
            x, traces = question.student_ids, known[question.question.id]
            shares = [line["share"] for line in traces]
            if stage == "theta-17k":
                best = shares.index(max(shares))
                shares = [float(k == best and share > 0) for k, share in enumerate(shares)]
                own = originals[question.question.id]
                response = torch.tensor(own["ids"] + own["answer_ids"])
                loss -= logps_of(model, x, response).sum()
                used["original"] += 1
            for line, share in zip(traces, shares, strict=True):
                if not share:
                    continue
                used["weighted" if share < 1 else "whole"] += 1
                z = torch.tensor(line["ids"])
                answers = right_answers(line)[: 1 if stage == "theta-17k" else None]
                behind = [
                    logps_of(model, torch.cat([x, z]), torch.tensor(ids)).sum() for ids in answers
                ]
                loss -= share * (logps_of(model, x, z).sum() + sum(behind) / len(behind))
        (loss / (len(questions) * 11.0)).backward()
        expected = [p.grad for p in model.parameters()]
        gap = max((a - b).abs().max().item() for a, b in zip(found, expected, strict=True))
        size = max(b.abs().max().item() for b in expected)
    assert gap <= 1e-9 * max(1.0, size)
    assert used["original"] == (2 if stage == "theta-17k" else 0)
    assert used["weighted"] > 0 if stage == "theta-1k" else used["whole"] > 0
