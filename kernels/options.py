"""Options of the group scores: one record for the configuration, the reference and the kernel.

No torch here: the objectives import this file, and a command line must not wait for torch.

To add an option: a field and its check here; the arithmetic in `reference.group_advantage` and its
kernel; a key of the same name in the objective's configuration.
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupOptions:
    """Options of the group scores, checked at birth: ValueError. The defaults are the paper's.

    >>> GroupOptions(alpha=1.0).eps
    1e-06
    """

    alpha: float = 0.5
    """Exponent of the length factor, >= 0; 0 turns it off."""
    baseline: str = "mean"
    """Of U over the prior paths: "mean"; or "lme", the log of the mean likelihood. That is stricter
    by Jensen and deaf to one terrible U (a -60 among four moves the mean by -15 nats)."""
    reward: str = "paper"
    """Of a path: "paper" max(0, U - Ubar + r_margin); "likelihood_gate" 1[P > 0.5];
    "likelihood_mix" 1[P > 0.5] (1 + max(0, U - Ubar)), with P = exp U. Neither is a verifier."""
    r_margin: float = 0.0
    """Nats; of reward "paper" only."""
    u_min: float = -20.0
    """Nats: what a NaN or infinite U becomes."""
    clamp_u: bool = False
    """Lift every finite U below u_min to u_min too."""
    eta_clip: tuple[float, float] | None = None
    """(low, high) of the length factor, which has no upper bound as a length goes to 1."""
    eps: float = 1e-6
    """Added to the std of a group."""
    ddof: int = 0
    """The std has G - ddof in its denominator."""
    std_gate: float = 0.0
    """Groups with std(S) below it are silent; 0 is off."""

    def __post_init__(self):
        # The chained comparison is False for NaN too.
        for name in ("alpha", "eps", "std_gate"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(
                    f"{name}: got {getattr(self, name)}, expected a finite number >= 0"
                )
        for name, choices in (
            ("baseline", ("mean", "lme")),
            ("reward", ("paper", "likelihood_gate", "likelihood_mix")),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"{name}: got {getattr(self, name)!r}, expected one of {', '.join(choices)}"
                )
        # Refused, not ignored: a margin that does nothing would pass for one that was tried.
        if not math.isfinite(self.r_margin) or (self.r_margin != 0 and self.reward != "paper"):
            raise ValueError(
                f"r_margin: got {self.r_margin} with reward={self.reward!r}, expected a finite "
                "number, and 0 unless reward='paper': the other rewards have no margin"
            )
        # It stands in for -inf, which would empty its whole group.
        if not math.isfinite(self.u_min):
            raise ValueError(
                f"u_min: got {self.u_min}, expected a finite number of nats such as -20"
            )
        # 0 < low: a factor of 0 would make S = 0.
        if self.eta_clip is not None and not 0 < self.eta_clip[0] <= self.eta_clip[1] < math.inf:
            raise ValueError(
                f"eta_clip: got {self.eta_clip}, expected (low, high) with 0 < low <= high; "
                "use None for no clip"
            )

    def check_group_size(self, group_size: int) -> None:
        """Raise ValueError where a group of this size has no std with `ddof`."""
        # The std divides by G - ddof.
        if not 0 <= self.ddof < group_size:
            raise ValueError(
                f"ddof: got {self.ddof}, expected 0 <= ddof < G = {group_size}; use 0 for the "
                "population std"
            )


# One object for every default: it is frozen.
PAPER = GroupOptions()
