r"""The worker: judges whether a text states its gold answer, under one checker.

Run as `python -P checkers.py FD SETTINGS`. It imports no sibling, no torch and no pydantic, so that
a worker is up in a tenth of a second, with `math` in half a second. SETTINGS is JSON: name, target,
path, limit_s, by_clock.

Checkers, all as `judge(gold, text) -> bool`; a text is what was decoded after the thought:

* math: math-verify behind the rewrites below. The answer is the last \boxed{} (with boxes close
  before it); without one, the final-answer line; else the last formula or number.
* number: equal as exact rationals; no tolerance. 1,000 = 1\,000 = 1e3, 1/2 = 0.5, and 4% = 0.04.
* text: the same words; case, spaces, \text{} and closing dots aside.
* letter: the same choice letter, A to J: of `A`, `(C) 12`, `A. 12`, `\text{(B)}`.
* custom: a function of the user.

number, text and letter take the last \boxed{}, else the final-answer line, else the last line.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
import signal
import sys
import unicodedata
from collections.abc import Callable
from contextlib import suppress
from fractions import Fraction
from functools import lru_cache
from multiprocessing.connection import Connection
from pathlib import Path

Judge = Callable[[str, str], object]
"""(gold, text) -> whether the text states the gold answer: a bool, unless a user wrote it."""

WRAPPERS = r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|operatorname|mbox)"

# (pattern, replacement): one meaning in several spellings, for gold and text alike. Each line is
# what people, data sets or models write and math-verify 0.9 misreads.
SPELLINGS = [
    (r"\u2212", "-"),
    (r"^\s*[\u2013\u2014]\s*(?=[\d\\.])", "-"),  # a dash for a minus
    (r"×", r"\\times "),
    (r"÷", r"\\div "),
    (r"[·⋅]", r"\\cdot "),
    (r"π", r"\\pi "),
    (r"∞", r"\\infty "),
    (r"≤|⩽", r"\\le "),
    (r"≥|⩾", r"\\ge "),
    (r"∪", r"\\cup "),
    (r"½", r"\\frac{1}{2}"),
    (r"¼", r"\\frac{1}{4}"),
    (r"¾", r"\\frac{3}{4}"),
    (r"²", "^{2}"),
    (r"³", "^{3}"),
    (r"√\s*(\d+(?:\.\d+)?|[a-zA-Z])", r"\\sqrt{\1}"),
    (r"√\s*\(([^()]*)\)", r"\\sqrt{\1}"),
    (r"√(?=\s*\{)", r"\\sqrt"),
    (r"°|\\degrees?\b", r"^{\\circ}"),
    (rf"(?:{WRAPPERS}|\{{\\rm)(?:\{{|\s)\s*([ie])\s*\}}", r" \1 "),  # upright i and e
    (r"\\varnothing\b|∅|\\\{\s*\\\}", r"\\emptyset "),
    (rf"{WRAPPERS}\{{\s*(?:percent|\\?%)\s*\}}", r"\\%"),
    (r"(?<=\w)\s*[.,;]\s*\}\s*$", "}"),  # \text{even.}
    (r"\\not\s*=|\\ne(?![a-zA-Z])|≠", r"\\neq "),
    (r"≈", r"\\approx "),
    (r"(?<=[\d}])\s*percent(?:age)?\b(?!\s*point)", r"\\%"),
]

# 10 080, 10\,080, 10~080: thousands apart. Commas are math-verify's.
_GAP = r"(?:\\[,:;! ]|~|[ \u00a0\u2009\u202f])"
THOUSANDS = re.compile(rf"(?<![\d.,])\d{{1,3}}(?:{_GAP}\d{{3}})+(?!\d)")
GAP = re.compile(_GAP)

# What turns an answer into another claim. Gold and text must say the same of these.
CLAIM = re.compile(r"\\(?:neq|not|approx|simeq|sim)(?![a-zA-Z])|[≃∼]|^\s*~")
QUALIFIERS = frozenset(
    "about almost and any anything approximately around at between billion billions but certain "
    "double dozen dozens else except factorial fewer greater half halves hundred hundreds if ish "
    "just least less maybe million millions more most nearly never no none not nothing or other "
    "otherwise over percentage perhaps plus minus points possibly roughly so some something "
    "squared cubed than then thirds thousand thousands times trillion trillions unknown unless "
    "where whether without".split()
)

BASE = re.compile(r"\d\s*_\s*\{?\s*(\d+)")
LABEL = re.compile(
    rf"^(?:{WRAPPERS}\{{\s*)?(?:\(([A-J])\)|([A-J])[.:)])(?:\s*\}})?+"
    r"(?![-+*/^_=<>!])(?:\s|\\[ ,;:]|\\q?quad|~)*(.*)$",
    re.DOTALL,
)
SECOND_LABEL = re.compile(
    rf"\([A-J]\)|^[^a-zA-Z]*[A-J]\b|^\W*(?:{WRAPPERS}\{{)?\W*(?:or|and|not|nor|but)\b"
)
LETTER = re.compile(
    rf"^(?:{WRAPPERS}\{{)?\s*(?:[Oo]ption|[Cc]hoice)?\s*\(?([A-J])\)?[.:]?\s*\}}?[.,]?$"
)
UNITS = re.compile(
    r"^(?P<number>(?:\\?\$)?\s*-?(?:\d[\d,.]*|\\frac\{\d+\}\{\d+\}))\s*"
    r"(?:\((?P<noun>[A-Za-z][A-Za-z .]*)\)|\s(?P<words>[A-Za-z]{4,}(?:\s[A-Za-z]{2,}){0,2}))\.?$"
)
TRAILING_TEXT = re.compile(rf"\S\s*{WRAPPERS}\{{([^{{}}]*)\}}\s*$")
STATED = re.compile(
    r"(?:\banswer\b[^\n.:=]{0,40}?(?:\bis\b|\bare\b|[:=])(?:\s*:)?|####)[*_\s]*(.+)", re.IGNORECASE
)
STATED_CHARS = 60  # a longer rest of a line is prose
WORD = re.compile(r"[a-z]+")


def boxed(text: str) -> str | None:
    r"""What the last \boxed{} of a text holds, with boxes close before it; None without one."""
    return box_reader()(text, mode="last") if r"\boxed" in text else None


@lru_cache(maxsize=1)
def box_reader() -> Callable[..., str]:
    """math-verify's own reader of boxes, taken from its file: an import of its package brings
    sympy, 0.3 s of each worker, which `math` alone needs."""
    package = importlib.util.find_spec("latex2sympy2_extended")
    if package is None or package.origin is None:
        raise ImportError("latex2sympy2_extended, a part of math-verify, is missing")
    file = Path(package.origin).with_name("math_normalization.py")
    spec = importlib.util.spec_from_file_location("math_normalization", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.extract_boxed_content


def last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1] if lines else ""


def stated(text: str) -> str | None:
    """What a text without a box says last: its final-answer line, or itself if it is short."""
    last = last_line(text)
    found = STATED.findall(last)
    said = found[-1] if found else last if last == text.strip() else ""
    said = said.strip().lstrip("*_ ").rstrip("*_ .")
    if said.count("$") == 2 and said[0] == said[-1] == "$":
        said = said[1:-1]
    return said if 0 < len(said) <= STATED_CHARS else None


def respell(text: str) -> str:
    """SPELLINGS, thousands and TeX's brace-less arguments, wherever they stand."""
    for pattern, new in SPELLINGS:
        text = re.sub(pattern, new, text)
    text = THOUSANDS.sub(lambda match: GAP.sub("", match[0]), text)
    return _brace_arguments(text) if re.search(r"\\[dtc]?frac|\\sqrt|\\d?binom", text) else text


_TAKES_ARGUMENTS = re.compile(r"\\(?:([dtc]?frac|[dt]?binom)|sqrt\s*(?:\[[^\]]*\])?)(?![a-zA-Z])")
_ONE_TOKEN = re.compile(r"\s*(\\[a-zA-Z]+|[0-9a-zA-Z])")


def bare(answer: str) -> str:
    """An answer without the signs that open and close mathematics, spelled as one way."""
    return respell(re.sub(r"\\?\$|(?<!\\)\\[()\[\]]", " ", answer).strip())


def _brace_arguments(text: str) -> str:
    r"""\frac12, \frac 59, \frac1{12}, \sqrt2 with their braces. Two digits after the last argument
    (\sqrt12, \frac123) mean one thing to TeX and another to people: left alone."""
    # `out` holds what is done, text[at:] what is not; arguments may hold commands themselves.
    out, at = [], 0
    while match := _TAKES_ARGUMENTS.search(text, at):
        parts, end = [match[0].rstrip()], match.end()
        for _ in range(2 if match[1] else 1):
            # TeX takes one token or one group as an argument.
            token = _ONE_TOKEN.match(text, end)
            if token:
                parts.append(f"{{{token[1]}}}")
                end = token.end()
            elif (close := _closing(text, end)) is not None:
                opening = text.index("{", end)
                parts.append(f"{{{_brace_arguments(text[opening + 1 : close])}}}")
                end = close + 1
            else:
                break
        else:
            # A second digit behind: ambiguous, see above.
            if not (text[end - 1].isdigit() and text[end : end + 1].isdigit()):
                out += [text[at : match.start()], *parts]
                at = end
                continue
        out.append(text[at : match.end()])
        at = match.end()
    return "".join([*out, text[at:]])


def _closing(text: str, start: int) -> int | None:
    """Where the group that opens at `start` (after spaces) closes; None without one."""
    depth = 0
    for at in range(start, len(text)):
        char = text[at]
        depth += (char == "{") - (char == "}")
        if depth == 0 and not char.isspace():
            return at if char == "}" else None
    return None


def balanced(text: str) -> bool:
    depth = 0
    for char in re.sub(r"\\[{}]", "", text):
        depth += (char == "{") - (char == "}")
        if depth < 0:
            return False
    return depth == 0


def meaningful(answer: str) -> bool:
    """Whether an answer can be one: braces in pairs, a sign of content, nothing left open."""
    return (
        balanced(answer)
        and re.search(r"\w", answer) is not None
        and re.search(r"[=<>+/^_:-]\s*$", answer) is None
    )


def without_unit(answer: str) -> str:
    """`18 dollars` and `51 (trucks)` as numbers."""
    match = UNITS.match(answer)
    # `18 thousand` is not 18.
    if match is None or QUALIFIERS.intersection(_words(match["noun"] or match["words"])):
        return answer
    return match["number"]


def claims(answer: str) -> frozenset[str]:
    """What an answer says besides its value: `\neq`, `\approx`, `thousand`, `or anything`."""
    found = {match[0].strip() for match in CLAIM.finditer(answer)}
    trailing = TRAILING_TEXT.search(answer)
    if trailing:
        found |= QUALIFIERS.intersection(_words(trailing[1]))
    return frozenset(found)


def _words(text: str) -> list[str]:
    return WORD.findall(text.lower())


def labelled(answer: str) -> tuple[str | None, str]:
    """(choice letter or None, the rest) of `A. 12`, `(C) 12`, `C`, `12`."""
    alone = LETTER.match(answer)
    if alone:
        return alone[1], ""
    match = LABEL.match(answer)
    if match is None or SECOND_LABEL.search(match[3]):  # `(A) or (B)` is no choice
        return None, answer
    return match[1] or match[2], match[3].strip()


def plain_text(answer: str) -> str:
    answer = unicodedata.normalize("NFKC", answer)
    answer = re.sub(rf"{WRAPPERS}\s*\{{([^{{}}]*)\}}", r"\1", answer)
    answer = re.sub(r"\\(?=[%$&# _])|\\[,;:!]|\$|\*\*", "", answer)
    return " ".join(answer.casefold().split()).strip(" .")


def answer_of(text: str) -> str | None:
    """The answer that a text gives: its box, else what it states last."""
    inside = boxed(text)
    return stated(text) if inside is None else inside


def make_math() -> Judge:
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify
    from sympy import Rational, UnevaluatedExpr

    config = NormalizationConfig(
        basic_latex=True,
        units=True,
        malformed_operators=False,  # its `\sqrt12` is sqrt(1) 2; _brace_arguments is exact
        nits=False,
        boxed="all",
        equations=False,
    )
    plain = {UnevaluatedExpr(Rational(1, 100)): Rational(1, 100)}
    in_latex = LatexExtractionConfig(boxed_match_priority=0, normalization_config=config)

    anywhere = [in_latex, ExprExtractionConfig()]

    def read(answer: str) -> list:
        # The whole answer or nothing: else math-verify takes any part (of `\geq 4` the 4).
        return parse(
            rf"\boxed{{{answer}}}",
            extraction_config=[in_latex],
            extraction_mode="first_match",
            parsing_timeout=0,
        )

    read_gold = lru_cache(maxsize=1024)(read)  # G + N texts of a step share one; 1-70 ms each

    def equal(gold: str, prediction: list) -> bool:
        if "%" not in gold:  # math-verify takes 4 % for 4 wherever one side has a percent sign
            prediction = [p if isinstance(p, str) else p.xreplace(plain) for p in prediction]
        return verify(read_gold(gold), prediction, timeout_seconds=0)

    def same(gold: str, answer: str) -> bool:
        if claims(gold) != claims(answer) or not balanced(answer):
            return False
        bases = BASE.findall(gold), BASE.findall(answer)
        if all(bases) and bases[0] != bases[1]:  # to math-verify 40_9 and 40_5 are 40
            return False
        prediction = read_gold(answer) if answer == gold else read(answer)
        return equal(gold, prediction) or gold.replace(" ", "") == answer.replace(" ", "")

    def judge(gold: str, text: str) -> bool:
        gold = bare(gold)
        if not meaningful(gold):
            return False
        gold_label, gold_rest = labelled(gold)
        inside = boxed(text)
        answer = stated(text) if inside is None else inside
        # A box or a stated answer settles it; only prose without either is searched.
        if answer is not None:
            answer = bare(answer)
            label, rest = labelled(answer)
            if not gold_rest or not rest:  # a letter alone, on one side at least
                right = gold_label == label if gold_label and label else same(gold, answer)
            else:
                right = (not gold_label or not label or gold_label == label) and same(
                    without_unit(gold_rest), without_unit(rest)
                )
            if right or inside is not None or STATED.search(last_line(text)):
                return right
        if claims(respell(last_line(text))) != claims(gold):
            return False
        # The last resort: the last formula or number of the text.
        found = parse(respell(text), extraction_config=anywhere, parsing_timeout=0)
        return equal(without_unit(gold_rest or gold), found)

    return judge


NUMBER = re.compile(
    r"^(?:\\?\$)?\s*(?P<sign>[+-]?)\s*(?:\\?\$)?\s*(?:"
    r"(?P<whole>\d{1,3}(?:(?:,|\{,\})\d{3})+|\d+)?(?P<decimals>\.\d+)?(?:[eE](?P<e>[+-]?\d{1,3}))?"
    r"(?:\s*(?:\\times|\\cdot|\*|x)\s*10\s*\^\s*\{?(?P<ten>-?\d{1,3})\}?)?"
    r"|(?P<mixed>\d+\s*)?\\[dtc]?frac\{\s*(?P<top>-?\d+)\s*\}\{\s*(?P<bottom>\d+)\s*\}"
    r"|(?P<over>\d+)\s*/\s*(?P<under>\d+)"
    r")\s*(?P<percent>\\?%|\s*percent\b)?\s*(?:\^\{?\\circ\s*\}?)?\s*(?:\\?\$)?\.?$"
)


def number(answer: str) -> Fraction | None:
    """An answer as an exact rational; None where it is no number."""
    answer = bare(answer)
    if claims(answer):
        return None
    answer = without_unit(labelled(answer)[1])
    answer = TRAILING_TEXT.sub(lambda match: match[0][0], answer).strip()
    match = NUMBER.match(answer)
    if match is None or not re.search(r"\d", answer):
        return None
    if match["under"] or match["bottom"]:
        below = int(match["under"] or match["bottom"])
        # \frac{1}{0} is no number, and no crash of a worker.
        if below == 0:
            return None
        value = Fraction(int(match["over"] or match["top"]), below) + int(match["mixed"] or 0)
    else:
        whole = re.sub(r"[,{}]", "", match["whole"] or "0")
        value = Fraction(whole + (match["decimals"] or ""))
        value *= Fraction(10) ** (int(match["e"] or 0) + int(match["ten"] or 0))
    return value * (-1 if match["sign"] == "-" else 1) / (100 if match["percent"] else 1)


def make_number() -> Judge:
    def judge(gold: str, text: str) -> bool:
        value = number(gold)
        answer = answer_of(text)
        # Two texts that are no numbers are not equal.
        return value is not None and number(answer or last_line(text)) == value

    return judge


def make_text() -> Judge:
    def judge(gold: str, text: str) -> bool:
        words = plain_text(gold)
        return words != "" and plain_text(answer_of(text) or last_line(text)) == words

    return judge


def make_letter() -> Judge:
    def judge(gold: str, text: str) -> bool:
        letter = labelled(bare(gold))[0]
        answer = answer_of(text) or last_line(text)
        return letter is not None and labelled(bare(answer))[0] == letter

    return judge


def make_custom(target: str, path: list[str]) -> Judge:
    """The user's function. ValueError, in words, for one that cannot be used.

    `path` (what the parent can import, and the working directory) is searched last: a file there
    named like a module of Python or of an installed package does not shadow it.
    """
    sys.path += [entry for entry in path if entry and entry not in sys.path]
    module, _, attribute = target.partition(":")
    try:
        function = importlib.import_module(module)
    # A module that calls sys.exit would end the worker without a word.
    except BaseException as error:
        raise ValueError(f"cannot import {module}: {_say(error)}") from error
    for part in attribute.split("."):
        if not hasattr(function, part):
            raise ValueError(f"{module} has no {attribute}")
        function = getattr(function, part)
    if not callable(function):
        raise ValueError(f"it is not callable but of type {type(function).__name__}")
    if problem := _cannot_bind(function):
        raise ValueError(problem)
    return function


def _cannot_bind(function: Callable[..., object]) -> str | None:
    import inspect  # a tenth of a worker's start, and of custom checkers alone

    try:
        signature = inspect.signature(function)
    except ValueError:  # no signature: a builtin; it is taken
        return None
    try:
        signature.bind("gold", "text")
    except TypeError:
        return f"its signature is {signature}, which cannot take two texts"
    return None


def _say(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def outcome_of(judge: Judge, gold: str, text: str, *, custom: bool) -> str | tuple[str, str]:
    """Judge one text; the result is what pool.py calls an Outcome."""
    try:
        verdict = judge(gold, text)
    except BaseException as error:
        # sympy raises on text that is no formula, and such an answer is wrong; a user's function
        # that raises has a fault, which is told.
        return ("raised", _say(error)) if custom else "wrong"
    if not isinstance(verdict, bool):
        return "returned", f"{verdict!r:.100} of type {type(verdict).__name__}"
    return "right" if verdict else "wrong"


MAKERS = {
    "math": make_math,
    "number": make_number,
    "text": make_text,
    "letter": make_letter,
}


def serve(pipe: Connection, settings: dict) -> None:
    """Judge jobs from the pipe until it ends, that is, until the parent is gone."""
    for signum in (signal.SIGINT, signal.SIGTERM):  # sent to the whole group; the parent decides
        signal.signal(signum, signal.SIG_IGN)
    # The default action of an alarm ends the process even inside a C call: for a worker whose
    # parent was killed while it was busy. SIGPROF rings by processor time.
    timer, alarm = signal.ITIMER_PROF, signal.SIGPROF
    if settings["by_clock"]:
        timer, alarm = signal.ITIMER_REAL, signal.SIGALRM
    signal.signal(alarm, signal.SIG_DFL)
    custom = settings["name"] == "custom"
    if not custom:
        box_reader()  # where it is missing the worker must end, not call all answers wrong
    try:
        judge = (
            make_custom(settings["target"], settings["path"])
            if custom
            else (MAKERS[settings["name"]]())
        )
    except ValueError as error:
        pipe.send(("unusable", str(error)))
        return
    pipe.send("up")
    with suppress(EOFError, OSError):
        while True:
            gold, text = pipe.recv()
            # Its own alarm, a second behind the parent's deadline (pool.ORPHAN_S).
            signal.setitimer(timer, settings["limit_s"])
            outcome = outcome_of(judge, gold, text, custom=custom)
            signal.setitimer(timer, 0.0)
            pipe.send(outcome)


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])), json.loads(sys.argv[2]))
