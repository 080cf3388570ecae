"""What the word problems are about: kinds, wordings, names and numbers, as tables.

A kind is a chain of two or three calculations. `{name}`, `{other}` and `{thing}` are words, `{a}`
to `{d}` numbers of the question, `{0}` and `{1}` the results of earlier steps.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Kind:
    """One kind of problem: its questions, and the steps that solve it."""

    name: str
    numbers: dict[str, tuple[int, int]]
    """Lowest and highest value of each number. A draw with a result that is no whole number above
    zero is drawn again."""
    wordings: tuple[str, ...]
    steps: tuple[tuple[str, str], ...]
    """(what is calculated, calculation); the last result is the answer."""


KINDS = (
    Kind(
        "boxes",
        {"a": (2, 9), "b": (3, 12), "c": (2, 19)},
        (
            (
                "{name} has {a} boxes with {b} {thing} in each, and {c} more {thing}. How many "
                "{thing} does {name} have?"
            ),
            (
                "There are {a} boxes on a shelf. Each box holds {b} {thing}. {name} puts {c} more "
                "{thing} beside them. How many {thing} are there now?"
            ),
        ),
        (("the {thing} in the boxes", "{a} * {b}"), ("all the {thing}", "{0} + {c}")),
    ),
    Kind(
        "gift",
        {"a": (12, 60), "b": (5, 30), "c": (3, 25)},
        (
            (
                "{name} had {a} {thing} and bought {b} more. Then {name} gave {c} {thing} to "
                "{other}. How many {thing} does {name} have left?"
            ),
            (
                "{name} finds {b} {thing} and puts them with the {a} {thing} at home. {other} gets "
                "{c} of them. How many {thing} does {name} keep?"
            ),
        ),
        (("the {thing} before the gift", "{a} + {b}"), ("the {thing} left", "{0} - {c}")),
    ),
    Kind(
        "share",
        {"a": (2, 8), "b": (4, 12), "c": (2, 8)},
        (
            (
                "{name} has {a} bags with {b} {thing} each and shares all of them equally among "
                "{c} friends. How many {thing} does each friend get?"
            ),
            (
                "{a} bags hold {b} {thing} each. {c} children, {name} among them, share all the "
                "{thing} equally. How many {thing} does one child get?"
            ),
        ),
        (("all the {thing}", "{a} * {b}"), ("the {thing} of each", "{0} / {c}")),
    ),
    Kind(
        "change",
        {"a": (2, 9), "b": (2, 9), "c": (20, 100)},
        (
            (
                "{name} buys {a} {thing} for {b} dollars each and pays with {c} dollars. How many "
                "dollars does {name} get back?"
            ),
            (
                "One of the {thing} costs {b} dollars. {name} has {c} dollars and buys {a} of "
                "them. How many dollars are left?"
            ),
        ),
        (("the price in dollars", "{a} * {b}"), ("the dollars that are left", "{c} - {0}")),
    ),
    Kind(
        "pages",
        {"a": (60, 200), "b": (6, 20), "c": (3, 9)},
        (
            (
                "{name} reads a book of {a} pages. {name} reads {b} pages a day. How many pages "
                "are left after {c} days?"
            ),
            (
                "For {c} days {name} has read {b} pages a day of a book that has {a} pages. How "
                "many pages does {name} still have to read?"
            ),
        ),
        (("the pages read", "{b} * {c}"), ("the pages left", "{a} - {0}")),
    ),
    Kind(
        "times",
        {"a": (3, 20), "b": (2, 6)},
        (
            (
                "{name} has {a} {thing}. {other} has {b} times as many. How many {thing} do they "
                "have together?"
            ),
            (
                "{other} has {b} times as many {thing} as {name}, who has {a}. How many {thing} do "
                "the two have in all?"
            ),
        ),
        (("the {thing} of {other}", "{a} * {b}"), ("both together", "{a} + {0}")),
    ),
    Kind(
        "wages",
        {"a": (3, 12), "b": (2, 7), "c": (8, 15)},
        (
            (
                "{name} works {a} hours on each of {b} days and earns {c} dollars an hour. How "
                "many dollars does {name} earn?"
            ),
            (
                "{name} is paid {c} dollars for each hour. {name} works on {b} days, {a} hours a "
                "day. How many dollars is that?"
            ),
        ),
        (("the hours", "{a} * {b}"), ("the dollars earned", "{0} * {c}")),
    ),
    Kind(
        "rows",
        {"a": (3, 12), "b": (4, 12), "c": (2, 20)},
        (
            (
                "A hall has {a} rows of {b} chairs. {name} takes {c} chairs away. How many chairs "
                "are left?"
            ),
            (
                "{name} sets up {a} rows with {b} chairs in each row, but {c} chairs are broken. "
                "How many chairs can be used?"
            ),
        ),
        (("all the chairs", "{a} * {b}"), ("the good chairs", "{0} - {c}")),
    ),
    Kind(
        "half",
        {"a": (10, 80), "b": (2, 5), "c": (2, 15)},
        (
            (
                "{name} had {a} {thing}. {name} gave one of every {b} {thing} to {other}, and lost "
                "{c}. How many {thing} does {name} have now?"
            ),
            (
                "Of {a} {thing}, {name} gives every group of {b} one to {other}, so one part in "
                "{b}. Then {c} more are lost. How many {thing} are left?"
            ),
        ),
        (
            ("the {thing} given away", "{a} / {b}"),
            ("the {thing} after that", "{a} - {0}"),
            ("the {thing} left", "{1} - {c}"),
        ),
    ),
    Kind(
        "saving",
        {"a": (10, 60), "b": (3, 15), "c": (3, 9), "d": (5, 40)},
        (
            (
                "{name} has {a} dollars and saves {b} dollars a week for {c} weeks. Then {name} "
                "spends {d} dollars. How many dollars does {name} have?"
            ),
            (
                "Every week {name} puts {b} dollars into a box that holds {a} dollars. After {c} "
                "weeks {name} takes {d} dollars out. How many dollars are in the box?"
            ),
        ),
        (
            ("the dollars saved", "{b} * {c}"),
            ("the dollars with those before", "{0} + {a}"),
            ("the dollars left", "{1} - {d}"),
        ),
    ),
    Kind(
        "two_kinds",
        {"a": (2, 9), "b": (2, 9), "c": (2, 9), "d": (2, 9)},
        (
            (
                "{name} buys {a} {thing} for {b} dollars each and {c} hats for {d} dollars each. "
                "How many dollars does {name} pay?"
            ),
            (
                "A hat costs {d} dollars, and one of the {thing} costs {b} dollars. {name} takes "
                "{c} hats and {a} {thing}. How many dollars is that?"
            ),
        ),
        (
            ("the {thing} in dollars", "{a} * {b}"),
            ("the hats in dollars", "{c} * {d}"),
            ("all in dollars", "{0} + {1}"),
        ),
    ),
    Kind(
        "difference",
        {"a": (4, 12), "b": (3, 9), "c": (2, 9), "d": (3, 9)},
        (
            (
                "{name} makes {a} {thing} a day for {b} days. {other} makes {c} {thing} a day for "
                "{d} days. How many more {thing} does {name} make?"
            ),
            (
                "In {b} days {name} makes {a} {thing} a day. In {d} days {other} makes {c} a day. "
                "By how many {thing} is {name} ahead?"
            ),
        ),
        (
            ("the {thing} of {name}", "{a} * {b}"),
            ("the {thing} of {other}", "{c} * {d}"),
            ("the difference", "{0} - {1}"),
        ),
    ),
)

NAMES = {
    "train": (
        "Ada Ben Carla David Emma Felix Grace Henry Iris Jack Kate Leo Mary Noah Olga Paul Rosa "
        "Sam Tina Umar Vera Will Yara Zoe Anna Bob Clara Dan Eva Fred Gina Hugo Ida John Kim Lucy"
    ).split(),
    "test": "Amir Bella Chen Dora Elias Farah Gus Helen Ivan Julia Karl Lena Max Nina".split(),
}
"""Of the splits: no name is in both."""
THINGS = (
    "apples pens books cards coins stamps shells marbles cookies stickers flowers balloons pencils "
    "oranges beads toys"
).split()

OPENINGS = ("Let me think.", "Okay, step by step.", "Hmm, let me see.")
AIMS = (
    ("First I need {what}.", "I begin with {what}."),
    ("Now I need {what}.", "Next I look for {what}."),
)
"""Of the first step, and of a later one."""
CHECKS = ("Wait, again: {sum}. Yes.", "Let me check: {sum}. Good.", "Is it {sum}? It is.")
CLOSINGS = ("So the answer should be {answer}.", "That gives {answer}, and I am done.")
"""What a verbose solution says beside its sums; all of it can be left out. It is short, since two
cores draw and train each of its tokens."""
