"""What an objective answers, held to what the trainer can do with it: one line for what it cannot.

The methods of this project pass here too: a wrong shape would broadcast, and train on it.
"""

from __future__ import annotations

import json
import math
import operator
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, get_args

from vpgea_fast.names import Context, Norm, Part, Score, Stream, Trained, View, Who
from vpgea_fast.objectives.base import Draws, Objective, Term, Terms
from vpgea_fast.values import one_line

if TYPE_CHECKING:
    from vpgea_fast.types import ScoredBatch

NAME = re.compile(r"[a-z][a-z0-9_]*")
NORMALISER = ("norm", "norm_constant", "denominator")
DENOMINATORS = ("nominal", "effective")


def title(objective: Any) -> str:
    """How an error calls an objective: by its name, and one of the user's by its class too."""
    target = getattr(objective, "target", None)
    return f"objective {objective.name}" + (f" ({target})" if target else "")


def ask(objective: Any, method: str, *given: Any) -> Any:
    """What a method returns. ValueError, in one line with its name, for whatever it raises."""
    try:
        return getattr(objective, method)(*given)
    except Exception as error:  # a class of the user's may fail in any way
        name, said = type(error).__name__, one_line(error)
        said = said if said.startswith(name) else f"{name}: {said}"
        raise ValueError(f"{title(objective)}: {method}() raised {said}") from error


def at_step(objective: Any, step: int) -> Any:
    """The objective of this step, from 0. ValueError for one that draws, needs or divides otherwise
    than the objective of the run, which planned for that."""
    now = ask(objective, "at", step)
    # Without a schedule, which is the rule, nothing needs comparing.
    if now is objective:
        return now
    for what, of in {
        "draws()": lambda o: _comparable(ask(o, "draws")),
        "needs()": lambda o: ask(o, "needs"),
        "its normaliser": lambda o: [getattr(o, key, None) for key in NORMALISER],
    }.items():
        if (got := of(now)) != (expected := of(objective)):
            raise ValueError(
                f"{title(objective)}: at({step}) changed {what} to {_shown(got)}, expected "
                f"{_shown(expected)} at every step; let at() change what terms() computes alone"
            )
    return now


def _comparable(draws: Draws) -> tuple[Draws, set[str]]:
    """Functions of fields may be made anew whenever they are asked for: their names count."""
    return replace(draws, fields={}), {*draws.fields}


def check_objective(objective: Any) -> None:
    """ValueError for keys, draws and needs that no step could follow; before any path is drawn."""
    who = title(objective)
    # Any other word would fall through to the last normaliser, without a sign of it.
    for key, known in (("norm", get_args(Norm)), ("denominator", DENOMINATORS)):
        if (got := getattr(objective, key)) not in known:
            raise ValueError(f"{who}: {key}: got {got!r}, expected one of {', '.join(known)}")
    constant = objective.norm_constant
    if constant is not None and not (_is_number(constant) and 0 < constant < math.inf):
        raise ValueError(f"{who}: norm_constant: got {constant!r}, expected a number above 0")
    draws, needs = ask(objective, "draws"), ask(objective, "needs")
    if not isinstance(draws, Draws):
        raise ValueError(f"{who}: draws() returned {_shown(draws)}, expected Draws")
    if not isinstance(needs, (set, frozenset)):
        raise ValueError(f"{who}: needs() returned {_shown(needs)}, expected a frozenset of Score")
    known = [get_args(kind) for kind in (Stream, Context, Part, Who)]
    for score in needs:
        if not (isinstance(score, Score) and all(map(operator.contains, known, score))):
            raise ValueError(f"{who}: needs() asks for {_shown(score)}, expected a Score")
        if score.part == "attempts":
            raise ValueError(
                f"{who}: needs() asks for the attempts, of which a path may have none; ask for "
                "another part"
            )
        if score.view == "counterfactual" and score.part == "target":
            raise ValueError(
                f"{who}: needs() asks for the target behind a wrong answer; U is scored in the "
                "teacher's or the student's view: ask for another part, or another view"
            )
        if score.view == "early" and score[2:] != ("target", "policy"):
            raise ValueError(
                f"{who}: needs() asks for the {score.part} of the {score.who} behind an early cut, "
                "where the policy's target alone is scored; ask for that, or in another view"
            )
        if score.who == "posterior" and draws.posterior_who != "posterior":
            raise ValueError(
                f"{who}: needs() asks for {score.part} of the posterior policy, and draws() says "
                "of none; return Draws(posterior_who='posterior', ...), or ask for the policy's"
            )
        if not getattr(draws, score.stream):
            raise ValueError(
                f"{who}: needs() asks for {score.part} of the {score.stream} paths, and draws() "
                "asks for none; draw them, or leave the score out"
            )
        views = {s.view for s in needs if s[0] == score.stream and s[2:] == ("target", "policy")}
        views -= {"early"}
        # The column of a stream holds one: which would depend on the order of a set.
        if len(views) > 1:
            raise ValueError(
                f"{who}: needs() asks for U of the {score.stream} paths in both views, and u_BP "
                "holds that of one; choose one"
            )
    if not all(hasattr(ask(objective, "at", 0), name) for name in ("draws", "needs", "terms")):
        raise ValueError(f"{who}: at(0) returned no objective; return self, or a changed copy")


def check_terms(objective: Objective, terms: Any, batch: ScoredBatch) -> None:
    """ValueError, with the term's name, for what cannot become rows and a line of the log."""
    who = title(objective)
    if not isinstance(terms, Terms) or not terms.parts:
        got = "no parts" if isinstance(terms, Terms) else _shown(terms)
        raise ValueError(f"{who}: terms() returned {got}, expected Terms with one part or more")
    for term in terms.parts:
        _check_term(objective, term, batch)
    for stream, scores in terms.path_scores.items():
        for name, score_BP in scores.items():
            _check_shape(objective, score_BP, batch, stream=stream, what=f"path_scores {name!r}")
    for name, value in terms.metrics.items():
        if not (value is None or _is_number(value)):
            raise ValueError(f"{who}: metric {name!r} is {_shown(value)}, expected a number")
    _check_state(who, terms.state)


def _check_term(objective: Objective, term: Any, batch: ScoredBatch) -> None:
    import torch  # terms exist; a configuration, which is checked here too, must not wait for it

    if not isinstance(term, Term) or not NAME.fullmatch(str(term.name)):
        got = _shown(term.name if isinstance(term, Term) else term)
        raise ValueError(f"{title(objective)}: got the part {got}, expected a Term, its name a-z")
    of = f"term {term.name!r}: "
    who = f"{title(objective)}, {of[:-2]}"
    for key, kind in (("stream", Stream), ("view", View), ("part", Part), ("who", Trained)):
        if (got := getattr(term, key)) not in get_args(kind):
            known = ", ".join(get_args(kind))
            raise ValueError(f"{who}: {key}: got {got!r}, expected one of {known}")
    if term.who == "posterior" and objective.draws().posterior_who != "posterior":
        raise ValueError(
            f"{who}: trains the posterior policy, and draws() says of none; return "
            "Draws(posterior_who='posterior', ...), or train the policy"
        )
    # Their lengths are planned for, and the paths asked for them, by what draws() says.
    if term.part in ("response", "answer") and not objective.draws().answers:
        raise ValueError(
            f"{who}: trains the {term.part}, but draws() does not ask for answers; return "
            "Draws(answers=True, ...), or train the thought"
        )
    if term.part == "target" and not objective.draws().targets:
        raise ValueError(
            f"{who}: trains the reference answer, but draws() does not say so; return "
            "Draws(targets=True, ...), or train the thought"
        )
    _check_attempts(who, term, objective)
    # The longest row is planned before any path is drawn.
    scored = [score.view for score in objective.needs() if score.part == "target"]
    if term.part == "target" and term.view not in ("student", *scored):
        raise ValueError(
            f"{who}: trains the reference answer in the {term.view} view, where nothing scores it; "
            f"train it in the student's, or ask for Score({term.stream!r}, {term.view!r}, 'target')"
        )
    _check_shape(objective, term.weight_BP, batch, stream=term.stream, what=f"{of}weight_BP")
    if not term.weight_BP.is_floating_point():
        raise ValueError(f"{who}: weight_BP is {term.weight_BP.dtype}, expected torch.float64")
    _check_close(who, term, batch, objective)
    for key in ("counted_BP", "held_BP"):
        if (mask_BP := getattr(term, key)) is None:
            continue
        _check_shape(objective, mask_BP, batch, stream=term.stream, what=f"{of}{key}")
        if mask_BP.dtype != torch.bool:
            raise ValueError(f"{who}: {key} is {mask_BP.dtype}, expected torch.bool")
    # A question that is not whole gets no weight, whatever the objective says of it.
    wrong_BP = ~term.weight_BP.isfinite() & (batch.lost_B == 0)[:, None]
    if wrong_BP.any():
        b, i = wrong_BP.nonzero()[0].tolist()
        raise ValueError(
            f"{who}: the weight of {term.stream} path {i} of question "
            f"{batch.questions[b].question.id!r} is {term.weight_BP[b, i].item()}, expected a "
            "finite number; columns that draws() and needs() do not ask for are NaN"
        )
    _check_live(who, term, objective)


def _check_attempts(who: str, term: Term, objective: Objective) -> None:
    """ValueError for attempts that nobody samples, or that a term could not train."""
    if term.part != "attempts":
        return
    draws = objective.draws()
    # Each is a row with the whole thought in it: how many there may be is planned for.
    if not draws.attempts or (term.first or math.inf) > draws.answer_rows:
        raise ValueError(
            f"{who}: trains {term.first or 'all'} right attempts of a path, but draws() asks for "
            f"{draws.answer_rows}; return Draws(attempts=True, answer_rows=N, ...) and give the "
            "term first=N, or train the thought"
        )
    if term.stream == "reference" or term.view != "student" or term.factors is not None:
        raise ValueError(
            f"{who}: attempts are sampled behind the policy's thoughts in the student's view, "
            "several of a path; train them there, without factors"
        )


def _check_live(who: str, term: Term, objective: Objective) -> None:
    """ValueError for a loss of the moment that no row could ask."""
    # Where a rollout has several updates the rows would take `later`, and drop `live` unsaid.
    if term.live is not None and term.later is not None:
        raise ValueError(f"{who}: got live and later; give the one that is meant")
    key, live = ("later", term.later) if term.live is None else ("live", term.live)
    if live is None:
        return
    if not (callable(live) and hasattr(live, "reference")):
        raise ValueError(
            f"{who}: {key}: got {_shown(live)}, expected a function with the attribute "
            "`reference`, whether it reads a reference policy (vpgea_fast.types.Live)"
        )
    if live.reference and key == "later":
        raise ValueError(
            f"{who}: later reads a reference policy, which pulls in the first update too; give it "
            "as live"
        )
    score = Score(term.stream, term.view, term.part, "reference")
    if live.reference and score not in ask(objective, "needs"):
        raise ValueError(
            f"{who}: its live loss reads the reference policy's log-probs of the {term.part} of "
            f"{term.stream} paths in the {term.view} view, which needs() does not ask for; add "
            f"{score}"
        )


def _check_close(who: str, term: Term, batch: ScoredBatch, objective: Objective) -> None:
    """ValueError for weights of the thoughts' last tokens that no row could take."""
    if term.close_BP is None:
        return
    if term.part not in ("thought", "response"):
        raise ValueError(
            f"{who}: close_BP is of the thought's last token, which the {term.part} has not; train "
            "the thought or the response"
        )
    what = f"term {term.name!r}: close_BP"
    _check_shape(objective, term.close_BP, batch, stream=term.stream, what=what)
    whole_B1 = (batch.lost_B == 0)[:, None]
    if not (term.close_BP.is_floating_point() and (term.close_BP.isfinite() | ~whole_B1).all()):
        raise ValueError(f"{who}: close_BP: got {term.close_BP}, expected finite float64")


def _check_shape(
    objective: Objective, value: Any, batch: ScoredBatch, *, stream: Any, what: str
) -> None:
    """ValueError for what has no number for each path of the stream."""
    who, known = f"{title(objective)}, {what}", get_args(Stream)
    if stream not in known:
        raise ValueError(f"{who}: got the stream {stream!r}, expected {' or '.join(known)}")
    if not getattr(objective.draws(), stream):
        raise ValueError(f"{who} is of the {stream} paths, but draws() asks for none")
    length_BP = batch.stream(stream).length_BP
    shape = tuple(length_BP.shape)
    if not isinstance(value, type(length_BP)) or value.shape != shape:
        raise ValueError(
            f"{who}: got {_shown(value)}, expected a tensor {shape}: questions, {stream} paths"
        )


def _check_state(who: str, state: Any) -> None:
    """ValueError for a state that a checkpoint would give back changed."""
    try:
        same = isinstance(state, Mapping) and json.loads(json.dumps(dict(state))) == dict(state)
        # NaN is no JSON, and unequal to itself when it comes back.
        json.dumps(dict(state), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{who}: state: {one_line(error)}; expected values of JSON") from error
    if not same:
        raise ValueError(
            f"{who}: state: got {_shown(state)}, which JSON gives back changed; use text as keys, "
            "and lists for tuples"
        )


def _is_number(value: Any) -> bool:
    # True is an int to Python, and would be logged as 1.
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _shown(value: Any) -> str:
    """A value in a message: a tensor by its shape, others cut."""
    if hasattr(value, "shape"):
        return f"a tensor {tuple(value.shape)}"
    text = repr(value).replace("\n", " ")
    return text if len(text) <= 80 else f"{text[:77]}..."
