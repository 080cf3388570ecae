"""A step's questions -> scored paths and the terms of the loss: phases 1 and 2 of the method.

questions of (seed, step) -> both streams in one engine call -> U, correctness, lengths
-> terms of the objective [-> questions without a gradient make room for others]
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, get_args

import torch

from vpgea_fast.config import Config
from vpgea_fast.data import round_questions
from vpgea_fast.metrics import PhaseTimer
from vpgea_fast.model import Policy
from vpgea_fast.names import Slot, Who
from vpgea_fast.objectives import (
    Draws,
    Objective,
    Term,
    Terms,
    ask,
    at_step,
    check_terms,
    guard_only,
)
from vpgea_fast.questions import Prompt, Responses, given_responses, misled
from vpgea_fast.reference import Reference
from vpgea_fast.rollout.engine import (
    Sampling,
    answer_only,
    request_seed,
    slot_of,
    split_path,
)
from vpgea_fast.rollout.turns import Turns
from vpgea_fast.rows import part_row
from vpgea_fast.scoring import (
    RowsFn,
    accuracy_utility,
    after_thought,
    answer_likelihood,
    answers_correct,
    thought_text,
    verify_any,
)
from vpgea_fast.spans import stated
from vpgea_fast.types import (
    Attempt,
    Groups,
    Path,
    PathKey,
    PromptedQuestion,
    SampleRequest,
    Score,
    ScoredBatch,
    ScoredPaths,
    Stream,
    TrainRow,
    View,
    with_questions,
)
from vpgea_fast.values import merge
from vpgea_fast.verify import Verifier

Pairs = Sequence[tuple[PromptedQuestion, Path]]
Plan = Sequence[tuple[Stream, View, int]]


class Collector:
    """Samples and scores one step. Stateless: collecting a step twice gives the same batch.

    `progress(total)` gives the function that is told of newly finished samples.
    """

    def __init__(
        self,
        cfg: Config,
        questions: Sequence[PromptedQuestion],
        *,
        prompt: Prompt,
        responses: Responses,
        row_logprobs: RowsFn,
        path_logprobs: RowsFn,
        reference: Reference | None,
        posterior: Policy | None,
        turns: Turns,
        sampling: Sampling,
        decode: Callable[[torch.Tensor], str],
        verifier: Verifier,
        progress: Callable[[int], Callable[[int], None]],
    ) -> None:
        self.cfg, self.questions, self.engine = cfg, questions, turns.engine
        self.prompt, self.responses = prompt, responses
        # The models beside the policy, and what gives the engine their weights, each in its turn.
        self.reference, self.posterior, self.turns = reference, posterior, turns
        # U is a likelihood, at temperature 1; log-probs of paths are the policy's that drew them.
        self.row_logprobs, self.path_logprobs = row_logprobs, path_logprobs
        self.sampling, self.decode, self.progress = sampling, decode, progress
        self.verifier = verifier

    def collect(
        self, step: int, timer: PhaseTimer, state: Mapping[str, Any]
    ) -> tuple[ScoredBatch, Terms]:
        """Sample, score and weigh the paths of a step: a function of (weights, seed, step, state).

        `state` is what the objective kept of the step before (`Terms.state`).

        With `train.resample_rounds`, questions without a gradient make room for others, which are a
        function of (seed, step, round) like the first ones.
        """
        # Once per step: schedules reach scores, gate and monitors by this one route.
        objective, unjudged = at_step(self.cfg.objective, step), self.verifier.unjudged
        batch = self._draw(self._questions(step, round_=0), step, timer)
        terms = self._weigh(objective, batch, state, timer)
        drawn_ids, lost_B = {q.question.id for q in batch.questions}, batch.lost_B
        replaced: list[ScoredBatch] = []
        for round_ in range(1, self.cfg.train.resample_rounds + 1):
            alive = terms.alive.nonzero()[:, 0].tolist()
            dead = (~terms.alive).nonzero()[:, 0].tolist()
            # A question that was drawn in this step is not drawn again: it has just failed, or it
            # would stand in the batch twice.
            rest = [q for q in self._questions(step, round_) if q.question.id not in drawn_ids]
            swaps = self._replacements(batch, dead, rest)
            if not swaps:
                break
            fresh = list(swaps.values())
            drawn_ids |= {q.question.id for q in fresh}
            # A dead question without a replacement stays, so the batch never falls below B.
            kept = batch.select(alive + [i for i in dead if i not in swaps])
            # Of what is replaced only the paths are kept, for the record of them.
            replaced.append(replace(batch.select(list(swaps)), logps={}))
            drawn = self._draw(fresh, step, timer)
            # A question that lost a path may have been replaced: it is lost all the same.
            batch, lost_B = kept.join(drawn), torch.cat([lost_B, drawn.lost_B])
            terms = self._weigh(objective, batch, state, timer)
        counts = {
            "paths_error": int(lost_B.sum()),
            "groups_dropped": int((lost_B > 0).sum()),
            "tokens_replaced": sum(part.tokens for part in replaced),
        }
        if self.sampling.full_answer or self.cfg.answers_behind:
            counts["verdicts_missing"] = self.verifier.summed(self.verifier.unjudged - unjudged)
        if replaced:
            batch = replace(batch, replaced=functools.reduce(ScoredBatch.join, replaced))
        return batch, replace(terms, metrics=merge(terms.metrics, counts))

    def weigh(self, batch: ScoredBatch, step: int, state: Mapping[str, Any]) -> Terms:
        """What the objective says of a batch that `collect` made in this step: nothing is drawn or
        scored. What `collect` counts is not known here."""
        return self._weigh(at_step(self.cfg.objective, step), batch, state, PhaseTimer())

    def _replacements(
        self, batch: ScoredBatch, dead: Sequence[int], candidates: Sequence[PromptedQuestion]
    ) -> dict[int, PromptedQuestion]:
        """Place of a question without a gradient -> the one that comes for it: with weights of its
        own file, so that a mixture keeps its shares."""
        # Candidates come in random order, so the first that fits is a fair draw.
        mixture, left = self.cfg.data.weights is not None, list(candidates)
        swaps = {}
        for place in dead:
            file = batch.questions[place].file
            fits = (i for i, q in enumerate(left) if not mixture or q.file == file)
            if (successor := next(fits, None)) is not None:
                swaps[place] = left.pop(successor)
        return swaps

    def check(self) -> None:
        """Raise ValueError now for a long prompt that a later step would refuse."""
        # Of both views: either prompt may be the longer one.
        longest = max(
            self.questions, key=lambda q: max(q.student_ids.numel(), q.teacher_ids.numel())
        )
        self.engine.check(self._requests([longest], 0, self.draws.plan), self.sampling)

    def sample(self, questions: Sequence[PromptedQuestion], step: int) -> tuple[Groups, Groups]:
        """Draw posterior and prior paths of every question, both streams in one call of the engine,
        which batches them together."""
        plan = self.draws.plan[:2]
        requests = self._requests(questions, step, plan)
        if self.draws.given:
            drawn = self._given(questions, requests)
        else:
            drawn = self._generate(requests, step)
        paths = iter(_as_asked(requests, drawn))
        counts = [count for _, _, count in plan]
        # Requests stand question by question, posterior before prior: the same order as here.
        groups = [[tuple(next(paths) for _ in range(n)) for n in counts] for _ in questions]
        return tuple(posterior for posterior, _ in groups), tuple(prior for _, prior in groups)

    def _generate(self, requests: Sequence[SampleRequest], step: int) -> list[Path]:
        """Draw the paths of both streams, each from the policy that it is of."""
        progress = self.progress(len(requests))
        # One call: vLLM fills its batch from both streams, and shares prefixes within each.
        if self.posterior is None:
            return self.engine.generate(requests, self.sampling, progress)
        of = {
            own: [i for i, r in enumerate(requests) if (r.stream == "posterior") == own]
            for own in (True, False)
        }
        paths: dict[int, Path] = {}
        with self.turns.lent(check=self.turns.due("posterior", step)) as hand_over:
            hand_over("posterior", self.posterior)
            paths |= self._some(requests, of[True], progress)
        # The rest is the policy's.
        self.turns.require("policy")
        paths |= self._some(requests, of[False], progress)
        return [paths[i] for i in range(len(requests))]

    def _some(
        self,
        requests: Sequence[SampleRequest],
        places: Sequence[int],
        progress: Callable[[int], None],
    ) -> dict[int, Path]:
        """The paths of the requests at these places."""
        if not places:
            return {}
        found = self.engine.generate([requests[i] for i in places], self.sampling, progress)
        return dict(zip(places, found, strict=True))

    def sample_reference(self, questions: Sequence[PromptedQuestion], step: int) -> Groups | None:
        """Draw the reference policy's paths of every question; None where the objective asks for
        none."""
        count = self.draws.reference
        if not (count and self.reference):
            return None
        requests = self._requests(questions, step, self.draws.plan[2:])
        progress = self.progress(len(requests))
        if self.cfg.engine.name == "replay":  # recorded with the others
            drawn = self.engine.generate(requests, self.sampling, progress)
        else:
            drawn = self.reference.generate(requests, self.sampling, progress, turns=self.turns)
        paths = _as_asked(requests, drawn)
        # Requests stand question by question.
        return tuple(tuple(paths[i : i + count]) for i in range(0, len(paths), count))

    def _given(
        self, questions: Sequence[PromptedQuestion], requests: Sequence[SampleRequest]
    ) -> list[Path]:
        """The responses of the data as paths, of which no sampler knows a log-prob."""
        known, sampling = given_responses(self.cfg, questions, self.responses), self.sampling
        paths = []
        for request in requests:
            ids = torch.cat(known[request.question_id][request.index])
            # NaN, so that whoever reads a ratio of them sees it.
            unknown = torch.full(ids.shape, math.nan)
            paths.append(split_path(request, ids, logps=unknown, sampling=sampling, finish="stop"))
        return paths

    @property
    def draws_again(self) -> bool:
        """More than the paths of a step's questions may be sampled."""
        return self.cfg.answers_behind or self.cfg.train.resample_rounds > 0

    @property
    def draws(self) -> Draws:
        return self.cfg.objective.draws()

    @property
    def u_norm(self) -> str:
        """How U adds up the tokens of an answer."""
        return self.draws.u_norm or self.cfg.scoring.u_norm

    @property
    def scored_views(self) -> dict[Stream, View]:
        """Streams whose U is scored, with the prompt that it is scored under."""
        return {
            stream: view
            for stream, view, part, who in self.cfg.objective.needs()
            # Not `early`: a guard's score of a cut thought is no U.
            if part == "target" and who == "policy" and view in ("teacher", "student")
        }

    def _requests(
        self, questions: Sequence[PromptedQuestion], step: int, plan: Plan
    ) -> list[SampleRequest]:
        """A request for every path, question by question, each with the prompt that it asks."""
        slots, views = [], []
        # Once: an objective makes and checks its draws anew whenever it is asked. Of this step: its
        # fields may have a schedule.
        draws = at_step(self.cfg.objective, step).draws()
        place = {"run_seed": self.cfg.run.seed, "step": step}
        for q in questions:
            for stream, view, count in plan:
                for i in range(count):
                    slots.append(slot_of(q.question.id, stream, i, **place))
                    views.append(view)
        asked = self._asked(questions, slots, draws)
        return [
            SampleRequest(
                question_id=slot.question_id,
                stream=slot.stream,
                index=slot.index,
                prompt_ids=own.context(view),
                seed=slot.seed,
                asked=own if draws.fields else None,
                step=step,
            )
            for slot, view, own in zip(slots, views, asked, strict=True)
        ]

    def _asked(
        self, questions: Sequence[PromptedQuestion], slots: Sequence[Slot], draws: Draws
    ) -> list[PromptedQuestion]:
        """The question of every path, with prompts of its own where the objective has fields."""
        known = {q.question.id: q for q in questions}
        if not draws.fields:
            return [known[slot.question_id] for slot in slots]
        # Paths of a question that share their values share a prompt: it is rendered once.
        keys = [(slot.question_id, (*draws.values(slot).items(),)) for slot in slots]
        distinct = list(dict.fromkeys(keys))
        texts = [known[name].question for name, _ in distinct]
        prompted = self.prompt(texts, [dict(values) for _, values in distinct])
        limit = self.cfg.data.max_prompt_tokens
        for own in prompted:
            longer = max(own.student_ids.numel(), own.teacher_ids.numel())
            if longer > limit:
                raise ValueError(
                    f"question {own.question.id!r} with {own.fields}: its prompt has {longer} "
                    f"tokens, expected at most {limit}; raise data.max_prompt_tokens"
                )
        found = dict(zip(distinct, prompted, strict=True))
        return [found[key] for key in keys]

    def score(
        self,
        questions: Sequence[PromptedQuestion],
        posterior: Groups,
        prior: Groups,
        step: int,
        reference: Groups | None = None,
        *,
        timer: PhaseTimer | None = None,
    ) -> ScoredBatch:
        """Score all paths: cross-view utilities, lengths, correctness (with full answers), and the
        log-probs that the objective needs."""
        timer = timer or PhaseTimer()
        drawn: dict[Stream, Groups] = {"posterior": posterior, "prior": prior}
        if reference is not None:
            drawn["reference"] = reference
        with timer("score"):
            batch = self._columns(questions, drawn, step)
        guard = guard_only(self.cfg.objective)
        with timer("logps"):
            logps = self._logps(batch, step, self.cfg.objective.needs() - guard)
        if guard:  # in a pass of its own, so that a run can say what it took
            with timer("guard"):
                logps |= self._logps(batch, step, guard)
        return replace(batch, logps=logps)

    def _columns(
        self, questions: Sequence[PromptedQuestion], drawn: Mapping[Stream, Groups], step: int
    ) -> ScoredBatch:
        """All streams with their columns, and the paths that each question lost."""
        # Flat: one batch for engine and checker, and one pass for U; (B, P) again in the columns.
        pairs: dict[Stream, Pairs] = {
            name: with_questions(questions, groups) for name, groups in drawn.items()
        }
        likely = self._likelihoods(pairs)
        found = {
            name: self._scored(name, drawn[name], pairs[name], step=step, likely=likely.get(name))
            for name in drawn
        }
        unanswered = {lost for _, names in found.values() for lost in names}
        # By question: a group that lacks a path has another mean, so none of it is trained.
        lost = [
            sum(path.finish == "error" for group in groups for path in group)
            + (question.question.id in unanswered)
            for question, *groups in zip(questions, *drawn.values(), strict=True)
        ]
        lost_B = torch.tensor(lost, dtype=torch.int64)
        return ScoredBatch(
            questions=tuple(questions),
            posterior=found["posterior"][0],
            prior=found["prior"][0],
            reference=found["reference"][0] if "reference" in found else None,
            lost_B=lost_B,
            posterior_view=self.draws.posterior_view,
            posterior_who=self.draws.posterior_who,
            token_limit=self.sampling.limit,
        )

    def _logps(
        self, batch: ScoredBatch, step: int, needs: Iterable[Score]
    ) -> dict[Score, dict[PathKey, torch.Tensor]]:
        """What the objective must see of the trained policies beside U, and of the reference
        policy: all rows of each packed together."""
        logps: dict[Score, dict[PathKey, torch.Tensor]] = {}
        # In one order on every process: a forward is a collective of a sharded policy.
        for who in get_args(Who):
            rows = {
                score: self._score_rows(batch, score, step)
                for score in sorted(needs)
                if score.who == who and (who, score.part) != ("policy", "target")
            }
            if not rows:
                continue
            ask = self.path_logprobs
            if who == "reference":
                assert self.reference is not None  # `build` makes it for whoever reads it
                ask = self.reference.logprobs
            # A path that the engine gave up, or a thought without an answer, may lack a token: its
            # coefficients, none, stand for its log-probs.
            asked = [row for part in rows.values() for row in part if row.token_ids.numel()]
            scored = dict(zip(map(id, asked), ask(asked), strict=True))
            for score, part in rows.items():
                logps[score] = {row.path: scored.get(id(row), row.coef) for row in part if row.path}
        early = (s for s in sorted(needs) if s.view == "early")
        return logps | {score: self._early(batch, score.stream) for score in early}

    def _early(self, batch: ScoredBatch, stream: Stream) -> dict[PathKey, torch.Tensor]:
        """U of every thought cut before it first states the answer, one number; none where that
        leaves half of it or more, or it never does."""
        found, cut = {}, []
        for question, path in batch.pairs(stream):
            found[path.key] = torch.zeros(0, dtype=torch.float64)
            span = self._stated(question, path)
            if span and 2 * span[0] < path.z_ids.numel():
                cut.append((question, replace(path, z_ids=path.z_ids[: span[0]], closed=False)))
        utilities = answer_likelihood(
            self.row_logprobs,
            cut,
            u_norm=self.u_norm,
        )
        return found | {path.key: u[None] for (_, path), u in zip(cut, utilities, strict=True)}

    def _text(self, path: Path) -> str:
        """The thought's text, without its close."""
        return thought_text(path, self.decode, self.sampling.tag)

    def _stated(self, question: PromptedQuestion, path: Path) -> tuple[int, int] | None:
        """Where a thought first states the answer, in one of its spellings: the tokens before, and
        those until then."""
        whole, spellings = self.cfg.prompt.answer_words, question.question.spellings
        return stated(path.z_ids, self.decode, spellings, whole=whole)

    def _score_rows(self, batch: ScoredBatch, score: Score, step: int) -> list[TrainRow]:
        """The rows whose log-probs a score is, path by path."""
        pairs = batch.pairs(score.stream)
        view: View = "student" if score.view == "student" else "teacher"
        if score.view == "counterfactual":
            misled = self._misled([question for question, _ in pairs], step)
            pairs = [(q, path) for q, (_, path) in zip(misled, pairs, strict=True)]
        # A row wants weights of its term; of a score they mean nothing.
        weight_BP = torch.ones(batch.stream(score.stream).length_BP.shape)
        term = Term(
            name="score",
            stream=score.stream,
            view=view,
            part=score.part,
            weight_BP=weight_BP,
            who="posterior" if score.who == "posterior" else "policy",
        )
        return [part_row(q, path, term) for q, path in pairs]

    def _misled(self, questions: Sequence[PromptedQuestion], step: int) -> list[PromptedQuestion]:
        """See `misled`."""
        return misled(
            self.cfg,
            questions,
            self.questions,
            step=step,
            prompt=self.prompt,
            verify=self.verifier.verify,
        )

    def _scored(
        self,
        stream: Stream,
        groups: Groups,
        pairs: Pairs,
        *,
        step: int,
        likely: torch.Tensor | None,
    ) -> tuple[ScoredPaths, set[str]]:
        """One stream with every column; the questions of which the engine gave up a sampled
        answer. `likely`: U of every path, where it is a likelihood."""
        shape = (len(groups), len(groups[0]))
        utilities, unanswered, behind = self._utilities(stream, pairs, step, likely)
        # Beside recorded weights the unhinted paths are originals, which nothing weighs.
        weighed = ("posterior",) if self.draws.recorded else ("posterior", "prior")
        if self.draws.attempts and stream in weighed:
            groups, lost = self._with_attempts(groups, pairs, step)
            unanswered |= lost
            behind = behind + _tokens(path.attempts for group in groups for path in group)
        length = torch.tensor([path.length for _, path in pairs], dtype=torch.float64)
        closed = torch.tensor([path.closed for _, path in pairs], dtype=torch.bool)
        columns = ScoredPaths(
            paths=groups,
            u_BP=utilities.view(shape),
            length_BP=length.view(shape),
            closed_BP=closed.view(shape),
            correct_BP=self.correct(pairs).view(shape),
            behind_BP=behind.view(shape),
            texts=tuple(tuple(map(self._text, group)) for group in groups)
            if self.draws.texts
            else None,
        )
        if self.draws.stated:
            ends = [span[1] if (span := self._stated(*pair)) else 0 for pair in pairs]
            columns = replace(columns, stated_BP=torch.tensor(ends, dtype=torch.int64).view(shape))
        return columns, unanswered

    def _draw(
        self, questions: Sequence[PromptedQuestion], step: int, timer: PhaseTimer
    ) -> ScoredBatch:
        with timer("rollout"):
            posterior, prior = self.sample(questions, step)
            reference = self.sample_reference(questions, step)
            # vLLM's cache and the scoring forwards do not fit a card together.
            if not self.draws_again:
                self.engine.rest()  # scoring has its memory
        return self.score(questions, posterior, prior, step, reference=reference, timer=timer)

    def _weigh(
        self,
        objective: Objective,
        batch: ScoredBatch,
        state: Mapping[str, Any],
        timer: PhaseTimer,
    ) -> Terms:
        """What the objective says; a question that is not whole has no weight, and is in no
        mean."""
        with timer("advantage"):
            terms, dropped_B = _say(objective, batch, state), batch.lost_B > 0
            if dropped_B.any():
                # The batch keeps its shape, for the log of its paths; weights (an objective may
                # compare all paths of the step), means and state are of whole questions.
                whole, terms = batch.whole, terms.without(dropped_B)
                clean = _say(objective, whole, state) if whole else None
                terms = replace(
                    terms.where(~dropped_B, clean) if clean else terms,
                    metrics=clean.metrics if clean else {},
                    state=clean.state if clean else state,
                )
            return terms

    def _questions(self, step: int, round_: int) -> list[PromptedQuestion]:
        return round_questions(self.cfg, self.questions, step=step, round_=round_)

    def _likelihoods(self, pairs: Mapping[Stream, Pairs]) -> dict[Stream, torch.Tensor]:
        """U of every path of the streams that are scored by a likelihood, in one pass of the
        policy: a pass of each stream would have a part-filled batch of its own."""
        scored = self.scored_views
        # In one order on every process, which a set of needs has not.
        views: dict[Stream, View] = {
            stream: scored[stream] for stream in pairs if stream in scored and pairs[stream]
        }
        if self.cfg.scoring.u_source == "accuracy" or not views:
            return {}
        shown: tuple[View, ...] = tuple(views[stream] for stream in views for _ in pairs[stream])
        utilities = answer_likelihood(
            self.row_logprobs,
            [pair for stream in views for pair in pairs[stream]],
            u_norm=self.u_norm,
            view=shown,
        )
        counts = [len(pairs[stream]) for stream in views]
        return dict(zip(views, utilities.split(counts), strict=True))

    def _utilities(
        self, stream: Stream, pairs: Pairs, step: int, likely: torch.Tensor | None
    ) -> tuple[torch.Tensor, set[str], torch.Tensor]:
        """U of every path; the questions of which the engine gave up a sampled answer; and tokens
        of the answers that were sampled for it."""
        view, none = self.scored_views.get(stream), torch.zeros(len(pairs), dtype=torch.int64)
        if likely is not None:
            return likely, set(), none
        if not pairs or view is None:
            return torch.full((len(pairs),), math.nan, dtype=torch.float64), set(), none
        attempts, lost = self._attempts(view, pairs, step)
        verdicts = torch.tensor([[a.right for a in own] for own in attempts])
        return accuracy_utility(verdicts), lost, _tokens(attempts)

    def _with_attempts(self, groups: Groups, pairs: Pairs, step: int) -> tuple[Groups, set[str]]:
        """The paths with the answers sampled behind those that closed, and the questions of which
        the engine gave up one."""
        closed = [(question, path) for question, path in pairs if path.closed]
        asked = [(question, path) for question, path in closed if not path.attempts]
        self._check_recorded([path for _, path in closed], drawn=bool(asked))
        # Nobody asks an engine for nothing.
        found, lost = self._attempts("student", asked, step) if asked else ([], set())
        known = {path.key: own for (_, path), own in zip(asked, found, strict=True)}
        return tuple(
            tuple(replace(path, attempts=known.get(path.key, path.attempts)) for path in group)
            for group in groups
        ), lost

    def _check_recorded(self, paths: Sequence[Path], *, drawn: bool) -> None:
        """ValueError for recorded answers that are fewer or more than this run samples, and for
        missing ones whose model is not this one."""
        count = self.cfg.scoring.answer_samples
        other = next((p for p in paths if p.attempts and len(p.attempts) != count), None)
        if other is not None:
            got = len(other.attempts)
            raise ValueError(
                f"engine.paths: {got} answers are recorded behind path {other.key}, and "
                f"scoring.answer_samples is {count}; set it to {got}"
            )
        if drawn and self.draws.recorded:
            raise ValueError(
                "engine.paths: got a path whose weight is recorded without answers behind its "
                "thought, expected those that it was weighed by; record them with train.record "
                "weights, or set objective.answer reference"
            )

    def _attempts(
        self, view: View, pairs: Pairs, step: int
    ) -> tuple[list[tuple[Attempt, ...]], set[str]]:
        """Draw and judge J answers after each thought, under this prompt; and the questions of
        which the engine gave up one."""
        count = self.cfg.scoring.answer_samples
        requests = []
        for question, path in pairs:
            prompt = after_thought(question, view, path)
            # A name of its own, and J numbers per path: no answer shares its seed with a thought or
            # with an answer to another path.
            name = f"{path.question_id}/answer"
            for index in range(path.index * count, (path.index + 1) * count):
                seed = request_seed(
                    run_seed=self.cfg.run.seed,
                    step=step,
                    question_id=name,
                    stream=path.stream,
                    index=index,
                )
                requests.append(
                    SampleRequest(
                        question_id=path.question_id,
                        stream=path.stream,
                        index=index,
                        prompt_ids=prompt,
                        seed=seed,
                    )
                )
        # No token closes such an answer: all that is drawn belongs to it.
        how = answer_only(self.sampling, self.cfg.scoring.answer_temperature)
        answers = self.engine.generate(requests, how, self.progress(len(requests)))
        lost = {answer.question_id for answer in answers if answer.finish == "error"}
        texts = [self.decode(answer.z_ids) for answer in answers]
        # Judged even where one was lost: the matrix keeps its shape, the question is left out.
        golds = [question.question.spellings for question, _ in pairs for _ in range(count)]
        verdicts = verify_any([*zip(golds, texts, strict=True)], self.verifier.verify)
        made = [
            Attempt(ids=answer.z_ids, right=bool(right))
            for answer, right in zip(answers, verdicts, strict=True)
        ]
        return [tuple(made[i : i + count]) for i in range(0, len(made), count)], lost

    def correct(self, pairs: Pairs) -> torch.Tensor:
        """1.0 for every path with a right answer, else 0.0; NaN where none was sampled. (n,)
        float64."""
        if not self.sampling.full_answer:
            # NaN and not 0: nobody has judged.
            return torch.full((len(pairs),), math.nan, dtype=torch.float64)
        return answers_correct(
            [path for _, path in pairs],
            [question.question.spellings for question, _ in pairs],
            decode=self.decode,
            verify=self.verifier.verify,
            tag=self.sampling.tag,
        )


def _tokens(attempts: Iterable[Sequence[Attempt]]) -> torch.Tensor:
    """Tokens of the answers behind each path, (paths,) int64."""
    return torch.tensor([sum(a.ids.numel() for a in own) for own in attempts], dtype=torch.int64)


def _as_asked(requests: Sequence[SampleRequest], paths: Sequence[Path]) -> list[Path]:
    """The paths with their questions as they were asked: rows and scores stand behind the prompt
    that a path was drawn from."""
    pairs = zip(requests, paths, strict=True)
    return [replace(path, asked=r.asked) if r.asked else path for r, path in pairs]


def _say(objective: Objective, batch: ScoredBatch, state: Mapping[str, Any]) -> Terms:
    """What the objective says of a batch, checked: a class of the user's may say anything."""
    terms = ask(objective, "terms", batch, state)
    check_terms(objective, terms, batch)
    return terms
