"""Templates: the four of the configuration, and the chat template that a model brings."""

from __future__ import annotations

import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from vpgea_fast.config import ConfigError, PromptConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FIELD = re.compile(r"\{(question|answer)\}")
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
    """`template` with {question} and {answer} replaced, in one pass: what is put in stays itself.

    Every other brace is itself. A KeyError for a field that is not given.

    >>> fill("{question} {{answer}} {x}", question="{answer}?", answer="4")
    '{answer}? {4} {x}'
    """
    return FIELD.sub(lambda match: fields[match[1]], template)


def check_templates(cfg: PromptConfig) -> None:
    """Refuse a template with a field that it must not have, or without one that it must."""
    leak = "has the field {answer}, which would show the answer to the student; leave it out"
    rules = [
        ("student", cfg.student, "{answer}", False, leak),
        ("answer_cue", cfg.answer_cue, "{answer}", False, leak),
        ("student", cfg.student, "{question}", True, "lacks the field {question}"),
        ("answer_target", cfg.answer_target, "{answer}", True, "lacks the field {answer}"),
    ]
    if cfg.teacher_role == "user":  # in a system turn the teacher's words may leave it to the user
        rules.append(("teacher", cfg.teacher, "{question}", True, "lacks the field {question}"))
    for name, template, field, required, complaint in rules:
        if (field in template) != required:
            raise ConfigError(f"prompt.{name} {complaint}; got {template!r}")
    # A thought would end where it begins.
    if cfg.think_open == cfg.think_close:
        raise ConfigError(
            f"prompt.think_close: got {cfg.think_close!r}, which think_open is too; expected the "
            "tag that ends a thought"
        )
