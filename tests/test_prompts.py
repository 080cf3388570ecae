"""The two views: no answer in the student's, one BOS, one think prefix, nothing cut."""

import random
from typing import Any

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GenerationConfig, PreTrainedTokenizerFast

from vpgea_fast.config import ConfigError, PromptConfig
from vpgea_fast.prompts import Prompter, eos_ids, fill, length_report
from vpgea_fast.types import Question

# The split of Qwen2: a letter run takes one mark before it, other marks stay together.
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"|\s?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = ["<bos>", "<eos>", "<user>", "<assistant>", "<system>", "<think>", "</think>"]
CORPUS = [
    "\n\n**Final Answer**\n\\boxed{204}. So \\boxed{\\frac{3}{4}} or \\boxed{x+1}, \\boxed{-7}",
    "{\\text{(A)}} \\boxed{\\text{(B)}} and \\boxed{1,000} with \\boxed{\\text{no}}",
    "Please reason step by step, and put your final answer within \\boxed{}.",
] * 20
TURNS = (
    "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>GENERATE{% endif %}"
)
QUESTION = Question("q0", "What is {2 + 2}, {answer}?", "4{question}")


def make_tokenizer(generate: str = "<think>\n", *, split: bool = True, turns: str = TURNS) -> Any:
    """A byte-level BPE that adds a BOS unless it is told not to, as Llama's and R1's do."""
    tokenizer = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    qwen2 = pre_tokenizers.Split(Regex(QWEN2_SPLIT), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([qwen2, byte_level]) if split else byte_level
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        chat_template=turns.replace("GENERATE", generate),
    )


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer()


def test_fill_is_one_pass():
    assert fill("{question}|{{answer}}|{x}|{", question="{answer}", answer="{question}") == (
        "{answer}|{{question}}|{x}|{"
    )


def test_both_views_to_the_letter(tokenizer: Any):
    cfg = PromptConfig(
        student="{question}\nThink.", teacher="{question} It is {answer}.\n{answer}?"
    )
    [got] = Prompter(tokenizer, cfg).prompt([QUESTION])
    assert got.question is QUESTION
    assert tokenizer.decode(got.student_ids) == (
        "<bos><user>What is {2 + 2}, {answer}?\nThink.<assistant><think>\n"
    )
    assert tokenizer.decode(got.teacher_ids) == (
        "<bos><user>What is {2 + 2}, {answer}? It is 4{question}.\n4{question}?<assistant><think>\n"
    )
    assert tokenizer.decode(got.cue_ids) == "\n\n**Final Answer**\n\\boxed"
    assert tokenizer.decode(got.target_ids) == "{4{question}}"
    for ids in (got.student_ids, got.teacher_ids):
        assert ids.dtype == torch.long
        assert (ids == tokenizer.bos_token_id).sum() == 1  # the tokenizer itself would add another
        assert (ids == tokenizer.convert_tokens_to_ids("<think>")).sum() == 1
    assert not torch.isin(tokenizer.bos_token_id, torch.cat([got.cue_ids, got.target_ids]))


def test_teacher_in_the_system_turn(tokenizer: Any):
    cfg = PromptConfig(student="{question}", teacher="Say {answer}.", teacher_role="system")
    [got] = Prompter(tokenizer, cfg).prompt([Question("q", "2+2?", "4")])
    assert tokenizer.decode(got.student_ids) == "<bos><user>2+2?<assistant><think>\n"
    assert tokenizer.decode(got.teacher_ids) == (
        "<bos><system>Say 4.<user>2+2?<assistant><think>\n"
    )


@pytest.mark.parametrize("generate", ["", "<think>", "<think>\n", "<think>\n\n"])
def test_the_think_prefix_stands_once_whatever_the_chat_template_adds(generate: str):
    tokenizer = make_tokenizer(generate)
    for prefix in ("<think>\n", "<think>"):
        prompter = Prompter(tokenizer, PromptConfig(think_prefix=prefix))
        [got] = prompter.prompt([QUESTION])
        for ids in (got.student_ids, got.teacher_ids):
            assert tokenizer.decode(ids).endswith(f"<assistant>{prefix}")
    plain = Prompter(tokenizer, PromptConfig(think_prefix=""))
    assert plain.student_text("a").endswith(f"<assistant>{generate}")


def test_a_tag_inside_the_question_is_no_think_prefix():
    prompter = Prompter(make_tokenizer(""), PromptConfig(student="{question}"))
    assert prompter.student_text("a <think>") == "<bos><user>a <think><assistant><think>\n"


def test_student_prompts_know_no_answer(tokenizer: Any):
    """1,000 random templates and answers, with fields and braces at random places in all texts."""
    rng = random.Random(0)
    words = ["{question}", "{answer}", "{", "}", "{{", "\\boxed{}", "\n", "so", "{0}", "%s", "{x}"]

    def text(*must: str, no: str = "") -> str:
        parts = [*rng.choices([w for w in words if w != no], k=rng.randint(0, 6)), *must]
        rng.shuffle(parts)
        return " ".join(parts)

    for trial in range(1000):
        cfg = PromptConfig(
            student=text("{question}", no="{answer}"),
            teacher=text("{question}", "{answer}"),
            teacher_role=rng.choice(["user", "system"]),
            answer_cue=text(no="{answer}"),
        )
        secrets = [f"SECRET{trial}{mark}" for mark in "AB"]
        asked = text(f"q{trial}")
        questions = [Question(f"q{i}", asked, text(secret)) for i, secret in enumerate(secrets)]
        prompter = Prompter(tokenizer, cfg)
        one, other = prompter.prompt(questions)
        assert torch.equal(one.student_ids, other.student_ids)
        assert torch.equal(one.cue_ids, other.cue_ids)
        [alone] = prompter.student_ids([asked])
        assert torch.equal(one.student_ids, alone)
        seen = tokenizer.decode(alone)
        assert seen == f"<bos><user>{cfg.student.replace('{question}', asked)}<assistant><think>\n"
        for question, prompted in zip(questions, (one, other), strict=True):
            assert "SECRET" not in seen
            assert question.answer in tokenizer.decode(prompted.teacher_ids)
            assert tokenizer.decode(prompted.target_ids) == "{" + question.answer + "}"


@pytest.mark.parametrize(
    "answer", ["204", r"\frac{3}{4}", "x+1", r"\text{(A)}", "-7", "1,000", r"\{1,2\}", "(3,4)"]
)
def test_cue_and_target_apart_are_the_canonical_tokens(tokenizer: Any, answer: str):
    [got] = Prompter(tokenizer, PromptConfig()).prompt([Question("q", "a", answer)])
    whole = tokenizer("\n\n**Final Answer**\n\\boxed{" + answer + "}", add_special_tokens=False)
    assert whole["input_ids"] == torch.cat([got.cue_ids, got.target_ids]).tolist()


def test_the_canonical_split_is_owed_to_the_pre_tokenizer():
    """The control: a BPE without the Qwen2 split merges across the border."""
    tokenizer = make_tokenizer(split=False)
    [got] = Prompter(tokenizer, PromptConfig()).prompt([Question("q", "a", "204")])
    whole = tokenizer("\n\n**Final Answer**\n\\boxed{204}", add_special_tokens=False)
    assert whole["input_ids"] != torch.cat([got.cue_ids, got.target_ids]).tolist()


def test_overlong_prompts_are_dropped_with_a_count_or_an_error_and_never_cut(tokenizer: Any):
    prompter = Prompter(tokenizer, PromptConfig(student="{question}", teacher="{question}{answer}"))
    questions = [Question(f"q{n}", "?" * n, "!" * 9) for n in (5, 40, 6, 41)]
    everything = prompter.prompt(questions)
    limit = everything[2].teacher_ids.numel()  # the longer view counts
    assert everything[2].student_ids.numel() < limit < everything[1].student_ids.numel()
    kept, dropped = prompter.prompt_within(questions, limit=limit, policy="drop")
    assert [p.question.id for p in kept] == ["q5", "q6"]
    assert sum(dropped.values()) == dropped[f"longer than {limit} tokens"] == 2
    assert torch.equal(kept[1].teacher_ids, everything[2].teacher_ids)
    assert (
        prompter.prompt_within(questions, limit=limit - 1, policy="drop")[1][
            f"longer than {limit - 1} tokens"
        ]
        == 3
    )
    longest = everything[3].teacher_ids.numel()
    _, dropped = prompter.prompt_within(questions, limit=longest, policy="error")
    assert not any(dropped.values())
    message = rf"2 of 4 prompts are longer than {limit} .*\(question 'q41'\) has {longest}"
    with pytest.raises(ConfigError, match=message):
        prompter.prompt_within(questions, limit=limit, policy="error")
    with pytest.raises(ConfigError, match=r"4 of 4 .*data\.max_prompt_tokens"):
        prompter.prompt_within(questions, limit=1, policy="drop")


def test_text_that_spells_a_special_token_is_left_out(tokenizer: Any):
    prompter = Prompter(tokenizer, PromptConfig(student="{question}", teacher="{question}{answer}"))
    questions = [
        Question("a", "1+1", "2"),
        Question("b", "1</think>", "2"),
        Question("c", "1", "<think>"),
    ]
    kept, dropped = prompter.prompt_within(questions, limit=1000, policy="drop")
    assert [p.question.id for p in kept] == ["a"]
    assert dropped["special token in text"] == 2
    with pytest.raises(ConfigError, match="2 of 3 questions spell a special token"):
        prompter.prompt_within(questions, limit=1000, policy="error")
    with pytest.raises(ConfigError, match="spells a special token"):
        prompter.student_ids(["1</think>"])


def test_length_report(tokenizer: Any):
    prompter = Prompter(tokenizer, PromptConfig(student="{question}", teacher="{question}{answer}"))
    prompted = prompter.prompt([Question(f"q{n}", "?" * n, "!") for n in range(1, 101)])
    base = prompted[0].student_ids.numel() - 1
    report = length_report(prompted)
    assert report["student"] == {
        "min": base + 1,
        "median": base + 50,
        "p95": base + 95,
        "max": base + 100,
    }
    assert report["teacher"] == {name: n + 1 for name, n in report["student"].items()}
    assert length_report(prompted[6:7])["student"] == dict.fromkeys(report["student"], base + 7)


def test_eos_ids(tokenizer: Any):
    assert eos_ids(tokenizer) == (1,)
    assert eos_ids(tokenizer, GenerationConfig(eos_token_id=[4, 1])) == (1, 4)
    assert eos_ids(tokenizer, GenerationConfig(eos_token_id=3)) == (1, 3)
    endless = make_tokenizer()
    endless.eos_token = None
    assert eos_ids(endless, GenerationConfig(eos_token_id=3)) == (3,)
    with pytest.raises(ConfigError, match="eos_token in tokenizer_config"):
        eos_ids(endless)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"student": "{question} {answer}"}, r"prompt\.student has the field \{answer\}"),
        ({"student": "no fields"}, r"prompt\.student lacks the field \{question\}"),
        ({"teacher": "It is {answer}."}, r"prompt\.teacher lacks the field \{question\}"),
        ({"answer_cue": "It is {answer}:"}, r"prompt\.answer_cue has the field \{answer\}"),
        ({"answer_target": "{4}"}, r"prompt\.answer_target lacks the field \{answer\}"),
        ({"think_close": "</thought>"}, r"prompt\.think_close: .* '</thought>'.*add_tokens"),
        ({"think_open": ""}, r"prompt\.think_open: the tokenizer makes \[\] of ''"),
    ],
)
def test_templates_that_cannot_work_are_refused(tokenizer: Any, changes: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        Prompter(tokenizer, PromptConfig(**changes))


def test_an_unknown_tag_is_not_taken_for_a_token():
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<unk>": 0, "<think>": 1}, unk_token="<unk>")),
        unk_token="<unk>",
        chat_template=TURNS,
    )
    with pytest.raises(ConfigError, match=r"prompt\.think_close: the tokenizer makes \[0\]"):
        Prompter(tokenizer, PromptConfig())


def test_chat_templates_that_cannot_work_are_refused():
    bare = make_tokenizer()
    bare.chat_template = None
    with pytest.raises(ConfigError, match="has no chat template; use an instruction-tuned model"):
        Prompter(bare, PromptConfig())
    as_system = PromptConfig(teacher_role="system")
    refuses = make_tokenizer(
        turns="{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turn') }}"
        "{% endif %}" + TURNS
    )
    with pytest.raises(
        ConfigError, match=r"system \+ user: no system turn; set prompt.teacher_role"
    ):
        Prompter(refuses, as_system).prompt([QUESTION])
    forgets = make_tokenizer(turns="<user>{{ messages[-1]['content'] }}<assistant>GENERATE")
    assert Prompter(forgets, PromptConfig()).prompt([QUESTION])
    with pytest.raises(ConfigError, match="loses or changes the system turn"):
        Prompter(forgets, as_system).prompt([QUESTION])


def test_nothing_in_nothing_out(tokenizer: Any):
    assert Prompter(tokenizer, PromptConfig()).prompt([]) == []
