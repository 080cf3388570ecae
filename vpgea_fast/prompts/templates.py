"""Templates: the four of the configuration with their fields, and the chat template that a model
brings."""

from __future__ import annotations

import re
import signal
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from vpgea_fast.config import ConfigError, PromptConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FIELD = re.compile(r"\{(\w+)\}")
OWN = ("question", "answer")
"""Fields that every run has."""
UNKNOWN = re.compile(r"(?<![\w\\{}^])\{([a-z]\w{2,})\}")
"""What looks like a field; a brace behind a word, a backslash, a brace or ^ is LaTeX's."""
Values = Mapping[str, str]
"""Of the fields that an objective gives to a prompt, beside question and answer."""
Fields = Mapping[str, Callable[[str], str]]
"""Field -> question id -> its value where no path is drawn: in an evaluation, and in a first look
at the lengths of prompts."""
NOTHING: Values = MappingProxyType({})
RING_AGAIN = 0.1
"""Jinja takes an error while it folds constants for a reason to compute them later."""


def read_names(template: str) -> set[str]:
    """Find the variables that a template reads from outside; of one that is no Jinja every word, as
    its own error comes when it renders."""
    from jinja2 import TemplateError, nodes
    from jinja2.sandbox import SandboxedEnvironment

    # The syntax tree alone: jinja2.meta would compute constants, and `9 ** 9 ** 9` has no end.
    try:
        tree = SandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"]).parse(template)
    except (TemplateError, RecursionError):
        return set(re.findall(r"\w+", template))
    # Loop variables are the template's own, whatever reads them.
    names = list(tree.find_all(nodes.Name))
    holders = [nodes.Tuple([loop.target], "store") for loop in tree.find_all(nodes.For)]
    looped = {name.name for holder in holders for name in holder.find_all(nodes.Name)}
    return {name.name for name in names if name.ctx == "load"} - looped


def model_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """Name the model directory or Hub name that a tokenizer comes from, for an error."""
    # transformers keeps what from_pretrained was called with; a tokenizer made in memory has "".
    return tokenizer.name_or_path or "the model"


def chat_template_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the text of the chat template that a tokenizer would render with.

    ConfigError: it has none, several of which none is the default, or something that is no text.
    """
    name = model_of(tokenizer)
    if not tokenizer.chat_template:
        raise ConfigError(
            f"the tokenizer of {name} has no chat template; use an instruction-tuned model, or "
            "save a chat_template.jinja beside its weights"
        )
    try:
        template = tokenizer.get_chat_template()
    except Exception as error:  # of several templates none is called default, or they are no dict
        raise ConfigError(f"the chat template of {name} cannot be used: {error}") from error
    if not isinstance(template, str):
        raise ConfigError(
            f"the chat template of {name} is {template!r}; expected the text of a Jinja template; "
            "repair tokenizer_config.json"
        )
    return template


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError after `seconds`, in the main thread alone. An older timer goes on."""

    def ring(*_: Any) -> None:
        raise TimeoutError(f"no end after {seconds:g} s")

    # Python hears signals in the main thread alone; elsewhere there is no limit.
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGALRM, ring)
    # RING_AGAIN: the alarm repeats until an error gets through.
    left, interval = signal.setitimer(signal.ITIMER_REAL, seconds, RING_AGAIN)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
        # With what it had left at the start, so it rings later by the time spent here.
        if left:
            signal.setitimer(signal.ITIMER_REAL, left, interval)


def fill(template: str, **fields: str) -> str:
    """`template` with {question}, {answer} and the other fields replaced, in one pass: what is put
    in stays itself.

    Every other brace is itself. A KeyError where question or answer is not given.

    >>> fill("{question} {{answer}} {x}", question="{answer}?", answer="4")
    '{answer}? {4} {x}'
    """

    def value(match: re.Match[str]) -> str:
        return fields[match[1]] if match[1] in (*OWN, *fields) else match[0]

    return FIELD.sub(value, template)


def check_templates(cfg: PromptConfig, fields: Collection[str] = ()) -> None:
    """Refuse a template with a field that it must not have, or without one that it must.

    fields  names that the objective gives to each path's prompt
    """
    leak = "has the field {}, which would show the answer to the student; leave it out"
    rules = [
        *(
            (name, template, field, False, leak.format(field))
            for name, template in (("student", cfg.student), ("answer_cue", cfg.answer_cue))
            for field in ("{answer}", "{solution}")
        ),
        ("student", cfg.student, "{question}", True, "lacks the field {question}"),
        ("answer_target", cfg.answer_target, "{answer}", True, "lacks the field {answer}"),
    ]
    if cfg.teacher_role == "user":  # in a system turn the teacher's words may leave it to the user
        rules.append(("teacher", cfg.teacher, "{question}", True, "lacks the field {question}"))
    for name, template, field, required, complaint in rules:
        if (field in template) != required:
            raise ConfigError(f"prompt.{name} {complaint}; got {template!r}")
    _check_fields(cfg, fields)
    # A thought would end where it begins.
    if cfg.think_open == cfg.think_close:
        raise ConfigError(
            f"prompt.think_close: got {cfg.think_close!r}, which think_open is too; expected the "
            "tag that ends a thought"
        )


def _check_fields(cfg: PromptConfig, fields: Collection[str]) -> None:
    """Refuse a field that no prompt shows, and a name in braces that nobody fills."""
    for name in fields:
        if f"{{{name}}}" not in cfg.student + cfg.teacher:
            raise ConfigError(
                f"prompt.student lacks the field {{{name}}}, which the objective gives to every "
                "path, and so does prompt.teacher; write it into one of them"
            )
    templates = {
        "student": (cfg.student, fields),
        "teacher": (cfg.teacher, (*fields, "solution")),
        "answer_cue": (cfg.answer_cue, ()),
        "answer_target": (cfg.answer_target, ()),
    }
    for key, (template, given) in templates.items():
        # The model would read the braces and the name.
        for name in UNKNOWN.findall(template):
            if name not in (*OWN, *given):
                known = ", ".join(f"{{{word}}}" for word in (*OWN, *given))
                raise ConfigError(
                    f"prompt.{key}: nothing fills {{{name}}}; expected {known}. An objective gives "
                    f"more (Draws.fields); for the braces themselves write {{ {name} }}"
                )


def difference(text: str, said: str, name: str) -> str:
    """Say where the ids of a text say another one, for an error."""
    place = next(
        (i for i, (a, b) in enumerate(zip(text, said, strict=False)) if a != b),
        min(len(text), len(said)),
    )
    return (
        f"question {name}: the tokenizer does not keep the text: at character {place} "
        f"{around(text, place)!r} becomes {around(said, place)!r}; use a tokenizer.json that can "
        "be decoded without a loss, or take such characters out of data and prompt templates"
    )


def around(text: str, place: int) -> str:
    """The text near a place in it."""
    return text[max(0, place - 20) : place + 20]
