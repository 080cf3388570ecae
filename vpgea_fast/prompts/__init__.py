"""The two views of a question as token ids: the student's prompt and the teacher's.

    student  S(x)      chat(user: student template)                        + think prefix
    teacher  T(x, y*)  chat(user: teacher template)                        + think prefix, or
                       chat(system: teacher template, user: student template) + think prefix
    scoring            S(x) + z + cue + target, where the target spells y*

The student view is made from the question's text alone: no function on its way is given the answer.
Both views end with the same think prefix, so the ids of a thought z can stand behind either. Text
is tokenised once, here; what a model sampled is never decoded and tokenised again. What the ids say
is the text, or there is no prompt: all that is tokenised is decoded again and compared.
"""

from __future__ import annotations

import inspect
import math
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

import torch

from vpgea_fast.config import ConfigError, PromptConfig
from vpgea_fast.prompts.templates import (
    NOTHING,
    Fields,
    Values,
    around,
    chat_template_of,
    check_templates,
    difference,
    fill,
    model_of,
    read_names,
    time_limit,
)
from vpgea_fast.spans import Tag
from vpgea_fast.types import PromptedQuestion, Question

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase

__all__ = ["Prompter", "eos_ids", "fill", "length_report"]

LONE_SURROGATE = re.compile("[\ud800-\udfff]")
TAG = re.compile(r"<[^<>\s]{1,64}>|\[/?[A-Z_]{2,32}\]")
"""What a chat template spells as a tag; one that is a single token acts as one, added or not."""
SWITCH_WORDS = {"yes", "no", "on", "off", "y", "n"}
"""Text in YAML 1.2, and text is true in Jinja."""
RENDER_SECONDS = 10.0
RENDER_LIMIT = 1 << 20
"""Characters that a chat template may put around the turns."""


class Prompter:
    """Renders questions through a tokenizer's chat template.

    A thought ends with the one token of `think_close_ids`; where the tokenizer spells the closing
    tag with several, `tag` tells its end. A ConfigError names what is missing (a chat template that
    renders, tokens for the think tags, a field of a template) or wrong: a switch that the template
    never reads, a thought that it closes itself.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        cfg: PromptConfig,
        fields: Fields = MappingProxyType({}),
    ) -> None:
        check_templates(cfg, fields)
        self._tokenizer, self._cfg, self._fields = tokenizer, cfg, fields
        self._template = chat_template_of(tokenizer)
        self._owner = f"the chat template of {model_of(tokenizer)}"
        # Before any rendering: a switch that is never read changes nothing, and nothing shows it.
        self._check_kwargs()
        self.think_open_ids = self._tag_ids("think_open", cfg.think_open)
        self.think_close_ids = self._tag_ids("think_close", cfg.think_close)
        several = len(self.think_close_ids) > 1
        self.tag = Tag(cfg.think_close, self.think_close_ids, self._text) if several else None
        # What the template puts behind a user turn, learnt from the probe below: a later
        # turn may be so short that it occurs in it.
        self._tail: str | None = None
        # A template that cannot render ends here.
        probe = self.student_text("What is 1 + 1?", dict.fromkeys(fields, "1"))
        self._normalizer = getattr(tokenizer.backend_tokenizer, "normalizer", None)
        steering = self._steering_tokens(self._template + probe)
        # Some tokenizers find their tokens after normalising, some before: both forms count.
        both = {*steering, *map(self._normalised, steering)}
        longest_first = sorted(both, key=len, reverse=True)
        self._steers = re.compile("|".join(re.escape(token) for token in longest_first))

    @property
    def closing(self) -> dict[str, Any]:
        """What of `Sampling` says where a thought ends."""
        return {"think_close_id": -1 if self.tag else self.think_close_ids[0], "tag": self.tag}

    def asking(self, student: str | None) -> Prompter:
        """The same with another template of the student's prompt; itself for None."""
        if student is None:
            return self
        return Prompter(self._tokenizer, replace(self._cfg, student=student), self._fields)

    def student_text(self, question_text: str, values: Values = NOTHING) -> str:
        """The student view as text; what the model sees are `student_ids`."""
        return self._chat({"role": "user", "content": self._student_turn(question_text, values)})

    def teacher_text(self, question: Question, values: Values = NOTHING) -> str:
        """The teacher view as text."""
        known = {"question": question.text, "answer": question.answer}
        if "{solution}" in self._cfg.teacher:
            known["solution"] = self._solution(question)
        words = fill(self._cfg.teacher, **known, **values)
        # As a user turn the template holds the question itself; as a system turn it goes before it.
        if self._cfg.teacher_role == "user":
            return self._chat({"role": "user", "content": words})
        return self._chat(
            {"role": "system", "content": words},
            {"role": "user", "content": self._student_turn(question.text, values)},
        )

    def _solution(self, question: Question) -> str:
        """The hint of a whole solution. ConfigError where there is none: an empty hint is none."""
        if not question.solution:
            where = question.place or f"question {question.id!r}"
            raise ConfigError(
                f"{where}: got no solution under data.solution_key, which prompt.teacher shows; "
                "give one, or take the row out"
            )
        return question.solution

    def shown(self, ids: torch.Tensor) -> str:
        """Decode ids, special tokens included, to be looked at."""
        return self._text(ids.tolist())

    def has_special(self, *texts: str) -> bool:
        """Whether data spells a token that steers a chat: tokenised, it would act as one.

        These are the special tokens, the think tags, and every token that the chat template spells.
        """
        return any(self._steers.search(form) for t in texts for form in {t, self._normalised(t)})

    def student_ids(
        self, question_texts: Sequence[str], ids: Sequence[str] | None = None
    ) -> list[torch.Tensor]:
        """The student view alone, for evaluation: no teacher prompt is ever made. `ids` of the
        questions, on which the values of an objective's fields may depend; else their texts."""
        names = [repr(text[:80]) for text in question_texts]
        return self._student_ids(question_texts, names, self._values(ids or question_texts))

    def prompt(
        self, questions: Sequence[Question], values: Sequence[Values] | None = None
    ) -> list[PromptedQuestion]:
        """Tokenise both views of every question, the cue and the target, each by itself.

        values  of the objective's fields, for each question; None: those of an evaluation

        Tokenising cue and target apart is canonical for the default templates: byte-level BPEs of
        the Qwen2 and Llama 3 kind always break between `\\boxed` and `{`. A ConfigError names the
        first question whose ids do not say its text.
        """
        cfg, names = self._cfg, [repr(q.id) for q in questions]
        fields = [{"question": q.text, "answer": q.answer} for q in questions]
        cues = [fill(cfg.answer_cue, question=q.text) for q in questions]
        # A column at a time: a fast tokenizer takes a list in parallel, a call per text not.
        values = self._values([q.id for q in questions]) if values is None else values
        student = self._student_ids([q.text for q in questions], names, values)
        asked = zip(questions, values, strict=True)
        teacher = self._encode([self.teacher_text(q, v) for q, v in asked], names)
        cue = self._behind_thought([""] * len(cues), cues, names)
        # From the plainest spelling (data/answers.py): U is the likelihood of one spelling.
        targets = [fill(cfg.answer_target, **f) for f in fields]
        target = self._behind_thought(cues, targets, names)
        variants = [
            tuple(
                self._behind_thought(
                    [cue] * len(q.variants),
                    [fill(cfg.answer_target, question=q.text, answer=v) for v in q.variants],
                    [name] * len(q.variants),
                )
            )
            for q, cue, name in zip(questions, cues, names, strict=True)
        ]
        return [
            PromptedQuestion(
                question=question,
                student_ids=student[i],
                teacher_ids=teacher[i],
                close_ids=torch.tensor(self.think_close_ids),
                cue_ids=cue[i],
                target_ids=target[i],
                variant_ids=variants[i],
                fields=values[i],
            )
            for i, question in enumerate(questions)
        ]

    def responses(
        self, questions: Sequence[PromptedQuestion]
    ) -> list[list[tuple[torch.Tensor, torch.Tensor]]]:
        """Tokenise the given responses of each question: thought, closed, and the answer behind it.

        A response without an end of its thought is all thought: cue and target follow it. A
        ConfigError names a response that spells another special token.
        """
        close, end = self._cfg.think_close, self._tokenizer.eos_token_id
        flat = [(q, *self._cut(text)) for q in questions for text in q.question.responses]
        for q, thought, _, answer in flat:
            if self.has_special(thought, answer):
                raise ConfigError(
                    f"question {q.question.id!r}: its response spells a special token of this "
                    f"model beside one {close!r}: {(thought + answer)[:80]!r}; take it out of the "
                    "text, or the row out of the data"
                )
        names, none = [repr(q.question.id) for q, *_ in flat], [""] * len(flat)
        thoughts = self._behind_thought(none, [thought for _, thought, *_ in flat], names)
        answers = self._behind_thought(none, [answer for *_, answer in flat], names)
        # Trained too, where the tokenizer names one: a policy without an end never stops.
        tail = torch.tensor([end] if isinstance(end, int) else [], dtype=torch.long)
        closing, made = torch.tensor(self.think_close_ids), []
        for (q, _, closes, _), z_ids, own in zip(flat, thoughts, answers, strict=True):
            spelled = [own] if closes else [q.cue_ids, q.target_ids]
            made.append((torch.cat([z_ids, closing]), torch.cat([*spelled, tail])))
        rest = iter(made)
        return [[next(rest) for _ in q.question.responses] for q in questions]

    def _cut(self, response: str) -> tuple[str, str, str]:
        """Thought, the tag that closes it ("": none), and what follows; without the opening."""
        cfg = self._cfg
        opening = next(
            (o for o in (cfg.think_prefix, cfg.think_open) if response.startswith(o)), ""
        )
        return response.removeprefix(opening).partition(cfg.think_close)

    def prompt_within(
        self, questions: Sequence[Question], *, limit: int, policy: Literal["drop", "error"]
    ) -> tuple[list[PromptedQuestion], dict[str, int]]:
        """`prompt`, without the questions whose longer view has more than `limit` tokens, and
        without those that spell a special token.

        Returns the rest and how many were dropped for what; with policy "error" the first such
        question is a ConfigError instead. A prompt is never cut.
        """
        # Before any id is made: of such a question `prompt` could not tell data from a turn's end.
        plain = [
            q for q in questions if not self.has_special(q.text, q.answer, q.solution, *q.variants)
        ]
        spelled = len(questions) - len(plain)
        if spelled and (policy == "error" or not plain):
            first = next(q for q in questions if q not in set(plain))
            raise ConfigError(
                f"{spelled} of {len(questions)} questions spell a special token of this model, the "
                f"first is {first.id!r}; take them out (data.overlong: drop leaves them out)"
            )
        prompted = self.prompt(plain)
        # Both views or none: a question with one view gives no advantage.
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

    def _values(self, ids: Sequence[str]) -> list[dict[str, str]]:
        return [{name: value(id_) for name, value in self._fields.items()} for id_ in ids]

    def _student_ids(
        self, texts: Sequence[str], names: Sequence[str], values: Sequence[Values]
    ) -> list[torch.Tensor]:
        for text, name, own in zip(texts, names, values, strict=True):
            if self.has_special(text, *own.values()):
                what = f"{text[:200]!r}" + (f" with {dict(own)}" if own else "")
                raise ConfigError(
                    f"question {name} spells a special token of this model: {what}; as a "
                    "prompt it would steer the chat, so take the question out or rewrite it"
                )
        asked = zip(texts, values, strict=True)
        return self._encode([self.student_text(text, own) for text, own in asked], names)

    def _student_turn(self, question_text: str, values: Values) -> str:
        return fill(self._cfg.student, question=question_text, **values)

    def _chat(self, *messages: dict[str, str]) -> str:
        roles = " + ".join(message["role"] for message in messages)
        # Checked against the template's own names, so none is ignored.
        switches: dict[str, Any] = self._cfg.chat_template_kwargs
        try:
            # A template is a program of the model's maker: it may loop for ever.
            with time_limit(RENDER_SECONDS):
                text = self._tokenizer.apply_chat_template(
                    list(messages),
                    tokenize=False,
                    add_generation_prompt=True,
                    **switches,
                )
        except Exception as error:  # a template is a program: it may raise anything
            said = str(error) or type(error).__name__
            raise ConfigError(
                f"{self._owner} refuses the turns {roles}: {said}; "
                + ("set prompt.teacher_role to user, or " if len(messages) > 1 else "")
                + "repair the template (chat_template.jinja or tokenizer_config.json there)"
            ) from error
        text = str(text)
        # 4 times each turn: a template may repeat a turn, or escape its characters.
        if len(text) > RENDER_LIMIT + 4 * sum(len(message["content"]) for message in messages):
            raise ConfigError(
                f"{self._owner} made {len(text)} characters of the turns {roles}; expected at "
                f"most {RENDER_LIMIT} around them; repair the template"
            )
        for message in messages:
            # Templates trim turns, drop a system turn, or cut thoughts out of them.
            if message["content"].strip() not in text:
                raise ConfigError(
                    f"{self._owner} loses or changes the {message['role']} turn: "
                    f"{message['content']!r} became {text!r:.200}; set prompt.teacher_role to "
                    "user, or repair the template"
                )
        return self._open_thought(text, messages[-1]["content"].strip())

    def _open_thought(self, text: str, last_turn: str) -> str:
        """End `text` with the think prefix, once: some chat templates end with the tag already.

        Only the tags behind the last turn count. A thought that the template has closed is not
        opened a second time.
        """
        cfg = self._cfg
        prefix, opening, closing = cfg.think_prefix, cfg.think_open, cfg.think_close
        if self._tail is not None and text.endswith(self._tail):  # a short turn may stand in it
            tail = self._tail
        else:
            # The question itself may spell a think tag; only what follows it is the template's.
            tail = text[text.rindex(last_turn) + len(last_turn) :]
        if self._tail is None:  # the first text of all is that of a known turn
            self._tail = tail
        # rfind: the last tag of each kind decides whether the thought is open.
        opened, closed = tail.rfind(opening), tail.rfind(closing)
        if closed > opened:
            raise ConfigError(
                f"{self._owner} ends with a thought that is closed: {tail!r}, so none can "
                "follow; if it has a switch, turn thinking on (prompt.chat_template_kwargs: "
                "{enable_thinking: true}), else repair the template"
            )
        if text.endswith(prefix):
            return text
        words = tail[opened + len(opening) :]
        # The tag with or without its line break: the prefix says how the thought begins.
        if opened >= 0 and prefix.startswith(opening) and not words.strip():
            return text[: len(text) - len(opening) - len(words)] + prefix
        if opened >= 0 and opening in prefix:
            raise ConfigError(
                f"{self._owner} opens a thought and begins it: {tail!r}; a second {opening!r} "
                "would follow: set prompt.think_prefix to what the template ends with, or repair it"
            )
        return text + prefix

    def _encode(self, texts: Sequence[str], names: Sequence[str]) -> list[torch.Tensor]:
        """Ids of each text as it is: the chat template wrote the BOS, none is added to it."""
        rows = self._ids(texts, names)
        self._require_said(texts, rows, names)
        return rows

    def _behind_thought(
        self, before: Sequence[str], texts: Sequence[str], names: Sequence[str]
    ) -> list[torch.Tensor]:
        """Ids of each text by itself, as it stands behind a thought's end: not as a text begins,
        where SentencePiece puts a space. Checked behind the end tag and `before`."""
        tag = self._cfg.think_close
        heads = self._ids([tag + text for text in before], names)
        rows = self._ids([tag + text for text in texts], names)
        # A tag of several tokens may end within one that begins the text: that by itself, then.
        ends, alone = (
            torch.tensor(self.think_close_ids),
            self._ids(texts, names) if self.tag else [],
        )
        rows = [
            row[len(ends) :]
            if self.tag is None or torch.equal(row[: len(ends)], ends)
            else alone[i]
            for i, row in enumerate(rows)
        ]
        joined = [torch.cat([head, row]) for head, row in zip(heads, rows, strict=True)]
        in_place = [tag + a + b for a, b in zip(before, texts, strict=True)]
        self._require_said(in_place, joined, names)
        return rows

    def _require_said(
        self, texts: Sequence[str], rows: Sequence[torch.Tensor], names: Sequence[str]
    ) -> None:
        """Raise a ConfigError for the first text that its ids do not say, Unicode's composed form
        aside (NFC, the normaliser of Qwen2), which means the same. A tenth of the time of
        tokenising."""
        # Lossy tokenizers exist: lower-casing ones, and those that drop what their vocabulary
        # lacks.
        for text, said, name in zip(texts, self._decode(rows), names, strict=True):
            if said != text and said != unicodedata.normalize("NFC", text):
                raise ConfigError(difference(text, said, name))

    def _ids(self, texts: Sequence[str], names: Sequence[str]) -> list[torch.Tensor]:
        for text, name in zip(texts, names, strict=True):
            if (place := LONE_SURROGATE.search(text)) is not None:
                raise ConfigError(
                    f"question {name}: half a character (a lone surrogate) at {place.start()}: "
                    f"{around(text, place.start())!r}; expected Unicode text, repair the row"
                )
        ids = self._tokenizer(list(texts), add_special_tokens=False)["input_ids"] if texts else []
        return [torch.tensor(row, dtype=torch.long) for row in ids]

    def _decode(self, rows: Sequence[torch.Tensor]) -> list[str]:
        return [self._text(row) for row in rows]

    def _text(self, ids: torch.Tensor | Sequence[int]) -> str:
        """All that ids say, special tokens too."""
        # A tensor as it is: of a list transformers looks at every id, half again the time.
        given = ids if isinstance(ids, torch.Tensor) else list(ids)
        options: Any = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
        return str(self._tokenizer.decode(given, **options))

    def _steering_tokens(self, spelled: str) -> set[str]:
        """Special tokens, think tags, and the tokens that the template (`spelled`: its source and
        what it renders) has: R1's `<｜User｜>` is no special token in its tokenizer.json.

        Words and white space are not meant: some vocabularies add runs of spaces as tokens.
        """
        added = self._tokenizer.added_tokens_decoder.values()
        steering = {
            str(token)
            for token in added
            if token.special or (str(token) in spelled and re.search(r"[^\w\s]", str(token)))
        }
        # A tag that the vocabulary spells with several tokens steers nothing as a token.
        tags = sorted(set(TAG.findall(spelled)))
        steering |= {
            tag
            for tag, ids in zip(tags, self._ids(tags, tags), strict=True)
            if ids.numel() == 1 and ids.item() != self._tokenizer.unk_token_id
        }
        known = {*self._tokenizer.all_special_tokens, self._cfg.think_open, self._cfg.think_close}
        return {token for token in steering | known if token}

    def _normalised(self, text: str) -> str:
        # The Rust normaliser takes no lone surrogate; a text with one is refused later, by name.
        if self._normalizer is None or LONE_SURROGATE.search(text):
            return text
        return self._normalizer.normalize_str(text)

    def _check_kwargs(self) -> None:
        """Refuse names that the template never reads: they would change nothing, without a word."""
        parameters = inspect.signature(self._tokenizer.apply_chat_template).parameters
        # These reach the template from the library: a switch of that name would collide.
        reserved = {*parameters, "messages", *self._tokenizer.special_tokens_map}
        read = read_names(self._template)
        for name, value in self._cfg.chat_template_kwargs.items():
            if name in reserved:
                raise ConfigError(
                    f"prompt.chat_template_kwargs: {name!r} is given to the template already; "
                    "leave it out"
                )
            if name not in read:
                raise ConfigError(
                    f"prompt.chat_template_kwargs: {self._owner} never reads {name!r}; leave "
                    "it out, or see the template for the name"
                )

            # A template that compares with 'false' means the word; in `if x` any word is true.
            quoted = isinstance(value, str) and re.search(
                rf"['\"]{re.escape(value)}['\"]", self._template
            )
            if str(value).lower() in SWITCH_WORDS and not quoted:
                raise ConfigError(
                    f"prompt.chat_template_kwargs: {name} is the text {value!r}, which any "
                    "template takes for true; write true or false"
                )

    def _tag_ids(self, key: str, tag: str) -> tuple[int, ...]:
        [row] = self._ids([tag], [tag])
        ids = tuple(row.tolist())
        if not ids or self._tokenizer.unk_token_id in ids or self._text(ids) != tag:
            raise ConfigError(
                f"prompt.{key}: the tokenizer makes {list(ids)} of {tag!r}, which say "
                f"{self._text(ids)!r}; set it to a tag that this model can spell, or add it to the "
                "tokenizer (add_tokens) and to the embedding"
            )
        return ids


def eos_ids(
    tokenizer: PreTrainedTokenizerBase, generation_config: GenerationConfig | None = None
) -> tuple[int, ...]:
    """The tokens that end an answer, by the tokenizer and by the model's generation_config."""
    # generation_config may name more than the tokenizer: `<|endoftext|>` beside Qwen2.5's
    # `<|im_end|>`.
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
    """Count prompt tokens per view: {"student": {"min", "median", "p95", "max"}, "teacher": ...}.

    Quantiles are nearest ranks, that is, lengths that do occur.
    """
    ranks = {"min": 0.0, "median": 0.5, "p95": 0.95, "max": 1.0}
    columns = {
        "student": sorted(p.student_ids.numel() for p in prompted),
        "teacher": sorted(p.teacher_ids.numel() for p in prompted),
    }
    # Nearest rank: the ceil(q n)-th smallest.
    return {
        view: {name: row[max(0, math.ceil(q * len(row)) - 1)] for name, q in ranks.items()}
        for view, row in columns.items()
    }


def _longer_view(prompted: PromptedQuestion) -> int:
    return max(prompted.student_ids.numel(), prompted.teacher_ids.numel())
