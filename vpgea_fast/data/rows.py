"""A row as a question: the keys that lead into it, its choices, and its answer."""

from __future__ import annotations

import ast
import random
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from decimal import Decimal
from functools import partial
from typing import Any

from vpgea_fast.config import DataFile
from vpgea_fast.data.answers import final_answer, spelled
from vpgea_fast.data.files import DataError, Row
from vpgea_fast.types import Question

USUAL = {
    "question_key": (
        *("question", "problem", "Question", "Problem", "prompt", "query", "input", "Body"),
        "instruction",
    ),
    "answer_key": (
        *("answer", "final_answer", "Answer", "answerKey", "correct", "target", "ground_truth"),
        *("expected_answer", "gold", "reward_model.ground_truth", "Correct Answer", "solution"),
    ),
}
"""What public data sets call them, for the advice when a key is missing; none is ever guessed."""
FIELD = re.compile(r"\{([^{}]+)\}")
"""A key within a text that joins several."""
CHOICES = re.compile(r"(answer[ _]?)?(choices|options|candidates)|endings", re.IGNORECASE)
CHOICE_COLUMN = re.compile(r"[A-E]|(?i:op|opt|option|choice|ending|sol)[ _]?(?i:[a-e]|[0-5])")
"""Of C-Eval and CMMLU (A to D), MedMCQA (opa to opd), WinoGrande, PIQA and others."""
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
LABEL = re.compile(r"\s*\(?([A-Z])[).:]\s*(.*)", re.DOTALL)
PRINTED = re.compile(r"""\s*\[\s*("[^"\n]*"|'[^'\n]*')(\s*,\s*("[^"\n]*"|'[^'\n]*'))*\s*\]\s*""")
MISSING = object()
NO_CHOICES = "an answer among choices, and no choices"


def make_question(
    row: Row, keys: DataFile, *, number: int, place: str, notes: Counter[str]
) -> tuple[Question, str | None]:
    """The question of a row, and why its answer cannot be used (None: it can).

    `keys` has every key filled in. `notes` counts what the run should say once of a file. All that
    is wrong beyond the answer is a DataError.
    """
    reader = _Reader(row, place)
    text, name = reader.question(keys.question_key or ""), reader.get(keys.id_key or "")
    if keys.id_key != "id" and name is MISSING:
        notes[f"rows without {keys.id_key!r} (id_key) are called row-N"] += 1
    # An id of 0 is one; only an empty text is none.
    name = f"row-{number}" if name in (MISSING, None, "") else str(name)
    fixed: dict[str, Any] = {"file": keys.label, "place": place}
    fixed |= {"responses": reader.responses(keys.response_key)}
    fixed |= {"solution": reader.solution(keys.solution_key)}
    subject, level = reader.group(keys.subject_key), reader.group(keys.level_key)
    fixed |= {"subject": None if subject is None else str(subject), "level": level}
    question = partial(Question, id=reader.check(name, "id"), **fixed)
    choices = reader.choices(keys)
    # The letter is the answer here, so no spelling has to be found in a text.
    if choices:
        shown, answer = _with_letters(reader, choices, keys=keys, name=name, notes=notes)
        return question(text=f"{text}\n{shown}", answer=answer), None
    if keys.choices_key and keys.choices_answer not in (None, "auto"):
        # the answer names a choice, and here there is none to name
        given = reader.answer(keys.answer_key or "")
        return question(text=text, answer=given), NO_CHOICES
    if keys.choices_key:
        notes[f"rows without choices under {keys.choices_key!r}"] += 1
    # From here on the answer is free text: a number, a formula, or a solution that ends in one.
    given, others = reader.answer(keys.answer_key or ""), reader.variants(keys.variants_key)
    try:
        answer, where = final_answer(given)
    except ValueError as error:
        return question(text=text, answer=given.strip()), str(error)
    try:
        # Equal spellings once, the answer's own too: U would count the likelihood of each.
        spelled = dict.fromkeys([answer, *(final_answer(v)[0] for v in others)])
        variants = tuple(filter(None, [*spelled][1:]))
    except ValueError as error:
        return question(text=text, answer=answer), f"{error} among the variants"
    if where is not None:
        notes[f"answers: {where}"] += 1
    whole = question(text=text, answer=answer, variants=variants)
    return whole, None if answer else "empty answer"


class _Reader:
    """A row and its place, for the errors."""

    def __init__(self, row: Row, place: str) -> None:
        self.row, self.place = row, place

    def get(self, key: str) -> Any:
        """What the row holds under a key, a dotted path into it, or a list index in such a path."""
        return _lookup(self.row, key)

    def need(self, key: str, setting: str) -> Any:
        value = self.get(key)
        if value is not MISSING:
            return value
        # Advice only: a key that is guessed would train on the wrong column in silence.
        usual = [k for k in USUAL.get(setting, ()) if self.get(k) is not MISSING]
        likely = f"to {' or '.join(map(repr, usual))}" if usual else "to the right one"
        raise DataError(
            f"{self.place}: no key {key!r} among {_short(sorted(map(str, self.row)))}; "
            f"set data.{setting} (or {setting} of this file) {likely}"
        )

    def check(self, text: str, key: str) -> str:
        """Text that can be written as UTF-8: a tokenizer takes no other."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"{self.place}: half a surrogate pair ({text[error.start]!r}) at character "
                f"{error.start} under {key!r}; write the whole character, or remove it"
            ) from None
        return text

    def question(self, key: str) -> str:
        # `{Body} {Question}`: checked field by field first, so that an error names one key.
        fields = FIELD.findall(key)
        if not fields:
            return self.text(key, self.need(key, "question_key"))
        for field in fields:
            self.text(field, self.need(field, "question_key"))
        return FIELD.sub(lambda m: self.text(m[1], self.get(m[1])), key)

    def text(self, key: str, value: Any) -> str:
        if _is_chat(value):
            value = self._user_turn(key, value)
        if not isinstance(value, str) or not value.strip():
            raise DataError(
                f"{self.place}: expected the text of a question under {key!r}, got "
                f"{_short(value)}; repair the row, or set data.question_key"
            )
        return self.check(value, key)

    def _user_turn(self, key: str, messages: Sequence[Mapping[str, Any]]) -> Any:
        roles = [message.get("role") for message in messages]
        if roles != ["user"]:
            raise DataError(
                f"{self.place}: the chat under {key!r} has the turns {roles}, expected one user "
                "turn: the prompt is made from the templates of the section prompt; set "
                f"data.question_key to the one that asks, e.g. {key}.{len(roles) - 1}.content"
            )
        return messages[0].get("content")

    def answer(self, key: str) -> str:
        value = _plain(self.need(key, "answer_key"))
        if isinstance(value, str) and PRINTED.fullmatch(value):  # a list, through a CSV
            with suppress(ValueError, SyntaxError, RecursionError, MemoryError):
                value = ast.literal_eval(value.strip())
        if isinstance(value, list) and len(value) <= 1:  # OlympiadBench: ["2"]
            value = _plain(value[0]) if value else None
        return self.spelled(key, value)

    def spelled(self, key: str, value: Any) -> str:
        try:
            return self.check(spelled(value), key)
        except DataError:
            raise
        except ValueError as error:
            # Several answers may be spellings of one (variants_key) or a question with two answers.
            many = isinstance(value, list)
            remedy = "if these are spellings of one answer, give one under data.answer_key and all "
            raise DataError(
                f"{self.place}: expected an answer (text or a number) under {key!r}, got "
                f"{_short(value)}, which "
                + ("lists several" if many else str(error))
                + "; "
                + (f"{remedy}under data.variants_key" if many else "give one reference answer")
                + ", or set data.answer_key"
            ) from None

    def variants(self, key: str | None) -> list[str]:
        value = _plain(self.get(key)) if key else None
        if value is None or value is MISSING:
            return []
        if isinstance(value, (str, Mapping)) or not isinstance(value, Iterable):
            raise DataError(
                f"{self.place}: expected a list of answers under {key!r}, got {_short(value)}; "
                "repair the row, or set data.variants_key to null"
            )
        return [self.spelled(key or "", item) for item in value]

    def responses(self, key: str | None) -> tuple[str, ...]:
        """Given responses; none where the row has none, since only some objectives read them."""
        if not key:
            return ()
        # `{think}</think>{solution}`: a row that lacks one of them has no response.
        fields = FIELD.findall(key) or [key]
        values = [_plain(self.get(field)) for field in fields]
        if any(value is None or value is MISSING for value in values):
            return ()
        joined = fields != [key]
        found = values if joined or not isinstance(values[0], list) else values[0]
        for item in found:
            if not isinstance(item, str) or not item.strip():
                raise DataError(
                    f"{self.place}: expected a response under {key!r}, text or a list of texts, "
                    f"got {_short(item)}; repair the row, or set data.response_key to null"
                )
        if joined:
            texts = iter(found)
            found = [FIELD.sub(lambda _: next(texts), key)]
        return tuple(self.check(item, key) for item in found)

    def solution(self, key: str | None) -> str:
        """A worked solution; "" where the row has none, since only a teacher may be shown it."""
        value = self.get(key) if key else None
        if value is None or value is MISSING:
            return ""
        if not isinstance(value, str):
            raise DataError(
                f"{self.place}: expected a solution under {key!r}, a text, got {_short(value)}; "
                "repair the row, or set data.solution_key"
            )
        return self.check(value.strip(), key or "")

    def group(self, key: str | None) -> str | int | None:
        """A level: a number stays one; None where the row has none."""
        value = _plain(self.get(key)) if key else None
        if value in (None, MISSING, ""):
            return None
        return value if type(value) is int else self.check(str(value), key or "")

    def choices(self, keys: DataFile) -> list[tuple[str, str]]:
        """(label or "", text) of every choice; none where the row has none."""
        key = keys.choices_key
        if key is None:
            self._refuse_choices()
        if not key:
            return []
        if isinstance(key, tuple):
            value: Any = [self.need(k, "choices_key") for k in key]
        else:
            value = _plain(self.need(key, "choices_key"))
        pairs = _pairs(value)
        # One choice is no question, and beyond Z there is no letter.
        if pairs is None or len(pairs) == 1 or len(pairs) > len(LETTERS):
            raise DataError(
                f"{self.place}: expected 2 to {len(LETTERS)} choices under {key!r} (a list, "
                f"{{A: ...}}, or {{text: [...], label: [...]}}), got {_short(value)}; repair the "
                "row, or set data.choices_key"
            )
        return [(label, self.text(str(key), self.spelled(str(key), t))) for label, t in pairs]

    def _refuse_choices(self) -> None:
        """Refuse choices that nobody asked for: without them the question is another one."""
        keys = [str(key) for key, value in self.row.items() if value not in (None, "")]
        inside = [(k, v) for k, v in self.row.items() if isinstance(v, Mapping)]
        named = [str(k) for k in self.row if CHOICES.fullmatch(str(k)) and _holds(self.row[k])]
        named += [f"{k}.{i}" for k, v in inside for i in v if CHOICES.fullmatch(i) and _holds(v[i])]
        # One column called A may be anything; two or more are choices.
        columns = sorted(key for key in keys if CHOICE_COLUMN.fullmatch(key))
        wrong = sorted(key for key in keys if key.lower().startswith("incorrect answer"))
        right = next((key for key in keys if key.lower() == "correct answer"), "RIGHT")
        value = named[:1] or (columns if len(columns) > 1 else [right, *wrong] if wrong else [])
        if value:
            raise DataError(
                f"{self.place}: the row has choices under {value[-1]!r}, which the prompt would "
                "not show; set data.choices_key (or choices_key of this file) to "
                f"{value[0] if named else value!r}, or to '' to leave them out"
            )


def _with_letters(
    reader: _Reader,
    choices: Sequence[tuple[str, str]],
    keys: DataFile,
    name: str,
    notes: Counter[str],
) -> tuple[str, str]:
    """The choices as lines `A. text`, and the letter of the right one."""
    columns = keys.choices_key if isinstance(keys.choices_key, tuple) else None
    named = keys.answer_key or ""
    # Columns put the right choice first; a list holds it anywhere, and the answer names it.
    if columns and (named == columns[0] or reader.get(named) is MISSING):
        first, right, how = True, 0, f"the choice under {columns[0]!r}"
    else:
        first = False
        value = _plain(reader.need(named, "answer_key"))
        right, how = _right_choice(reader, choices, value, keys)
    order = list(range(len(choices)))
    seed = keys.choices_seed
    if seed is None and first:
        seed = 0  # else every answer would be A
    if seed is not None:
        # By id, so that neither a limit nor the order of the rows moves a letter.
        random.Random(f"{seed}/{name}").shuffle(order)
        how += f", shuffled by seed {seed}"
    notes[f"answers: a letter, of {how}"] += 1
    lines = [f"{LETTERS[i]}. {choices[old][1]}" for i, old in enumerate(order)]
    return "\n".join(lines), LETTERS[order.index(right)]


def _right_choice(
    reader: _Reader, choices: Sequence[tuple[str, str]], value: Any, keys: DataFile
) -> tuple[int, str]:
    """Which choice the answer names, and in which way."""
    text = reader.spelled(keys.answer_key or "", value).strip()
    labels = [label or LETTERS[i] for i, (label, _) in enumerate(choices)]
    # A lone letter reads as a label without its bracket.
    letter = LABEL.fullmatch(f"{text})") if len(text) == 1 else LABEL.fullmatch(text)
    bare = text if text in labels else letter[1] if letter and not letter[2].strip(") ") else None
    texts = [i for i, (_, choice) in enumerate(choices) if choice.strip() == text]
    digits = int(text) if re.fullmatch(r"\d{1,2}", text) else None
    ways = {
        "letter": [labels.index(bare)] if bare in labels else [],
        "text": texts,
        "index": [digits] if digits is not None and digits < len(choices) else [],
        "index_from_1": [digits - 1] if digits and digits <= len(choices) else [],
    }
    words = {"letter": "its label", "text": "its text", "index": "its index from 0"}
    words["index_from_1"] = "its index from 1"
    way = keys.choices_answer or "auto"
    if way == "auto":
        # A number in JSON counts from 0 (MMLU); in text it may be a choice's own words.
        tried = ("letter", "text", "index") if isinstance(value, str) else ("index",)
        if any(label for label, _ in choices):  # ARC labels its choices 1 to 4
            tried = ("letter", "text")
        hits = {w: ways[w] for w in tried if ways[w]}
        # Ways that point to one choice agree; only two different choices are a doubt.
        if len({tuple(found) for found in hits.values()}) > 1:
            several = " or ".join(words[w] for w in hits)
            raise DataError(
                f"{reader.place}: the answer {_short(value)} may be {several} among the choices; "
                f"set data.choices_answer to {' or '.join(hits)}"
            )
        way = next(iter(hits), tried[0])
    found = ways[way]
    if len(found) != 1:
        raise DataError(
            f"{reader.place}: the answer {_short(value)} names {len(found)} of the choices "
            f"{labels} ({words[way]}); expected one: set data.answer_key, or "
            "data.choices_answer (index_from_1 where the first is 1)"
        )
    return found[0], words[way]


def _holds(value: Any) -> bool:
    """Whether a value may hold choices: a text of them (MathQA: `a ) 38 , b ) 27`) too."""
    value = _plain(value)
    return isinstance(value, (str, list, Mapping)) and bool(value)


def _pairs(value: Any) -> list[tuple[str, Any]] | None:
    """(label or "", text) of choices in the shapes of MMLU, AQuA, ARC; None for another shape."""
    if value is None or value is MISSING:
        return []
    if isinstance(value, Mapping):
        # ARC and CommonsenseQA: two lists side by side.
        labels, texts = _plain(value.get("label")), _plain(value.get("text"))
        if isinstance(labels, list) and isinstance(texts, list) and len(labels) == len(texts):
            return [(str(label), text) for label, text in zip(labels, texts, strict=True)]
        return [(str(label), text) for label, text in value.items() if text is not None]
    if not isinstance(value, list):
        return None
    if value and all(isinstance(item, Mapping) and "text" in item for item in value):
        return [(str(item.get("label", "")), item["text"]) for item in value]
    # AQuA spells its labels inside the texts: `A)21`. All of them in order, or they are words.
    spelt = [LABEL.fullmatch(item) if isinstance(item, str) else None for item in value]
    if value and all(m and m[1] == LETTERS[i] for i, m in enumerate(spelt) if i < len(LETTERS)):
        return [(m[1], m[2]) for m in spelt if m]
    return [("", item) for item in value]


def _lookup(value: Any, key: str) -> Any:
    """Under the key itself, else under its longest beginning that leads on to the rest."""
    value = _plain(value)
    if isinstance(value, Mapping):
        if key in value:
            return value[key]
        # The longest beginning first: a key that holds a dot itself comes before a path.
        for cut in reversed([i for i, char in enumerate(key) if char == "."]):
            if key[:cut] in value:
                found = _lookup(value[key[:cut]], key[cut + 1 :])
                if found is not MISSING:
                    return found
    elif isinstance(value, list):
        index, _, rest = key.partition(".")
        if re.fullmatch(r"\d{1,9}", index) and int(index) < len(value):
            return _lookup(value[int(index)], rest) if rest else value[int(index)]
    return MISSING


def _is_chat(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(item, Mapping) and "role" in item for item in value)
    )


def _plain(value: Any) -> Any:
    """numpy's arrays and tuples as lists."""
    if getattr(value, "ndim", 0):
        return value.tolist()
    return list(value) if isinstance(value, tuple) else value


def _short(value: Any) -> str:
    try:
        text = str(value) if isinstance(value, Decimal) else repr(value)
        text = "nothing" if value is MISSING else text
    except RecursionError:
        text = f"a deeply nested {type(value).__name__}"
    return text if len(text) <= 200 else f"{text[:200]}..."
