"""An objective that asks the reference policy for all that it can give: see test_reference.py."""

from pydantic.dataclasses import dataclass

from vpgea_fast.objectives import STRICT, Draws, Keys, Term, Terms
from vpgea_fast.objectives.surrogate import Surrogate
from vpgea_fast.types import Score

SEEN = Score("prior", "student", "thought", "reference")
TARGET = Score("prior", "student", "target")


@dataclass(frozen=True, config=STRICT)
class Held(Keys):
    """Push paths that are shorter than the reference policy's, by their log-probs there."""

    group_size: int = 2
    asks: bool = True

    def draws(self):
        return Draws(prior=self.group_size, reference=3, verified=True)

    def needs(self):
        return frozenset([SEEN, TARGET, TARGET._replace(who="reference")] if self.asks else [])

    def terms(self, batch, _state, /):
        base = batch.reference.length_BP.mean(1, keepdim=True)
        likely = {key: values.sum().item() for key, values in batch.logps.get(SEEN, {}).items()}
        theirs = batch.logps.get(TARGET._replace(who="reference"), {})
        gaps = [
            abs(theirs[path.key].sum().item() - u)
            for group, row in zip(batch.prior.paths, batch.prior.u_BP.tolist(), strict=True)
            for path, u in zip(group, row, strict=True)
            if path.key in theirs
        ]
        part = Term(
            name="pg",
            stream="prior",
            view="student",
            weight_BP=(batch.prior.length_BP / base - 1).sign() + 0.5,
            live=Surrogate(kl_coef=0.1),
        )
        # Under names that the book has, for the log alone.
        found = {"utility": sum(likely.values()), "std_s": max(gaps, default=0.0)}
        return Terms(parts=(part,), metrics=found)
