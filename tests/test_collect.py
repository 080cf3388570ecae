"""A step's batch, from questions to rows: what it loses, counts, plans and refuses."""

import functools
import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from batches import losing, prompted, sampled, scored, whole
from pydantic.dataclasses import dataclass

from vpgea_fast import config, diagnostics
from vpgea_fast.build import introduction
from vpgea_fast.check import draws, longest
from vpgea_fast.distributed import World
from vpgea_fast.measure import Measure
from vpgea_fast.metrics import PhaseTimer
from vpgea_fast.objectives import STRICT, Dapo, Draws, Grpo, Keys, Term, Terms, at_step
from vpgea_fast.objectives.checks import check_objective, check_terms
from vpgea_fast.objectives.length_rewards import O1Pruner
from vpgea_fast.objectives.surrogate import Surrogate
from vpgea_fast.rollout.engine import Sampling, split_path
from vpgea_fast.rollout.hf import HFEngine
from vpgea_fast.rows import Scale, build_rows
from vpgea_fast.scoring import thought_text, wrong_answers
from vpgea_fast.spans import Tag
from vpgea_fast.trainer import Trainer
from vpgea_fast.types import SampleRequest, Score, TrainRow

TINY = Path(__file__).parents[1] / "configs/tiny.yaml"
SMALL = {
    "train.questions_per_step": 3,
    "train.steps": 1,
    "rollout.max_new_tokens": 60,
    "checkpoint.export": "false",
    "metrics.diag_every": 0,
}


def give_up_the_first(monkeypatch):
    generate = HFEngine.generate

    def lossy(*args):
        first, *others = generate(*args)
        return [losing(first), *others]

    monkeypatch.setattr(HFEngine, "generate", lossy)


@pytest.mark.parametrize("more", [["grpo", "--objective.kl_coef", "0.1"], ["rlt"]])
def test_a_lost_path_has_no_log_probs_to_ask_for(more, tiny_words, monkeypatch):
    words = tiny_words(SMALL)("run", "--objective.name", *more, "--objective.group_size", "2")
    with Trainer(config.load(TINY, words)) as trainer:
        give_up_the_first(monkeypatch)
        stats = trainer.train_step()
    assert stats.metrics["groups_dropped"] == 1


def test_the_mean_of_a_step_is_of_its_whole_questions(tiny_words, monkeypatch):
    words = tiny_words(SMALL)("run", "--objective.name", "reinforce", "--objective.group_size", "2")
    with Trainer(config.load(TINY, words)) as trainer:
        give_up_the_first(monkeypatch)
        batch, terms = trainer.stages.collector.collect(0, PhaseTimer(), {})
        alone = trainer.cfg.objective.terms(batch.whole, {})
    assert batch.lost_B.tolist() == [1, 0, 0]
    assert not terms.parts[0].weight_BP[0].any()
    assert alone.parts[0].weight_BP.any()
    assert torch.equal(terms.parts[0].weight_BP[1:], alone.parts[0].weight_BP)


def test_the_text_of_a_thought_has_no_close(tiny_words):
    """Neither where the close is a special token, nor where it is text, as R1's is."""
    words = tiny_words(SMALL)("run", "--objective.lexical", "true")
    with Trainer(config.load(TINY, words)) as trainer:
        collector = trainer.stages.collector
        post = collector.collect(0, PhaseTimer(), {})[0].posterior
        tokenizer = trainer.stages.intake.text.tokenizer
        collector.decode = functools.partial(tokenizer.decode, skip_special_tokens=False)
        as_text = [collector._text(path) for path in post.flat]
        cut = collector._text(replace(next(p for p in post.flat if p.closed), closed=False))
    assert post.texts is not None
    assert [text for group in post.texts for text in group] == as_text
    assert as_text == [tokenizer.decode(p.z_ids[: p.z_ids.numel() - p.closed]) for p in post.flat]
    assert cut.endswith("</think>")


SPELLED = ["so ", "</", "think", ">", "7 ", "", "."]
"""Texts of tokens, of which the sixth is special: a text shows it as <end>, or not at all."""


def spell(ids, *, special):
    return "".join("<end>" if special and i == 5 else SPELLED[i] for i in map(int, ids))


@pytest.mark.parametrize(
    ("z", "close", "tag", "text"),
    [
        ([0, 4, 5], 5, None, "so 7 "),  # a special token
        ([0, 1, 2, 3, 4, 5], 5, None, "so </think>7 "),  # its text, spelled before it
        ([0, 4, 3], 3, None, "so 7 "),  # a token of plain text
        ([0, 4, 1, 2, 3], -1, "</think>", "so 7 "),
        ([0, 4, 2, 5, 3], -1, "k<end>", "so 7 thin"),  # none of the text without special tokens
        ([0, 4, 5, 6], -1, "<end>.", "so 7 "),
        ([0, 4, 1, 2, 3], -1, "/think", "so 7 <"),
    ],
)
def test_the_close_alone_is_cut_from_the_text_of_a_thought(z, close, tag, text):
    shown = functools.partial(spell, special=True)
    made = None if tag is None else Tag(tag, (1,), shown)
    sampling = Sampling(9, think_close_id=close, eos_ids=(), tag=made)
    who = {"question_id": "q", "stream": "prior", "index": 0, "seed": 0}
    request, ids = SampleRequest(prompt_ids=torch.tensor([0]), **who), torch.tensor([*z, 4])
    path = split_path(request, ids, logps=torch.zeros(len(ids)), sampling=sampling, finish="stop")
    assert path.closed
    assert thought_text(path, functools.partial(spell, special=False), made) == text


def test_a_lost_path_counts_though_its_question_is_replaced(tiny_words, monkeypatch):
    more = ["--train.resample_rounds", "1", "--objective.group_size", "2"]
    words = tiny_words(SMALL)("run", "--objective.name", "drgrpo", *more)
    with Trainer(config.load(TINY, words)) as trainer:
        generate, calls = HFEngine.generate, []

        def lossy(*args):
            first, *others = generate(*args)
            calls.append(1)
            return [losing(first), *others] if len(calls) == 1 else [first, *others]

        monkeypatch.setattr(HFEngine, "generate", lossy)
        batch, terms = trainer.stages.collector.collect(0, PhaseTimer(), {})
    assert len(calls) == 2
    assert not batch.lost_B.any()
    counted = {name: terms.metrics[name] for name in ("paths_error", "groups_dropped")}
    assert counted == {"paths_error": 1, "groups_dropped": 1}


def test_both_streams_are_scored_in_one_pass_of_few_batches(tiny_words):
    """Forwards of train.score_tokens, and the same numbers as in small ones of each stream."""
    more = ["--train.micro_batch_tokens", "200", "--model.dtype", "float64"]
    more += ["--objective.group_size", "2", "--train.score_tokens"]
    found, passes, forwards = [], [], []
    for tokens in (200, 10_000):
        words = tiny_words(SMALL)(f"run{tokens}", *more, str(tokens))
        cfg = config.load(TINY, words)
        with Trainer(cfg) as trainer:
            collector, seen = trainer.stages.collector, []
            score = collector.row_logprobs
            collector.row_logprobs = lambda rows, seen=seen, score=score: (
                seen.append(rows) or score(rows)
            )
            counts: list[int] = []
            trainer.stages.policy.register_forward_pre_hook(
                lambda *given, counts=counts: counts.append(given[1][0].targets.numel())
            )
            said = [*introduction(cfg, trainer.stages, trainer.world)]
            found.append(collector.collect(0, PhaseTimer(), {})[0])
            passes.append(seen)
            forwards.append(counts)
        line = "tokens of a forward: 200 that trains, 10000 without gradients"
        assert (line in said) == (tokens != 200)
    assert [len(seen) for seen in passes] == [1, 1]
    assert len(passes[0][0]) == 3 * (2 + cfg.objective.draws().prior)
    assert len(forwards[1]) < len(forwards[0]) / 3
    for name in ("posterior", "prior"):
        few, many = (batch.stream(name).u_BP for batch in found)
        torch.testing.assert_close(few, many, atol=1e-9, rtol=0)


def test_a_wrong_answer_is_looked_for_beyond_other_spellings():
    spellings = [f"yes{i}" for i in range(20)]
    right = prompted("q", student=[3], teacher=[3], cue=[4], target=[5]).question
    right = replace(right, answer="yes")
    asked = []

    def verify(pairs):
        asked.append(len(pairs))
        return ["yes" in text for _, text in pairs]

    found = [
        wrong_answers([right], [*spellings, "no"], seed=str(step), verify=verify)[0].answer
        for step in range(10)
    ]
    assert found == ["no"] * 10
    assert {4, 17} <= {*asked}
    with pytest.raises(ValueError, match="no other question's answer is a wrong one"):
        wrong_answers([right], spellings, seed="0", verify=verify)


def test_a_lost_question_counts_no_token_of_a_part_that_counts_its_own():
    kept = torch.tensor([[True, True], [True, False]])
    weight = torch.ones(2, 2).double()
    of = {"name": "pg", "stream": "prior", "view": "student"}
    part = Term(**of, weight_BP=weight, counted_BP=kept)
    (left,) = Terms(parts=(part,)).without(torch.tensor([False, True])).parts
    assert left.counted_BP.tolist() == [[True, True], [False, False]]


def test_scores_of_whole_questions_are_those_that_are_trained():
    of = {"name": "pg", "stream": "prior", "view": "student"}

    def terms(values):
        scores = torch.tensor(values).double()
        part = Term(**of, weight_BP=scores)
        return Terms(parts=(part,), path_scores={"prior": {"advantage": scores}})

    whole_B = torch.tensor([False, True])
    found = terms([[1.0], [2.0]]).where(whole_B, terms([[5.0]]))
    assert found.path_scores["prior"]["advantage"].tolist() == [[1.0], [5.0]]
    other = Terms(parts=(Term(**{**of, "name": "x"}, weight_BP=torch.ones(1, 1).double()),))
    with pytest.raises(ValueError, match=r"got the parts x of the questions .* and pg of all"):
        terms([[1.0], [2.0]]).where(whole_B, other)


@dataclass(frozen=True, config=STRICT)
class Growing(Grpo):
    name: str = "growing"
    grown: str = ""

    def at(self, step, /):
        if not step:
            return self
        key, value = {"draws": ("group_size", 3), "normaliser": ("norm", "seq_sum")}[self.grown]
        return replace(self, **{key: value})


@pytest.mark.parametrize("grown", ["draws", "normaliser"])
def test_a_step_draws_and_divides_as_the_run_planned(grown):
    objective = Growing(group_size=2, grown=grown)
    assert at_step(objective, 0) is objective
    with pytest.raises(ValueError, match=rf"growing: at\(1\) changed .*{grown}.* every step"):
        at_step(objective, 1)


@pytest.mark.parametrize(
    ("more", "refused"),
    [
        ([], True),
        (["--objective.target", "none"], False),
        (["--rollout.temperature", "1.0"], False),
    ],
)
def test_the_answer_is_trained_at_temperature_1(more, refused):
    words = ["--objective", "verifree", "--rollout.temperature", "0.7", *more]
    if not refused:
        assert config.load(TINY, words)
        return
    with pytest.raises(ValueError, match=r"'verifree' trains .* rollout.temperature 0.7; set"):
        config.load(TINY, words)


@dataclass(frozen=True, config=STRICT)
class Twice(Keys):
    name: str = "twice"

    def draws(self):
        return Draws(prior=2)

    def needs(self):
        return frozenset(Score("prior", view, "target") for view in ("teacher", "student"))

    def terms(self, batch, state, /):
        raise NotImplementedError


def test_u_of_a_stream_is_of_one_view():
    with pytest.raises(ValueError, match="twice: needs\\(\\) asks for U of the prior paths"):
        check_objective(Twice())


def test_paths_of_the_reference_have_their_own_prompts(tiny_words, monkeypatch):
    prompts = ["--prompt.student", "{question} ={budget}", "--data.max_prompt_tokens", "24"]
    prompts += ["--prompt.teacher", "{question} hint {answer} ={budget}"]
    monkeypatch.setattr(O1Pruner, "fields", lambda _: {"budget": lambda slot: slot.index})
    words = tiny_words(SMALL)("run", "--objective.name", "grpo", *prompts)
    words += ["--objective.length_reward", "o1_pruner", "--objective.group_size", "2"]
    with Trainer(config.load(TINY, words)) as trainer:
        batch, _ = trainer.stages.collector.collect(0, PhaseTimer(), {})
    asked = [q.fields for q, _ in batch.pairs("reference")]
    assert asked == [{"budget": str(i)} for i in range(8)] * 3


def two(lengths=((4, 8), (4, 8)), correct=((1.0, 0.0), (1.0, 1.0)), closed=True):
    names = [f"q{b}" for b in range(len(lengths))]
    questions = [prompted(n, student=[3], teacher=[3, 4], cue=[5], target=[6]) for n in names]
    prior = tuple(
        tuple(
            sampled(torch.arange(n), question_id=name, stream="prior", index=i, closed=closed)
            for i, n in enumerate(ns)
        )
        for name, ns in zip(names, lengths, strict=True)
    )
    columns = scored(prior, torch.zeros(len(names), 2), correct=[list(c) for c in correct])
    none = torch.zeros(len(names), 0)
    matrices = {"u_BP": none, "length_BP": none, "closed_BP": none > 0, "correct_BP": none}
    empty = replace(columns, paths=((),) * len(names), **matrices)
    return whole(questions, empty, columns)


def test_a_cut_thought_has_the_whole_punishment_for_its_length():
    """Its limit is that of thoughts, which an answer never follows."""
    batch = two(lengths=((60, 4),), correct=((0.0, 0.0),))
    cut, short = batch.prior.paths[0]
    cut = replace(cut, closed=False, finish="length", answer_ids=cut.answer_ids[:0])
    batch = replace(batch, token_limit=60 + 30, prior=replace(batch.prior, paths=((cut, short),)))
    reward = Dapo(group_size=2, overlong_cache=20).terms(batch, {}).path_scores["prior"]["reward"]
    assert reward.tolist() == [[-1.0, 0.0]]


@pytest.mark.parametrize("masked", [False, True])
def test_effective_counts_the_questions_that_have_a_gradient(masked):
    """The second question is dead, so its tokens count nowhere, whatever else is masked."""
    objective = Dapo(group_size=2, denominator="effective", mask_truncated=masked, trains="thought")
    batch = two()
    scale = Scale(norm="token_mean", effective=True)
    rows = build_rows(batch, objective.terms(batch, {}), scale)
    assert {row.scale for row in rows} == {1 / 12}


def test_effective_does_not_weigh_the_hold_to_the_reference_up():
    """Each question of two is held; one alone has an advantage."""
    objective = Grpo(group_size=2, norm="seq_sum", denominator="effective", kl_coef=0.1)
    batch = two()
    rows = build_rows(batch, objective.terms(batch, {}), Scale(norm="seq_sum", effective=True))
    assert [row.scale for row in rows] == [1 / 4] * 4


def test_a_live_loss_says_whether_it_reads_a_reference():
    batch = two()
    part = Term(
        name="pg",
        stream="prior",
        view="student",
        weight_BP=torch.ones(2, 2).double(),
        live=lambda weight, *_: weight,
    )
    with pytest.raises(ValueError, match=r"term .pg.: live: .* reference"):
        check_terms(Grpo(group_size=2), Terms(parts=(part,)), batch)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"part": "target"}, r"trains the reference answer, .* Draws\(targets=True"),
        ({"later": Surrogate(kl_coef=0.1)}, "later reads a reference policy"),
        ({"later": Surrogate(), "live": Surrogate()}, "got live and later"),
        ({"later": 3.0}, "later: got 3.0, expected a function"),
    ],
)
def test_what_a_term_may_not_ask(keys, said):
    of = {
        "name": "pg",
        "stream": "prior",
        "view": "student",
        "weight_BP": torch.ones(2, 2).double(),
    }
    with pytest.raises(ValueError, match=rf"objective grpo, term 'pg': {said}"):
        check_terms(Grpo(group_size=2), Terms(parts=(Term(**of, **keys),)), two())


def test_a_distilled_row_is_compared_with_its_own_tokens_under_the_other_prompt():
    """Not with the answer behind the thought, which is a row of the same path."""

    def row(tokens, view, **more):
        of = {
            "context_ids": torch.tensor([1]),
            "stream": "posterior",
            "path": ("q", "posterior", 0),
        }
        coef = -torch.ones(len(tokens)).double()
        return TrainRow(token_ids=torch.tensor(tokens), coef=coef, view=view, **of, **more)

    drawn, distilled = (
        row([2, 3], "teacher"),
        row([2, 3], "student", distilled=True, term="distill"),
    )
    rows = [drawn, distilled, row([7], "student", term="answer"), row([2, 3], "student", term="x")]
    logps = [torch.tensor(v).double() for v in ([-1.0, -2.0], [-3.0, -5.0], [-9.0], [-7.0, -7.0])]
    found = diagnostics.row_metrics(rows, logps)
    assert found["loss_distill"] == (3.0 - 1.0) + (5.0 - 2.0)
    # What was clipped has no log-prob in the update, but one from before it.
    scored = [(replace(drawn, old=logps[0], live=Surrogate(), weight=-1.0), logps[0] - 1)]
    found = diagnostics.row_metrics(rows[1:], logps[1:], scored)
    assert found["loss_distill"] == (3.0 - 2.0) + (5.0 - 3.0)


def test_a_loss_that_an_update_lacks_is_nought_there():
    updates = [{"loss": 3.0, "loss_pg": 1.0, "loss_answer": 2.0}, {"loss": 1.0, "loss_pg": 1.0}]
    assert diagnostics.mean_update(updates) == {"loss": 2.0, "loss_pg": 1.0, "loss_answer": 1.0}


@pytest.mark.parametrize("kl_coef", [0.0, 0.1])
def test_clipped_tokens_are_counted_under_a_kl_too(kl_coef):
    """Of three tokens with a weight one is beyond the clip; a fourth has none, and no gradient."""
    old = torch.full((4,), -1.0).double()
    now = old + torch.tensor([0.0, 0.5, 0.1, 0.0]).double()
    row = TrainRow(
        context_ids=torch.tensor([1]),
        token_ids=torch.arange(4),
        coef=torch.zeros(4),
        stream="prior",
        view="student",
        live=Surrogate(kl_coef=kl_coef),
        weight=torch.tensor([-1.0, -1.0, -1.0, 0.0]).double(),
        old=old,
        reference=old - 0.3 if kl_coef else None,
    )
    unasked = dict.fromkeys(("cfg", "world", "policies", "passes", "decode"))
    measure = Measure(logprobs=lambda _: [now], **unasked)
    _, share, _ = measure.moment([row], moved=True)
    assert share == {"clipped": pytest.approx(1 / 3)}


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        # T(x, y*) of 50 tokens, S(x) of 10; a thought of 8, its end, a cue of 7, an answer of 5.
        ({"name": "vpgea"}, 50 + 8),
        ({"name": "vpgea", "cross_view": False}, 50 + 8 + 1 + 7 + 5),
        ({"name": "rlt"}, 50 + 8),
    ],
)
def test_the_longest_row_is_that_of_the_view_that_is_scored(section, expected):
    cfg = config.resolve({"objective": section, "rollout": {"max_new_tokens": 8}})
    sizes = {"student": 10, "teacher": 50, "cue": 7, "target": 5}
    question = prompted(**{name: torch.arange(n) for name, n in sizes.items()})
    assert longest(cfg, [question]) == (50, expected)


def test_an_answer_that_the_reference_scores_is_a_part_of_the_longest_row():
    cfg = config.resolve({"objective": {"name": "rlt"}, "rollout": {"max_new_tokens": 8}})
    sizes = {"student": 10, "teacher": 12, "cue": 7, "target": 5}
    question = prompted(**{name: torch.arange(n) for name, n in sizes.items()})
    assert longest(cfg, [question]) == (12, 10 + 8 + 1 + 7 + 5)
    tagged = replace(question, close_ids=torch.arange(4))
    assert longest(cfg, [tagged]) == (12, 10 + 8 + 4 + 7 + 5)


def test_answers_drawn_behind_the_teachers_prompt_are_planned_for():
    section = {"objective": {"name": "vpgea", "cross_view": False}}
    cfg = config.resolve({**section, "scoring": {"u_source": "accuracy"}})
    sizes = {"student": 10, "teacher": 50, "cue": 7, "target": 5}
    question = prompted(**{name: torch.arange(n) for name, n in sizes.items()})
    (prompt,) = [p for what, p, _ in draws(cfg, [question], {}) if "answers after" in what]
    assert prompt == 50 + cfg.rollout.max_new_tokens + 1
    tagged = replace(question, close_ids=torch.arange(4))
    (prompt,) = [p for what, p, _ in draws(cfg, [tagged], {}) if "answers after" in what]
    assert prompt == 50 + cfg.rollout.max_new_tokens + 4


# --- a thought that a tag of several tokens closes ------------------------------------------------

TAGGED = {
    "--prompt.think_close": "</think>\\boxed",
    "--prompt.answer_cue": "",
}
BRACES = """\\
import re

def right(gold, text):
    return re.findall("{(.*?) ?}", text)[:1] == [gold]
"""


@pytest.mark.parametrize("full", ["true", "false"])
def test_a_step_with_a_tag_of_two_tokens_is_that_with_one_and_a_cue(
    full, tiny_words, tmp_path, monkeypatch
):
    """The tiny model writes `</think>`, then `\\boxed`: the end of the thought, or the cue."""
    (tmp_path / "braces.py").write_text(BRACES)
    monkeypatch.chdir(tmp_path)  # where a checker of the user's is found
    judge = ["--verify.name", "custom", "--verify.target", "braces:right"]
    settle, steps = tiny_words(SMALL), []
    for name, more in (("one", {}), ("two", TAGGED)):
        more = ["--rollout.full_answer", full, *judge, *itertools.chain(*more.items())]
        words = settle(name, *more)
        with Trainer(config.load(TINY, words)) as trainer:
            batch, _ = trainer.stages.collector.collect(0, PhaseTimer(), {})
            tag = trainer.stages.collector.sampling.tag
            stats = trainer.train_step()
            assert stats.skipped is None
            said = [*introduction(trainer.cfg, trainer.stages, World(torch.device("cpu")))]
            assert any("is 2 tokens of this model" in line for line in said) == (tag is not None)
            steps.append(
                (batch, tag, trainer.stages.evaluator.judge(batch.prior.flat, [("7",)] * 12))
            )
    (one, none, right), (two, tag, also) = steps
    assert none is None
    assert tag.text == "</think>\\boxed"
    assert len(tag.ids) == 2
    closed = 0
    for stream in ("posterior", "prior"):
        pairs = zip(one.stream(stream).flat, two.stream(stream).flat, strict=True)
        for a, b in pairs:
            # A thought of a token less than the limit has no room for the second one.
            if not a.closed or a.length == 60:
                assert not b.closed
                continue
            closed += 1
            assert b.closed
            assert b.finish == a.finish
            assert b.z_ids[:-1].tolist() == a.z_ids.tolist()
            assert b.z_ids[-2:].tolist() == [*tag.ids]
            if full == "true":
                assert torch.cat([b.z_ids, b.answer_ids]).tolist() == a.response_ids.tolist()
        same = torch.tensor([[p.length != 60 for p in group] for group in one.stream(stream).paths])
        torch.testing.assert_close(
            one.stream(stream).u_BP[same], two.stream(stream).u_BP[same], rtol=0, atol=1e-5
        )
        if full == "true":
            assert torch.equal(
                one.stream(stream).correct_BP[same], two.stream(stream).correct_BP[same]
            )
            assert one.stream(stream).correct_BP.any()
    assert closed > 10
    assert right.tolist() == also.tolist()


# --- tokens that a step pays for ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "behind"),
    [
        (["--scoring.u_source", "accuracy", "--train.resample_rounds", "1"], True),
        (["--objective", "vr", "--objective.group_size", "2"], True),
        ([], False),
    ],
    ids=["accuracy", "vr", "likelihood"],
)
def test_every_token_that_the_engine_drew_is_counted(more, behind, tiny_words, monkeypatch):
    """Answers behind thoughts too: a budget of tokens must not give them away."""
    drawn, generate = [], HFEngine.generate

    def listened(*args):
        paths = generate(*args)
        drawn.append(sum(path.generated for path in paths))
        return paths

    monkeypatch.setattr(HFEngine, "generate", listened)
    words = tiny_words(SMALL)("run", "--scoring.answer_samples", "2", *more)
    with Trainer(config.load(TINY, words)) as trainer:
        drawn.clear()  # the engine's own trial is of no step
        stats = trainer.train_step()
    assert stats.metrics["tokens_generated"] == sum(drawn)
    assert (len(drawn) > 1) == behind


# --- an answer in several spellings ---------------------------------------------------------------


def test_a_path_that_spells_a_variant_is_right(tiny_world, tiny_words, tmp_path):
    """The student sees no answer, so its paths are the same: so must be every verdict on them."""
    rows = [json.loads(line) for line in tiny_world.train_path.read_text().splitlines()]
    other = [row | {"answer": "none", "others": [row["answer"]]} for row in rows]
    file = tmp_path / tiny_world.train_path.name
    file.write_text("".join(f"{json.dumps(row)}\n" for row in other))
    judged = ["--scoring.u_source", "accuracy", "--scoring.answer_samples", "2"]
    judged += ["--objective.verify", "gate", "--objective.leak_guard", "none"]
    judged += ["--verify.name", "text"]
    spelled = ["--data.train", str(file), "--data.variants_key", "others", "--eval.data", str(file)]
    streams, shares = [], []
    for name, more in (("plain", []), ("spelled", [*spelled, "--eval.limit", "4"])):
        with Trainer(config.load(TINY, tiny_words(SMALL)(name, *judged, *more))) as trainer:
            batch, _ = trainer.stages.collector.collect(0, PhaseTimer(), {})
            streams.append(batch.prior)
            evaluator = trainer.stages.evaluator
            if more:
                asked = [q for b in evaluator.benchmarks.values() for q in b.questions]
                _, right = evaluator.answers(asked, 2, trainer.stages.collector.sampling, None)
                shares.append(right.mean().item())
    plain, spelled = streams
    assert plain.correct_BP.any()
    assert torch.equal(plain.correct_BP, spelled.correct_BP)
    assert torch.equal(plain.u_BP, spelled.u_BP)
    assert shares[0] > 0


SLOW = """\
import time

def right(gold, text):
    time.sleep(0 if text == f"\\\\boxed{{{gold}}}" else 60)  # a reference answer is no sampled one
    return True
"""


@pytest.mark.filterwarnings("ignore:verify.target")
def test_an_answer_that_nobody_judged_is_counted(tiny_words, tmp_path, monkeypatch):
    (tmp_path / "slow.py").write_text(SLOW)
    monkeypatch.chdir(tmp_path)
    judge = ["--verify.name", "custom", "--verify.target", "slow:right"]
    judge += ["--verify.timeout_s", "0.3", "--objective.name", "grpo"]
    with Trainer(config.load(TINY, tiny_words(SMALL)("run", *judge))) as trainer:
        collector = trainer.stages.collector
        batch, terms = collector.collect(0, PhaseTimer(), {})
    pairs = [(q.question.answer, p) for q, p in batch.pairs("prior") if p.closed]
    said = {(gold, collector.decode(path.answer_ids)) for gold, path in pairs}
    assert terms.metrics["verdicts_missing"] == len(said) > 0
    assert not batch.prior.correct_BP.any()
