"""Objectives from the command line: every method trains; so does a class of the user's own, and
each of its faults is a line that names it, with status 2 and nothing left behind."""

import json
import math
import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from batches import prompted, sampled, scored, whole

from vpgea_fast import config
from vpgea_fast.cli import main
from vpgea_fast.metrics import PhaseTimer
from vpgea_fast.objectives import METHODS, Draws, Term, Terms, ask, check_terms
from vpgea_fast.rollout.engine import request_seed
from vpgea_fast.rows import Scale, build_rows, drawn_rows
from vpgea_fast.scoring import answer_likelihood
from vpgea_fast.trainer import Trainer

TINY = Path(__file__).parents[1] / "configs/tiny.yaml"
SMALL = {
    "train.questions_per_step": 2,
    "train.steps": 2,
    "rollout.max_new_tokens": 80,
    "checkpoint.export": "false",
}
OWN = """
import torch
from pydantic.dataclasses import dataclass
from vpgea_fast.objectives import STRICT, Draws, Keys, Term, Terms
from vpgea_fast.types import Score


def part(batch, weight=None, **more):
    fields = {"name": "push", "stream": "prior", "view": "student"}
    weight = -torch.ones_like(batch.prior.length_BP) if weight is None else weight
    return Term(**{**fields, "weight_BP": weight, **more})


@dataclass(frozen=True, config=STRICT)
class Mine(Keys):
    gain: float = 1.0
    paths: int = 2

    def draws(self):
        return Draws(prior=self.paths)

    def needs(self):
        return frozenset()

    def terms(self, batch, state, /):
        weight = -self.gain * (batch.prior.length_BP == batch.prior.length_BP.amin(1, keepdim=True))
        return Terms(parts=(part(batch, weight.double()),), state={"n": state.get("n", 0) + 1})
"""
DEFAULTS = {"paths": 2, "norm": "const", "norm_constant": None, "denominator": "nominal"}
NONE = """
class Plain:
    pass


@dataclass(config=STRICT)
class Melts:
    gain: float = 1.0


@dataclass(frozen=True, config=STRICT)
class Halfway(Keys):
    def draws(self):
        return Draws(prior=2)
"""
FAULTS = """
class Held:
    reference = True

    def __call__(self, weight, now, old, reference):
        return weight * now


class Scalar(Held):
    reference = False

    def __call__(self, weight, now, old, reference):
        return torch.tensor(1.0)


def shifted(batch, **more):
    return Terms(parts=(part(batch, **more),))

"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The name of a module in the working directory, which nothing else makes importable."""
    name = f"mine_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    return name


@pytest.fixture
def words(tiny_words, here):
    """Words of `vpgea train` for a class of that module."""

    def make(name="Mine", *more, run="run"):
        section = ["--objective.name", "custom", "--objective.target", f"{here}:{name}"]
        return ["train", str(TINY), *tiny_words(SMALL)(run, *section, *more)]

    return make


def refused(capsys, words):
    """The one line of an error, with status 2."""
    assert main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    assert line.startswith("vpgea: ")
    assert "Traceback" not in line
    return line


def test_a_class_in_the_working_directory_trains_and_resumes(words, here, tmp_path, capsys):
    assert main(words("Mine", "--objective.gain", "0.5", "--train.steps", "1")) == 0
    record = config.load(tmp_path / "run/config.yaml")
    section = config.as_dict(record)["objective"]
    given = {"name": "custom", "target": f"{here}:Mine", "gain": 0.5}
    assert section == DEFAULTS | given
    assert config.resolve(config.as_dict(record)) == record
    assert main(["train", "--resume", "run", "--train.steps", "2"]) == 0
    lines = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert [line["loss_push"] != 0 for line in lines] == [True, True]
    state = json.loads(Path("run/checkpoints/step_2/state.json").read_text())["trainer_state"]
    assert state["method"] == {"n": 2}
    for other in (words("Mine", "--dry-run"), ["keys", "objective"]):
        assert main(other) == 0, capsys.readouterr().err
    assert "`package.module:Class`" in capsys.readouterr().out
    line = refused(capsys, ["train", "--resume", "run", "--objective.gian", "1"])
    assert "objective.gian: unknown key; did you mean 'gain'?" in line


PAGE = (Path(__file__).parents[1] / "docs/objectives.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^\| `vpgea train tiny (.+?)` \| `(.+?)` \|$", PAGE, re.MULTILINE)
"""Options of each method's command on the page of objectives, and what turns on more of it."""


def test_the_page_of_objectives_has_a_command_for_every_method(capsys):
    assert [words for words, _ in COMMANDS] == [
        f"--objective.name {name} --train.steps 3" for name in METHODS
    ]
    for words, more in COMMANDS:
        given = shlex.split(f"{words} {more}")
        assert main(["train", str(TINY), *given, "--print-config"]) == 0, capsys.readouterr().err


@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains_the_tiny_base_with_no_more_flags(name, tiny_words, tmp_path, capsys):
    """With the demo's configuration: what only one method knows is left out of it, and said."""
    small = {**SMALL, "train.questions_per_step": 4, "train.steps": 3}
    assert main(["train", str(TINY), *tiny_words(small)("run", "--objective.name", name)]) == 0
    left_out = "leaves out the file's objective.preset" in capsys.readouterr().err
    assert left_out == (name != "vpgea")
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    norms = [json.loads(line)["grad_norm"] for line in lines]
    assert len(norms) == 3
    assert max(norms) > 0


DRAWN = "draws = lambda self: "
SAID = "terms = lambda self, batch, state: "
SHAPE = "torch.ones(2, 3, dtype=torch.float64)"
STARTS = [
    (DRAWN + "3", "draws() returned 3, expected Draws"),
    (DRAWN + "Draws()", "draws() raised ValueError: Draws: got no paths"),
    (DRAWN + "Draws(prior=-1)", "Draws.prior: got -1, expected a number of paths"),
    (DRAWN + "Draws(prior=2.5)", "Draws.prior: got 2.5, expected a number of paths"),
    (DRAWN + "Draws(posterior=1, posterior_view='pupil')", "got 'pupil', expected teacher or"),
    (DRAWN + "Draws(prior=1, posterior_who='me')", "got 'me', expected policy or posterior"),
    (DRAWN + "1 / 0", "draws() raised ZeroDivisionError: division by zero"),
    ("needs = lambda self: ['u']", "needs() returned ['u'], expected a frozenset of Score"),
    ("needs = lambda self: {'u'}", "needs() asks for 'u', expected a Score"),
    ("needs = lambda self: {Score('prior', 'student', 'end')}", "expected a Score"),
    (
        "needs = lambda self: {Score('prior', 'student', 'attempts')}",
        "asks for the attempts, of which",
    ),
    (
        "needs = lambda self: {Score('posterior', 'student', 'target')}",
        "needs() asks for target of the posterior paths, and draws() asks for none",
    ),
    (
        "needs = lambda self: {Score('prior', 'student', 'thought', 'posterior')}",
        "needs() asks for thought of the posterior policy, and draws() says of none",
    ),
    ("at = lambda self, step: None", "at(0) returned no objective"),
    ("norm: str = 'seqmean'", "norm: got 'seqmean', expected one of seq_sum, const"),
    ("norm_constant: float = -1.0", "norm_constant: got -1.0, expected a number above 0"),
    ("denominator: str = 'all'", "denominator: got 'all', expected one of nominal, effective"),
]
STEPS = [
    (SAID + "None", "terms() returned None, expected Terms with one part or more"),
    (SAID + "Terms(parts=())", "terms() returned no parts, expected Terms"),
    (SAID + "batch.prior.u_BP.view(7, 7, 7)", "terms() raised RuntimeError: shape"),
    (SAID + "Terms(parts=(3,))", "got the part 3, expected a Term"),
    (SAID + "shifted(batch, name='Push up')", "got the part 'Push up', expected a Term"),
    (SAID + "shifted(batch, stream='late')", "term 'push': stream: got 'late', expected one of"),
    (SAID + "shifted(batch, part='end')", "term 'push': part: got 'end', expected one of"),
    (SAID + "shifted(batch, who='me')", "term 'push': who: got 'me', expected one of"),
    (
        SAID + "shifted(batch, who='posterior')",
        "term 'push': trains the posterior policy, and draws() says of none",
    ),
    (SAID + "shifted(batch, part='response')", "draws() does not ask for answers"),
    (
        SAID + "shifted(batch, part='attempts')",
        "trains all right attempts of a path, but draws() asks for 0",
    ),
    (
        SAID + "shifted(batch, stream='posterior')",
        "term 'push': weight_BP is of the posterior paths, but draws() asks for none",
    ),
    (
        SAID + f"shifted(batch, weight={SHAPE})",
        "term 'push': weight_BP: got a tensor (2, 3), expected a tensor (2, 2)",
    ),
    (SAID + "shifted(batch, weight=[1.0])", "weight_BP: got [1.0], expected a tensor (2, 2)"),
    (SAID + f"shifted(batch, counted_BP={SHAPE} > 0)", "counted_BP: got a tensor (2, 3)"),
    (SAID + "shifted(batch, counted_BP=batch.prior.u_BP)", "counted_BP is torch.float64, expected"),
    (
        SAID + "shifted(batch, weight=batch.prior.closed_BP)",
        "weight_BP is torch.bool, expected torch.float64",
    ),
    (
        SAID + "shifted(batch, weight=batch.prior.u_BP)",
        "is nan, expected a finite number; columns that draws() and needs() do not ask for",
    ),
    (SAID + "shifted(batch, live=Held())", "which needs() does not ask for; add Score("),
    (
        SAID + f"Terms(parts=(part(batch),), path_scores={{'prior': {{'r': {SHAPE}}}}})",
        "path_scores 'r': got a tensor (2, 3), expected a tensor (2, 2)",
    ),
    (
        SAID + "Terms(parts=(part(batch),), metrics={'r': batch.prior.u_BP})",
        "metric 'r' is a tensor (2, 2), expected a number",
    ),
    (SAID + "Terms(parts=(part(batch),), state={1: 2})", "which JSON gives back changed"),
    (SAID + "Terms(parts=(part(batch),), state={'a': {1}})", "state: Object of type set"),
]


def with_classes(here, faults):
    """The module with a class for each fault, `F0` on: Mine with one line more."""
    lines = [OWN, FAULTS]
    for number, (line, _) in enumerate(faults):
        head = f"@dataclass(frozen=True, config=STRICT)\nclass F{number}(Mine):\n"
        lines.append(f"{head}    {line}\n")
    Path(f"{here}.py").write_text("\n".join(lines))


def test_what_no_step_could_follow_is_refused_before_any_path(words, here, capsys):
    with_classes(here, STARTS)
    for number, (_, said) in enumerate(STARTS):
        line = refused(capsys, words(f"F{number}"))
        assert f"objective custom ({here}:F{number}): " in line
        assert said in line
    assert not Path("run").exists()


@pytest.fixture
def batch():
    """Two questions with two paths of the prior each, whose answers were not verified."""
    groups = tuple(
        tuple(sampled([4, 9], question_id=name, stream="prior", index=i) for i in range(2))
        for name in ("a", "b")
    )
    prior = scored(groups, torch.full((2, 2), math.nan))
    questions = [prompted(n, student=[3], teacher=[3], cue=[5], target=[6]) for n in ("a", "b")]
    none = torch.zeros(2, 0)
    posterior = replace(
        prior, paths=((), ()), u_BP=none, length_BP=none, closed_BP=none > 0, correct_BP=none
    )
    return whole(questions, posterior, prior)


def test_what_terms_may_not_say_is_refused_with_the_objective_and_the_term(here, batch):
    with_classes(here, STEPS)
    for number, (_, said) in enumerate(STEPS):
        section = {"name": "custom", "target": f"{here}:F{number}"}
        objective = config.resolve({"objective": section}).objective
        with pytest.raises(ValueError, match=rf"objective custom \({here}:F{number}\)") as error:
            check_terms(objective, ask(objective, "terms", batch, {}), batch)
        assert said in str(error.value)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("factors", "said"),
    [
        ({}, "got none"),
        ([1.0], "got 1 numbers"),
        ([1.0, math.inf], "got 2 numbers"),
    ],
)
def test_factors_have_a_finite_number_per_token(batch, factors, said):
    keys = [path.key for path in batch.prior.flat]
    factors = dict.fromkeys(keys, torch.tensor(factors)) if factors else {}
    weight_BP = -torch.ones(2, 2, dtype=torch.float64)
    more = {"view": "student", "weight_BP": weight_BP, "factors": factors}
    terms = Terms(parts=(Term(name="push", stream="prior", **more),))
    with pytest.raises(ValueError, match="term 'push': factors of path") as error:
        build_rows(batch, terms, Scale())
    assert f"{said}; expected 2 finite numbers" in str(error.value)


def test_a_question_that_lost_a_path_may_have_any_weight(here, batch):
    """It is left out, so its weights are not looked at."""
    Path(f"{here}.py").write_text(OWN)
    section = {"name": "custom", "target": f"{here}:Mine"}
    objective = config.resolve({"objective": section}).objective
    terms = ask(objective, "terms", batch, {})
    terms.parts[0].weight_BP[1, 0] = math.nan
    with pytest.raises(ValueError, match="prior path 0 of question 'b' is nan"):
        check_terms(objective, terms, batch)
    check_terms(objective, terms, replace(batch, lost_B=torch.tensor([0, 1])))


def test_a_run_ends_with_the_line_of_what_terms_said(words, here, capsys):
    with_classes(here, [(SAID + "shifted(batch, weight=batch.prior.u_BP)", "")])
    line = refused(capsys, words("F0"))
    assert f"objective custom ({here}:F0), term 'push': the weight of prior path 0 of" in line
    assert Path("run/metrics.jsonl").read_text() == ""


def test_a_live_loss_has_a_number_per_token(words, here, capsys):
    with_classes(here, [(SAID + "shifted(batch, live=Scalar())", "")])
    line = refused(capsys, words("F0", "--train.epochs", "2"))
    assert "term 'push': live returned (), expected a number per token" in line


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("syntax", "def f(:", "invalid syntax"),
        ("leaves", "raise SystemExit(5)", "cannot import {name}: 5"),
        ("lacks", "import no_such_module_at_all", "No module named 'no_such_module_at_all'"),
    ],
)
def test_a_module_that_cannot_be_imported_is_a_line(words, here, name, text, said, capsys):
    name = f"{name}_{here}"
    Path(f"{name}.py").write_text(text)
    line = refused(capsys, [*words(), "--objective.target", f"{name}:Mine"])
    assert f"objective: cannot import {name}: " in line
    assert said.format(name=name) in line


@pytest.mark.parametrize(
    ("target", "more", "said"),
    [
        ("{own}:Nobody", {}, "{own} has no Nobody"),
        ("{own}:Plain", {}, "{own}:Plain is no frozen pydantic dataclass; decorate"),
        ("{own}:Melts", {}, "{own}:Melts is no frozen pydantic dataclass; decorate"),
        ("{own}:part", {}, "{own}:part is no frozen pydantic dataclass; decorate"),
        ("{own}:Halfway", {}, "{own}:Halfway has no needs, terms; expected draws()"),
        ("{own}_gone:Mine", {}, "cannot import {own}_gone: No module named"),
        ("{own}.Mine", {}, "got '{own}.Mine', expected package.module:Class"),
        (None, {}, "objective.target: is missing; give it a value"),
        ("{own}:Mine", {"gain": "much"}, "objective.gain: got 'much', expected a number"),
        ("{own}:Mine", {"gian": 1}, "objective.gian: unknown key; did you mean 'gain'?"),
        ("{own}:Mine", {"q": 1}, "objective.q: unknown key; known keys: name, norm,"),
    ],
)
def test_what_is_no_objective_is_refused_in_a_line(here, target, more, said):
    Path(f"{here}.py").write_text(OWN + NONE)
    section = {"name": "custom", **more}
    if target is not None:
        section["target"] = target.format(own=here)
    with pytest.raises(config.ConfigError) as error:
        config.resolve({"objective": section})
    (_, line) = str(error.value).splitlines()
    assert said.format(own=here) in line


@pytest.mark.parametrize(
    ("asks", "said"),
    [
        ("verified", "objective 'custom' verifies sampled answers, but rollout.full_answer is"),
        ("answers", "objective 'custom' trains sampled answers, but rollout.full_answer is false"),
    ],
)
def test_answers_that_are_not_sampled_cannot_be_asked_for(words, here, asks, said, capsys):
    with_classes(here, [(f"{DRAWN}Draws(prior=2, {asks}=True)", "")])
    assert said in refused(capsys, words("F0", "--rollout.full_answer", "false"))
    assert main(words("F0", "--print-config")) == 0


def test_whole_responses_need_sampled_answers():
    section = {"name": "grpo", "reward": "likelihood"}
    with pytest.raises(config.ConfigError, match="'grpo' trains sampled answers, but"):
        config.resolve({"objective": section})
    assert config.resolve({"objective": {**section, "trains": "thought"}})


# --- fields of a path in its prompt ---------------------------------------------------------------

ASKED = """
from vpgea_fast.names import Slot

def budget(slot):
    return 10 * (1 + slot.seed % 5)


@dataclass(frozen=True, config=STRICT)
class Budgets(Mine):
    def draws(self):
        both = {"posterior": 3, "prior": 3}
        return Draws(**both, fields={"budget": budget, "place": lambda slot: f"{slot.index}"})

    def needs(self):
        return frozenset({Score("prior", "student", "target")})

    def terms(self, batch, state, /):
        asked = {path.key: float(q.fields["budget"]) for q, path in batch.pairs("prior")}
        over = batch.prior.length_BP - torch.tensor([*asked.values()]).view(-1, 3).double()
        other = {"stream": "posterior", "name": "other", "view": "student"}
        parts = [part(batch, over), part(batch, torch.ones_like(over), **other)]
        return Terms(parts=tuple(parts), path_scores={"prior": {"over": over}})
"""
TEMPLATES = (
    *("--prompt.student", "{question} ={budget}", "--data.max_prompt_tokens", "24"),
    *("--prompt.teacher", "{place}: {question} hint {answer} ={budget}"),
)


@pytest.fixture
def budgets(here, words):
    """Words of a run whose paths each have two fields of their own."""
    Path(f"{here}.py").write_text(OWN + ASKED)
    return words("Budgets", *TEMPLATES)


def test_every_path_is_asked_scored_and_trained_behind_its_own_prompt(budgets):
    """The sampler's log-probs are those of the rows, which no other prompt would give."""
    cfg = config.load(budgets[1], budgets[2:])
    with Trainer(cfg) as trainer:
        stages, step = trainer.stages, 3
        collector, timer = stages.collector, PhaseTimer()
        batch, terms = collector.collect(step, timer, {})
        again, _ = collector.collect(step, timer, {})
        rows = build_rows(batch, terms, Scale())
        drawn = drawn_rows(batch, terms)
        logps = collector.path_logprobs([*drawn.values()])
        utilities = answer_likelihood(
            collector.row_logprobs,
            batch.pairs("prior"),
            u_norm=cfg.scoring.u_norm,
        )
    pairs = {path.key: (q, path) for s in ("posterior", "prior") for q, path in batch.pairs(s)}
    assert len(pairs) == 12
    for (name, stream, index), (asked, path) in pairs.items():
        seed = request_seed(0, step, name, stream, index)
        value = str(10 * (1 + seed % 5))
        assert asked.fields == {"budget": value, "place": str(index)}
        text, answer = asked.question.text, asked.question.answer
        student = stages.intake.text.prompter.shown(asked.student_ids)
        teacher = stages.intake.text.prompter.shown(asked.teacher_ids)
        assert f"{text} ={value}<|assistant|>" in student
        assert f"{index}: {text} hint {answer} ={value}<|assistant|>" in teacher
        drawn_from = asked.teacher_ids if stream == "posterior" else asked.student_ids
        assert torch.equal(drawn[path.key].context_ids, drawn_from)
    assert len({asked.fields["budget"] for asked, _ in pairs.values()}) > 2
    for row, values in zip(drawn.values(), logps, strict=True):
        torch.testing.assert_close(values.float(), row.sample_logps, atol=2e-4, rtol=1e-4)
    for row in rows:
        assert row.path is not None
        assert torch.equal(row.context_ids, pairs[row.path][0].student_ids)
    torch.testing.assert_close(batch.prior.u_BP.flatten(), utilities.double())
    first = [path.z_ids.tolist() for path in batch.prior.flat]
    assert first == [path.z_ids.tolist() for path in again.prior.flat]


def test_a_run_with_fields_trains_and_evaluates(budgets, tiny_world, capsys):
    words = ["--train.steps", "1", "--eval.data", str(tiny_world.test_path), "--eval.limit", "2"]
    assert main([*budgets, *words]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"student prompt: .* =[1-5]0<\|assistant\|>", shown)
    assert json.loads(Path("run/metrics.jsonl").read_text())["loss_other"] != 0


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--prompt.student", "{question}", "--prompt.teacher", "{question}"], "field {budget},"),
        (["--prompt.student", "{question} {budgit}"], "prompt.student: nothing fills {budgit}; "),
        (["--prompt.answer_cue", "{budget}: \\boxed"], "answer_cue: nothing fills {budget};"),
        (["--objective", "vpgea"], "nothing fills {budget}; expected {question}, {answer}. An"),
        (["--data.max_prompt_tokens", "10"], "longer than 10 tokens"),
    ],
)
def test_a_field_that_nobody_gives_or_shows_is_refused_at_the_start(budgets, more, said, capsys):
    if "vpgea" in more:
        at = budgets.index("--objective.target")
        budgets = [*budgets[:at], *budgets[at + 2 :]]
    assert said in refused(capsys, [*budgets, *more])
    assert not Path("run").exists()


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("1 / 0", "raised ZeroDivisionError: division by zero"),
        ("None", "got None, expected text or a whole number"),
        ("True", "got True, expected text or a whole number"),
        ("'<think>'", "spells a special token of this model"),
        ("'1' * (1 + 50 * slot.step)", "tokens, expected at most 24; raise data.max_prompt_tokens"),
    ],
)
def test_a_value_that_no_prompt_may_hold_is_refused(budgets, here, value, said, capsys):
    text = ASKED.replace("10 * (1 + slot.seed % 5)", value)
    Path(f"{here}.py").write_text(OWN + text)
    assert said in refused(capsys, budgets)


@pytest.mark.parametrize("name", ["question", "answer", "Budget", "a b", ""])
def test_a_field_has_a_name_of_its_own(name):
    no_function: Any = 3
    with pytest.raises(ValueError, match=r"Draws\.fields: got"):
        Draws(prior=1, fields={name: lambda _: 1})
    with pytest.raises(ValueError, match="a function of a Slot"):
        Draws(prior=1, fields={"budget": no_function})


# --- responses of the data ------------------------------------------------------------------------


@pytest.fixture
def given(tiny_words, tmp_path):
    """Words of a run of `sft` on questions with these responses."""

    def make(responses, *more):
        rows = [
            {"id": f"q{i}", "question": "4 A+three B-five", "answer": "2", "solution": response}
            for i, response in enumerate(responses)
        ]
        file = tmp_path / "given.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        section = {**SMALL, "data.train": file, "objective": "sft", "train.steps": 1}
        return ["train", str(TINY), *tiny_words(section)("run", *more)]

    return make


def test_given_responses_are_the_thought_and_the_answer_that_they_spell(given):
    thought = " A+three47 B-five72"
    words = given([thought, f"<think>{thought}</think>\\boxed{{2 }}"])
    with Trainer(config.load(words[1], words[2:])) as made:
        collector = made.stages.collector
        _, prior = collector.sample(collector.questions, 0)
        decode = made.stages.intake.text.tokenizer.decode
    assert len(prior) == 2
    for (path,) in prior:
        assert decode(path.z_ids) == f"{thought}</think>"
        assert decode(path.answer_ids) == "\\boxed{2 }</s>"
        assert (path.closed, path.finish) == (True, "stop")
        assert path.logps.isnan().all()


@pytest.mark.parametrize(
    ("responses", "more", "said"),
    [
        ([" A", None], [], "line 2: got 0 responses, expected 1 (1 of 2"),
        ([" A", " A"], ["--objective.responses", "2"], "got 1 responses, expected 2 (2 of 2 "),
        (
            [" A" * 90, " A", " A" * 120],
            [],
            "91 tokens, expected at most 80 (2 responses of 3 questions are too long, this part of",
        ),
        (
            [" A", None, None],
            ["--train.questions_per_step", "3"],
            "line 2: got 0 responses, expected 1 (2 of 3 questions have too few); set data.resp",
        ),
        ([" A", 3], [], "expected a response under 'solution', text or a list of texts, got 3"),
        ([" A", "a</think>b</think>"], [], "'q1': its response spells a special token of this"),
        ([" A", " A"], ["--rollout.importance_cap", "2"], "which no engine drew, with rollout.imp"),
    ],
)
def test_responses_that_cannot_be_imitated_are_refused_at_the_start(
    given, responses, more, said, capsys
):
    assert said in refused(capsys, given(responses, *more))


def test_sft_says_nothing_of_the_student_and_samples_nothing(given, tmp_path, capsys):
    """Its paths are the data's: their accuracy is no model's, and no token was sampled."""
    assert main(given([" A+three47 B-five72"] * 2, "--metrics.compare", "null")) == 0
    told = capsys.readouterr().out
    (line,) = [said for said in told.splitlines() if said.startswith("step 1/1")]
    assert "acc" not in line
    assert "eps3" not in line
    assert "sft: 1 steps x 2 questions x 1 responses = 2 of the data" in told
    (step,) = map(json.loads, (tmp_path / "run/metrics.jsonl").read_text().splitlines())
    assert not {key for key in step if key.endswith(("student", "prior"))}
    assert (step["acc_data"], step["len_data"], step["tokens_generated"]) == (1.0, 9.0, 0)
    assert "train.max_tokens 9 is never reached" in refused(
        capsys, given([" A"], "--train.max_tokens", "9", "--optim.schedule", "constant")
    )
