"""The recipes: which bases there are, how each is trained, and what is accepted."""

from __future__ import annotations

from dataclasses import dataclass, field

from vpgea_fast.tiny.chain import CHAIN
from vpgea_fast.tiny.lookup import LOOKUP
from vpgea_fast.tiny.task import Corpus

TASKS = {task.name: task for task in (CHAIN, LOOKUP)}


@dataclass(frozen=True)
class Phase:
    """Steps of AdamW; `pinned` turns on the weights and the pin of the mode decision."""

    steps: int
    lr: float
    pinned: bool


Band = tuple[float, float]


@dataclass(frozen=True)
class Gate:
    """What a base must measure, by the names of BaseReport; None is not looked at."""

    concise_student: Band
    concise_teacher: Band = (0.2, 0.3)
    terse_student: Band | None = None
    terse_teacher: Band | None = None
    greedy_accuracy: Band = (0.99, 1.0)
    forced_accuracy: Band = (0.99, 1.0)
    sampled_accuracy: Band = (0.8, 0.97)
    sampled_tokens: Band = (50.0, 75.0)


@dataclass(frozen=True)
class Recipe:
    """A kind of base: how rare concise thoughts are in the student view, and what is accepted.

    `student_terse` is the share of terse ones among those; it needs a corpus that draws them.
    """

    name: str
    student_concise: float
    gate: Gate
    student_terse: float = 0.0
    task: str = "chain"
    corpus: Corpus = field(default_factory=Corpus)
    phases: tuple[Phase, ...] = (Phase(1300, 3e-3, pinned=False), Phase(900, 1e-3, pinned=True))
    batch: int = 32
    pin: float = 0.05


# One shape of verbose thought: each step repeated once, `ok hmm`, and a second pass. What is
# shorter, is shorter because it decided not to be verbose.
STRICT = Corpus(wait_again=0.0, hmm=1.0, check=1.0)
# After the last but one lookup a verbose thought goes on, ends or checks: `check` is rare enough
# that ending is the likeliest (0.65 x 0.75), so a greedy student is wrong.
HURRIED = Corpus(
    teacher_concise=0.38,
    teacher_stated=0.02,
    check=0.25,
    student_terse=0.3,
    teacher_terse=0.15,
    hurry=0.65,
)


def lookup_recipe(name: str, student_concise: float, band: Band) -> Recipe:
    gate = Gate(
        concise_student=band,
        terse_student=(band[0] * 1e-4, band[1] * 1e-2),
        terse_teacher=(0.02, 0.08),
        greedy_accuracy=(0.7, 0.9),
        forced_accuracy=(0.7, 0.9),
        sampled_accuracy=(0.7, 0.9),
        sampled_tokens=(40.0, 60.0),
    )
    return Recipe(name, student_concise, gate, 1e-3, task="lookup", corpus=HURRIED)


RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe("demo", 1.2e-6, Gate((1e-7, 1e-5))),
        Recipe("stated", 1.2e-6, Gate((1e-7, 1e-5)), corpus=Corpus(teacher_stated=0.1)),
        Recipe("common", 0.0115, Gate((0.005, 0.02))),
        Recipe("chain-1e-4", 1.2e-4, Gate((5e-5, 2e-4))),
        Recipe("chain-1e-3", 1.2e-3, Gate((5e-4, 2e-3))),
        Recipe("strict", 1.2e-6, Gate((1e-7, 1e-5)), corpus=STRICT),
        lookup_recipe("lookup-rare", 1.4e-6, (1e-7, 1e-5)),
        lookup_recipe("lookup-common", 0.0135, (0.005, 0.02)),
    )
}
