"""The two views of a question as token ids: the student's prompt and the teacher's.

    student  S(x)      chat(user: student template)                        + think prefix
    teacher  T(x, y*)  chat(user: teacher template)                        + think prefix, or
                       chat(system: teacher template, user: student template) + think prefix
    scoring            S(x) + z + cue + target, where the target spells y*

The student view is made from the question's text alone: no function on its way is given the answer.
Both views end with the same think prefix, so the ids of a thought z can stand behind either. Text
is tokenised once, here; what a model sampled is never decoded and tokenised again.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch
from jinja2 import TemplateError

from vpgea_fast.config import ConfigError, PromptConfig
from vpgea_fast.types import PromptedQuestion, Question

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase

FIELD = re.compile(r"\{(question|answer)\}")


class Prompter:
    """Renders questions through a tokenizer's chat template.

    `think_close_id` is the one token that ends a thought. A ConfigError names what is missing: a
    chat template, think tags that are single tokens, or a field of a template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, cfg: PromptConfig) -> None:
        _check_templates(cfg)
        if not tokenizer.chat_template:
            raise ConfigError(
                f"the tokenizer of {tokenizer.name_or_path or 'the model'} has no chat template; "
                "use an instruction-tuned model, or save a chat_template.jinja beside its weights"
            )
        self._tokenizer = tokenizer
        self._cfg = cfg
        added = getattr(tokenizer, "added_tokens_decoder", {}).values()
        special = {str(token) for token in added if token.special}
        self._special = {*special, *tokenizer.all_special_tokens, cfg.think_open, cfg.think_close}
        self.think_open_id = self._tag_id("think_open", cfg.think_open)
        self.think_close_id = self._tag_id("think_close", cfg.think_close)

    def student_text(self, question_text: str) -> str:
        """The student view as text, for the eye: what the model sees are `student_ids`."""
        return self._chat({"role": "user", "content": self._student_turn(question_text)})

    def teacher_text(self, question: Question) -> str:
        """The teacher view as text, for the eye."""
        words = fill(self._cfg.teacher, question=question.text, answer=question.answer)
        if self._cfg.teacher_role == "user":
            return self._chat({"role": "user", "content": words})
        return self._chat(
            {"role": "system", "content": words},
            {"role": "user", "content": self._student_turn(question.text)},
        )

    def has_special(self, *texts: str) -> bool:
        """Whether data spells a token that steers a chat: tokenised, it would act as one."""
        return any(token in text for token in self._special for text in texts)

    def student_ids(self, question_texts: Sequence[str]) -> list[torch.Tensor]:
        """The student view alone, for evaluation: no teacher prompt is ever made."""
        for text in question_texts:
            if self.has_special(text):
                raise ConfigError(
                    f"a question spells a special token of this model: {text[:200]!r}; as a prompt "
                    "it would steer the chat, so take the question out or rewrite it"
                )
        return self._encode([self.student_text(text) for text in question_texts])

    def prompt(self, questions: Sequence[Question]) -> list[PromptedQuestion]:
        """Both views of every question, the cue and the target, each tokenised by itself.

        Tokenising cue and target apart is canonical for the default templates: byte-level BPEs of
        the Qwen2 and Llama 3 kind always break between `\\boxed` and `{`.
        """
        cfg = self._cfg
        fields = [{"question": q.text, "answer": q.answer} for q in questions]
        columns = (
            self.student_ids([q.text for q in questions]),
            self._encode([self.teacher_text(q) for q in questions]),
            self._encode([fill(cfg.answer_cue, question=q.text) for q in questions]),
            self._encode([fill(cfg.answer_target, **f) for f in fields]),
        )
        variants = [
            tuple(
                self._encode(
                    [fill(cfg.answer_target, question=q.text, answer=v) for v in q.variants]
                )
            )
            for q in questions
        ]
        rows = zip(questions, *columns, variants, strict=True)
        return [PromptedQuestion(q, *ids) for q, *ids in rows]

    def prompt_within(
        self, questions: Sequence[Question], *, limit: int, policy: Literal["drop", "error"]
    ) -> tuple[list[PromptedQuestion], dict[str, int]]:
        """`prompt`, without the questions whose longer view has more than `limit` tokens, and
        without those that spell a special token.

        Returns the rest and how many were dropped for what; with policy "error" the first such
        question is a ConfigError instead. A prompt is never cut.
        """
        plain = [q for q in questions if not self.has_special(q.text, q.answer, *q.variants)]
        spelled = len(questions) - len(plain)
        if spelled and (policy == "error" or not plain):
            first = next(q for q in questions if q not in set(plain))
            raise ConfigError(
                f"{spelled} of {len(questions)} questions spell a special token of this model, the "
                f"first is {first.id!r}; take them out (data.overlong: drop leaves them out)"
            )
        prompted = self.prompt(plain)
        kept = [p for p in prompted if _longer_view(p) <= limit]
        dropped = len(prompted) - len(kept)
        if dropped and (policy == "error" or not kept):
            longest = max(prompted, key=_longer_view)
            raise ConfigError(
                f"{dropped} of {len(prompted)} prompts are longer than {limit} tokens, the longest "
                f"(question {longest.question.id!r}) has {_longer_view(longest)}; raise "
                "data.max_prompt_tokens, or leave out long questions (data.overlong: drop)"
            )
        return kept, {f"longer than {limit} tokens": dropped, "special token in text": spelled}

    def _student_turn(self, question_text: str) -> str:
        return fill(self._cfg.student, question=question_text)

    def _chat(self, *messages: dict[str, str]) -> str:
        try:
            text = str(
                self._tokenizer.apply_chat_template(
                    list(messages), tokenize=False, add_generation_prompt=True
                )
            )
        except TemplateError as error:
            roles = " + ".join(message["role"] for message in messages)
            raise ConfigError(
                f"the chat template refuses the turns {roles}: {error}; set prompt.teacher_role to "
                "user, or repair the template"
            ) from error
        for message in messages:
            if message["content"].strip() not in text:
                raise ConfigError(
                    f"the chat template loses or changes the {message['role']} turn: "
                    f"{message['content']!r} became {text!r}; set prompt.teacher_role to user, or "
                    "repair the template"
                )
        return self._open_thought(text)

    def _open_thought(self, text: str) -> str:
        """End `text` with the think prefix, once: some chat templates end with the tag already."""
        prefix, tag = self._cfg.think_prefix, self._cfg.think_open
        head, opened, rest = text.rpartition(tag)
        if prefix.startswith(tag) and opened and not rest.strip():
            return head + prefix
        return text if text.endswith(prefix) else text + prefix

    def _encode(self, texts: Sequence[str]) -> list[torch.Tensor]:
        """Ids of each text as it is: the chat template wrote the BOS, none is added to it."""
        ids = self._tokenizer(list(texts), add_special_tokens=False)["input_ids"] if texts else []
        return [torch.tensor(row, dtype=torch.long) for row in ids]

    def _tag_id(self, key: str, tag: str) -> int:
        [ids] = self._encode([tag])
        if ids.numel() != 1 or ids.item() == self._tokenizer.unk_token_id:
            raise ConfigError(
                f"prompt.{key}: the tokenizer makes {ids.tolist()} of {tag!r}, but a thought ends "
                "where one token says so; set it to a tag that is a token of this model, or add "
                "the tag to the tokenizer (add_tokens) and to the embedding"
            )
        return int(ids.item())


def fill(template: str, **fields: str) -> str:
    """`template` with {question} and {answer} replaced, in one pass: what is put in stays itself.

    Every other brace is itself. A KeyError for a field that is not given.

    >>> fill("{question} {{answer}} {x}", question="{answer}?", answer="4")
    '{answer}? {4} {x}'
    """
    return FIELD.sub(lambda match: fields[match[1]], template)


def eos_ids(
    tokenizer: PreTrainedTokenizerBase, generation_config: GenerationConfig | None = None
) -> tuple[int, ...]:
    """The tokens that end an answer, by the tokenizer and by the model's generation_config."""
    named = generation_config.eos_token_id if generation_config else None
    tokens: list[object] = [tokenizer.eos_token_id]
    tokens += named if isinstance(named, list) else [named]
    ids = sorted({token for token in tokens if isinstance(token, int)})
    if not ids:
        raise ConfigError(
            "neither the tokenizer nor generation_config.json names an end-of-text token; set "
            "eos_token in tokenizer_config.json of the model directory"
        )
    return tuple(ids)


def length_report(prompted: Sequence[PromptedQuestion]) -> dict[str, dict[str, int]]:
    """Prompt tokens of each view: {"student": {"min", "median", "p95", "max"}, "teacher": ...}.

    Quantiles are nearest ranks, that is, lengths that do occur.
    """
    ranks = {"min": 0.0, "median": 0.5, "p95": 0.95, "max": 1.0}
    columns = {
        "student": sorted(p.student_ids.numel() for p in prompted),
        "teacher": sorted(p.teacher_ids.numel() for p in prompted),
    }
    return {
        view: {name: row[max(0, math.ceil(q * len(row)) - 1)] for name, q in ranks.items()}
        for view, row in columns.items()
    }


def _check_templates(cfg: PromptConfig) -> None:
    """The fields that each template must and must not have."""
    leak = "has the field {answer}, which would show the answer to the student; leave it out"
    rules = [
        ("student", cfg.student, "{answer}", False, leak),
        ("answer_cue", cfg.answer_cue, "{answer}", False, leak),
        ("student", cfg.student, "{question}", True, "lacks the field {question}"),
        ("answer_target", cfg.answer_target, "{answer}", True, "lacks the field {answer}"),
    ]
    if cfg.teacher_role == "user":  # in a system turn the teacher's words may leave it to the user
        rules.append(("teacher", cfg.teacher, "{question}", True, "lacks the field {question}"))
    for name, template, field, wanted, complaint in rules:
        if (field in template) != wanted:
            raise ConfigError(f"prompt.{name} {complaint}; got {template!r}")


def _longer_view(prompted: PromptedQuestion) -> int:
    return max(prompted.student_ids.numel(), prompted.teacher_ids.numel())
