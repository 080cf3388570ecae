"""What smollm2.py decides by itself, by rules that were fixed before any result.

base       is it of use, or is it trained again, once, with the next number of LADDER?
preflight  would the leak guard let honest solutions of the base's teacher pass?
verdict    is a method no less accurate than the base, with at most SHORTER of its tokens?
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from vpgea_fast.config import Config
from vpgea_fast.intake import ALONE, open_text, read
from vpgea_fast.metrics import model_flops
from vpgea_fast.model import frozen, load_policy
from vpgea_fast.passes import Passes
from vpgea_fast.questions import misled
from vpgea_fast.scoring import score_row
from vpgea_fast.verify import Verifier

LADDER = (400,)
"""Steps of the base's training; a further number here is for a base that the one before leaves
weak. 200 were: a first run's base had solved a third of 216 sampled problems when it was stopped.
Both numbers one after the other take more than two hours."""
ACCURACY = (0.5, 0.9)
"""Of the base, sampled. Above it there is little to gain but tokens, and no step takes it down."""
MOST_CUT = 0.05
HONEST = 100
"""Questions of train.jsonl whose solutions the preflight scores."""
MOST_CAUGHT = 0.3
SHORTER = 0.7
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
RULES = {
    "ladder": LADDER,
    "accuracy": ACCURACY,
    "most_cut": MOST_CUT,
    "honest": HONEST,
    "most_caught": MOST_CAUGHT,
    "shorter": SHORTER,
}


def outside(base: Mapping[str, float]) -> list[str]:
    """How a base is not as expected: `weak`, `cut`, `strong`. More steps help the first two."""
    low, high = ACCURACY
    found = {
        "weak": base["acc"] < low,
        "cut": base["truncated"] > MOST_CUT,
        "strong": base["acc"] > high,
    }
    return [name for name, is_so in found.items() if is_so]


def next_steps(found: Sequence[str], steps: int) -> int | None:
    """Steps to train the base with again, or None: it stays."""
    longer = [more for more in LADDER if more > steps]
    return longer[0] if longer and {"weak", "cut"} & {*found} else None


def honest_gaps(cfg: Config, count: int = HONEST) -> torch.Tensor:
    """What the leak guard would find in right solutions, (count,) float64 nats:

        log q(z|x, y*) - log q(z|x, y')

    z the thought of a question's first response, y' as the guard draws it in step 0.
    """
    text = open_text(cfg)
    with Verifier.configured(cfg.verify) as verifier:
        pool = read(cfg, text, verifier.accepts_itself, ALONE).questions
        some = pool[:count]
        wrong = misled(cfg, some, pool, step=0, prompt=text.prompter.prompt, verify=verifier.verify)
    thoughts = [first[0] for first, *_ in text.prompter.responses(some)]
    views = [*zip(some, thoughts, strict=True), *zip(wrong, thoughts, strict=True)]
    policy = load_policy(frozen(cfg.model))
    passes = Passes(ALONE, cfg.train.micro_batch_tokens, model_flops(policy.causal_lm.config))
    rows = [score_row(question.teacher_ids, z_ids) for question, z_ids in views]
    scores = torch.stack([row.sum() for row in passes(lambda b, _: policy.logprob(b), rows)])
    right, other = scores.double().view(2, -1)
    return right - other


def preflight(gaps: Mapping[str, torch.Tensor], limit: float) -> dict[str, Any]:
    """Quantiles of the gaps by style in nats, and the share that the guard would catch."""
    edges = torch.tensor(QUANTILES, dtype=torch.float64)

    def caught(gap: torch.Tensor) -> float:
        return (~(gap <= limit)).double().mean().item()  # NaN too, as the guard does

    found = {
        style: {
            "solutions": gap.numel(),
            "nats": dict(zip(map(str, QUANTILES), gap.quantile(edges).tolist(), strict=True)),
            "caught": caught(gap),
        }
        for style, gap in gaps.items()
    }
    share = caught(torch.cat([*gaps.values()]))
    return {"leak_limit": limit, **found, "caught": share, "go_on": share <= MOST_CAUGHT}


def told(stages: Mapping[str, Any]) -> str:
    """One line: whether the long stages are worth their time."""
    base, check, fore = stages["base"]["problems, sampled"], stages["check"], stages["preflight"]
    odd = f" ({', '.join(check['outside'])})" if check["outside"] else ""
    line = (
        f"go on: {'yes' if fore['go_on'] else 'no'}. Base of {check['sft_steps']} steps: accuracy "
        f"{base['acc']:.1%}, cut {base['truncated']:.1%}{odd}. The leak guard would catch "
        f"{fore['caught']:.1%} of honest solutions, and may {MOST_CAUGHT:.0%}"
    )
    if fore["go_on"]:
        return line
    # The limit is the method's, and the rows are this project's.
    return f"{line}; mend the teacher's rows of sft.jsonl, then give a new --out and --runs"


def verdict(found: Mapping[str, Any]) -> dict[str, Any]:
    """Whether a method is no less accurate than the base, with at most SHORTER of its tokens.

    `holds` by the values themselves; `clear` where the ends of both paired intervals say so too.
    """
    accuracy, tokens = found["change"]["acc"], found["change"]["tokens"]
    ratio = {key: None if value is None else 1 + value for key, value in tokens.items()}

    def both(low: float | None, high: float | None) -> bool:
        return low is not None and high is not None and low >= 0 and high <= SHORTER

    return {
        "acc_change": accuracy,
        "token_ratio": ratio,
        "holds": both(accuracy["value"], ratio["value"]),
        "clear": both(accuracy["low"], ratio["high"]),
    }


def verdicts(stages: Mapping[str, Any], methods: Sequence[str]) -> dict[str, dict[str, Any]]:
    """By method and mode, of the held-out problems."""
    evals = {name: stages.get(f"{name}_eval", {}) for name in methods}
    return {
        name: {
            mode.removeprefix("problems, "): verdict(found)
            for mode, found in stage.items()
            if mode.startswith("problems, ") and "change" in found
        }
        for name, stage in evals.items()
        if stage
    }


def verdict_lines(found: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """A line for each method and mode."""
    for name, modes in found.items():
        for mode, own in modes.items():
            accuracy = _span(own["acc_change"], 100, "+.1f")
            ratio = _span(own["token_ratio"], 1, ".2f")
            words = "holds" if own["holds"] else "does not hold"
            clear = ", its intervals too" if own["clear"] else ""
            yield (
                f"{name}, {mode}: accuracy {accuracy} points, tokens x {ratio}; 'not below the "
                f"base with at most {SHORTER} of its tokens' {words}{clear}"
            )


def _span(change: Mapping[str, float | None], scale: float, form: str) -> str:
    value, low, high = (
        "-" if change[key] is None else f"{scale * (change[key] or 0):{form}}"
        for key in ("value", "low", "high")
    )
    return f"{value} [{low}, {high}]"
