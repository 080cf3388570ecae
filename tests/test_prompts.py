"""The two views: no answer in the student's, one BOS, one think prefix, nothing cut, nothing lost
between text and ids; tokenizers and templates that cannot be used are refused in words."""

import json
import random
import re
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from chat_models import QWEN2_SPLIT, R1_TEMPLATE
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from vpgea_fast import prompts
from vpgea_fast.checkpoint import export_model
from vpgea_fast.cli import main
from vpgea_fast.config import ConfigError, PromptConfig, load, parse_overrides, printable, resolve
from vpgea_fast.data import load_benchmarks
from vpgea_fast.distributed import World
from vpgea_fast.dry_run import dry_run
from vpgea_fast.metrics import Console
from vpgea_fast.model_dir import (
    ModelError,
    check_vocabulary,
    load_generation_config,
    load_tokenizer,
)
from vpgea_fast.prompts import Prompter, eos_ids, fill, length_report
from vpgea_fast.types import Question
from vpgea_fast.weights import load_causal_lm, load_config

CASES = Path(__file__).parent / "cases"
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
QUESTION = Question(id="q0", text="What is {2 + 2}, {answer}?", answer="4{question}")


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
    [got] = Prompter(tokenizer, cfg).prompt([Question(id="q", text="2+2?", answer="4")])
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
        questions = [
            Question(id=f"q{i}", text=asked, answer=text(secret))
            for i, secret in enumerate(secrets)
        ]
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
    [got] = Prompter(tokenizer, PromptConfig()).prompt([Question(id="q", text="a", answer=answer)])
    whole = tokenizer("\n\n**Final Answer**\n\\boxed{" + answer + "}", add_special_tokens=False)
    assert whole["input_ids"] == torch.cat([got.cue_ids, got.target_ids]).tolist()


def test_the_canonical_split_is_owed_to_the_pre_tokenizer():
    """The control: a BPE without the Qwen2 split merges across the border."""
    tokenizer = make_tokenizer(split=False)
    [got] = Prompter(tokenizer, PromptConfig()).prompt([Question(id="q", text="a", answer="204")])
    whole = tokenizer("\n\n**Final Answer**\n\\boxed{204}", add_special_tokens=False)
    assert whole["input_ids"] != torch.cat([got.cue_ids, got.target_ids]).tolist()


def test_overlong_prompts_are_dropped_with_a_count_or_an_error_and_never_cut(tokenizer: Any):
    prompter = Prompter(tokenizer, PromptConfig(student="{question}", teacher="{question}{answer}"))
    questions = [Question(id=f"q{n}", text="?" * n, answer="!" * 9) for n in (5, 40, 6, 41)]
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
        Question(id="a", text="1+1", answer="2"),
        Question(id="b", text="1</think>", answer="2"),
        Question(id="c", text="1", answer="<think>"),
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
    prompted = prompter.prompt(
        [Question(id=f"q{n}", text="?" * n, answer="!") for n in range(1, 101)]
    )
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
        ({"think_close": ""}, r"prompt\.think_close: .* \[\] of ''.*add_tokens"),
        ({"think_open": ""}, r"prompt\.think_open: the tokenizer makes \[\] of ''"),
    ],
)
def test_templates_that_cannot_work_are_refused(tokenizer: Any, changes: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        Prompter(tokenizer, PromptConfig(**changes))


THOUGHT = {
    "think_open": "<|begin_of_thought|>",
    "think_close": "<|end_of_thought|>",
    "think_prefix": "<|begin_of_thought|>\n\n",
}


@pytest.mark.parametrize("cue", ["\n\n**Final Answer**\n\\boxed", "|>|>", ">", ""])
def test_tags_of_several_tokens_stand_around_a_thought(tokenizer: Any, cue: str):
    """Whatever the tokenizer would merge the tag's end with, the cue stands behind it as a text."""
    prompter = Prompter(make_tokenizer(""), PromptConfig(**THOUGHT, answer_cue=cue))
    assert prompter.tag is not None
    assert (prompter.tag.text, prompter.tag.ids) == (
        THOUGHT["think_close"],
        prompter.think_close_ids,
    )
    assert min(len(prompter.think_close_ids), len(prompter.think_open_ids)) > 1
    [got] = prompter.prompt([QUESTION])
    for ids in (got.student_ids, got.teacher_ids):
        assert tokenizer.decode(ids).count("<|begin_of_thought|>") == 1
        assert tokenizer.decode(ids).endswith(THOUGHT["think_prefix"])
    assert tokenizer.decode(got.close_ids) == "<|end_of_thought|>"
    joined = torch.cat([got.close_ids, got.cue_ids, got.target_ids])
    assert tokenizer.decode(joined) == "<|end_of_thought|>" + cue + "{4{question}}"
    assert prompter.tag.end(joined.tolist()) == len(got.close_ids)
    # Data that spells the tag would end a thought.
    assert prompter.has_special("so<|end_of_thought|>")
    asking = prompter.asking("{question}!")
    assert asking.tag is not None
    assert asking.tag.ids == prompter.tag.ids


def test_given_responses_are_cut_at_a_tag_of_several_tokens(tokenizer: Any):
    prompter = Prompter(make_tokenizer(""), PromptConfig(**THOUGHT))
    response = "<|begin_of_thought|>\n\n2 + 2 <|end_of_thought|>\n\nIt is \\boxed{4}"
    question = Question(id="q", text="2+2?", answer="4", responses=(response, "no tag"))
    [[(thought, answer), (open_, target)]] = prompter.responses(prompter.prompt([question]))
    assert tokenizer.decode(thought) == "2 + 2 <|end_of_thought|>"
    assert tokenizer.decode(answer) == "\n\nIt is \\boxed{4}<eos>"
    assert prompter.tag is not None
    assert prompter.tag.end(torch.cat([thought, answer]).tolist()) == len(thought)
    assert tokenizer.decode(open_) == "no tag<|end_of_thought|>"
    assert tokenizer.decode(target) == "\n\n**Final Answer**\n\\boxed{4}<eos>"


def test_a_tag_of_one_token_needs_no_text(tokenizer: Any):
    prompter = Prompter(tokenizer, PromptConfig())
    assert prompter.tag is None
    assert prompter.think_close_ids == (tokenizer.convert_tokens_to_ids("</think>"),)


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


# What the ids say is the text.


@pytest.fixture
def llama_dir(tmp_path):
    """R1-Distill-Llama's shape: model type llama, a byte-level tokenizer.json."""
    from transformers import LlamaConfig, LlamaForCausalLM

    path = tmp_path / "llama"
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=356, num_hidden_layers=1, bos_token_id=350, eos_token_id=351, **sizes
        )
    ).save_pretrained(path)
    for name in ("tokenizer", "tokenizer_config"):
        shutil.copy(CASES / f"bytelevel_llama_{name}.json", path / f"{name}.json")
    return path


def test_the_tokenizer_is_the_one_that_tokenizer_json_describes(llama_dir: Path, tmp_path: Path):
    """LlamaTokenizer would rebuild it from its vocabulary and lose every space and line break."""
    text = "Hello world .\n\nWhat is  the\tanswer?"
    tokenizer = load_tokenizer(str(llama_dir))
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    serialised = Tokenizer.from_file(str(llama_dir / "tokenizer.json"))
    assert ids == serialised.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == text  # an answer: not cleaned up
    cfg = PromptConfig(student="{question}\nThink.", teacher="{question} It is {answer}.")
    [got] = Prompter(tokenizer, cfg).prompt([Question(id="q", text=text, answer="4 2")])
    head = "<｜begin▁of▁sentence｜><｜User｜>"
    tail = "<｜Assistant｜><think>\n"
    assert serialised.decode(got.student_ids.tolist(), skip_special_tokens=False) == (
        f"{head}{text}\nThink.{tail}"
    )
    assert serialised.decode(got.teacher_ids.tolist(), skip_special_tokens=False) == (
        f"{head}{text} It is 4 2.{tail}"
    )
    model = load_causal_lm(str(llama_dir), torch.float32)
    out = export_model(model, tokenizer, tmp_path / "out", world=World(torch.device("cpu")))
    for again in (load_tokenizer(str(out)), AutoTokenizer.from_pretrained(out)):
        assert again(text, add_special_tokens=False)["input_ids"] == ids
        assert again.decode(ids) == text
        assert again.chat_template == tokenizer.chat_template


def test_a_tokenizer_that_loses_text_is_refused(llama_dir: Path):
    rebuilt = AutoTokenizer.from_pretrained(llama_dir)
    if rebuilt.decode(rebuilt("a b", add_special_tokens=False)["input_ids"]) == "a b":
        pytest.skip("this transformers takes tokenizer.json as it is")
    message = (
        r"question 'q': the tokenizer does not keep the text: at character 7 '<｜begin▁of▁sente"
    )
    with pytest.raises(ConfigError, match=message):
        Prompter(rebuilt, PromptConfig()).prompt([Question(id="q", text="a b", answer="4")])
    with pytest.raises(ConfigError, match="question 'a b': the tokenizer does not keep"):
        Prompter(rebuilt, PromptConfig()).student_ids(["a b"])


def changed(tokenizer: Any, **parts: Any) -> Any:
    """The tokenizer with other parts (normalizer=..., decoder=...)."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    for name, part in parts.items():
        setattr(backend, name, part)
    names = {k: v for k, v in tokenizer.special_tokens_map.items() if isinstance(v, str)}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, chat_template=tokenizer.chat_template, **names
    )


def test_only_composed_unicode_may_differ(r1_tokenizer: Any):
    question = Question(
        id="q", text="Cafe\u0301 costs 5 \u212b", answer="4"
    )  # NFC: one character each
    [got] = Prompter(changed(r1_tokenizer, normalizer=normalizers.NFC()), PromptConfig()).prompt(
        [question]
    )
    assert "Caf\u00e9 costs 5 \u00c5\n" in r1_tokenizer.decode(got.student_ids)
    [got] = Prompter(r1_tokenizer, PromptConfig()).prompt([question])
    assert question.text in r1_tokenizer.decode(got.student_ids)
    bare = normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()])
    for lossy in (normalizers.Lowercase(), normalizers.NFKC(), bare):
        prompter = Prompter(changed(r1_tokenizer, normalizer=lossy), PromptConfig(think_prefix=""))
        with pytest.raises(ConfigError, match="does not keep the text: at character"):
            prompter.prompt([Question(id="q", text="Caf\u00e9 \u00bd", answer="4")])


def test_the_answer_and_its_variants_are_checked_too(r1_tokenizer: Any):
    lossy = changed(r1_tokenizer, normalizer=normalizers.Replace("\u00bd", "1/2"))
    prompter = Prompter(lossy, PromptConfig(teacher="{question}"))
    for spoiled in (
        Question(id="a", text="q", answer="\u00bd"),
        Question(id="a", text="q", answer="4", variants=("5", "\u00bd")),
    ):
        with pytest.raises(ConfigError, match=r"question 'a': .*\{\u00bd\}' becomes '.*\{1/2\}'"):
            prompter.prompt([spoiled])
    assert (
        prompter.prompt([Question(id="a", text="q", answer="4", variants=("5",))])[0]
        .variant_ids[0]
        .numel()
        == 3
    )


def sentence_piece(scheme: str, turns: str = TURNS) -> Any:
    """A BPE of Llama 2's kind: `▁` for a space, bytes for the rest."""
    space = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme, split=False)
    letters = [*"abcdefghijklmnopqrstuvwxyzIFAPWThink.?{}0123456789*▁\\", "<unk>"]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(letters))}
    vocab |= {f"<0x{byte:02X}>": len(vocab) + byte for byte in range(256)}
    model = models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = space
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(content=" ", left=1)])
    tokenizer.add_special_tokens([AddedToken(tag, normalized=False) for tag in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        chat_template=turns.replace("GENERATE", ""),
    )


def test_a_cue_behind_a_thought_has_no_space_of_a_beginning():
    tokenizer = sentence_piece("first")
    cfg = PromptConfig(student="{question}", teacher="{question}{answer}", answer_cue="It is \\")
    [got] = Prompter(tokenizer, cfg).prompt([Question(id="q", text="What is it?", answer="4")])
    close = torch.tensor([tokenizer.convert_tokens_to_ids("</think>")])
    ids = torch.cat([got.student_ids, close, got.cue_ids, got.target_ids])
    assert tokenizer.decode(ids) == (
        "<bos><user>What is it?<assistant><think>\n</think>It is \\{4}"
    )
    with pytest.raises(ConfigError, match="does not keep the text"):  # a space behind every tag
        Prompter(sentence_piece("always"), cfg).prompt(
            [Question(id="q", text="What is it?", answer="4")]
        )


# Data that steers the chat.


def cases(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (CASES / name).read_text("utf-8").splitlines()]


def test_tags_of_the_chat_template_in_data_are_left_out(r1_tokenizer: Any):
    assert not any(
        token.special
        for token in r1_tokenizer.added_tokens_decoder.values()
        if "User" in str(token)
    )
    prompter = Prompter(r1_tokenizer, PromptConfig())
    questions = [
        Question(id=row["id"], text=row["problem"], answer=row["answer"])
        for row in cases("chat_tags.jsonl")
    ]
    kept, dropped = prompter.prompt_within(questions, limit=9999, policy="drop")
    assert [p.question.id for p in kept] == ["b"]
    assert dropped["special token in text"] == 1
    with pytest.raises(ConfigError, match=r"1 of 2 questions spell a special token.*'a'"):
        prompter.prompt_within(questions, limit=9999, policy="error")
    with pytest.raises(ConfigError, match=r"question 'What is 2.* spells a special token"):
        prompter.student_ids([q.text for q in questions])
    in_answers = [
        Question(id="a", text="1", answer="<｜User｜>"),
        Question(id="v", text="1", answer="2", variants=("3", "<｜Assistant｜>")),
    ]
    kept, _ = prompter.prompt_within([*in_answers, questions[1]], limit=9999, policy="drop")
    assert [p.question.id for p in kept] == ["b"]


def test_what_counts_as_a_tag(r1_tokenizer: Any):
    tokenizer = changed(r1_tokenizer)
    runs = ["    ", "user", "<tool>", "<unused>"]
    tokenizer.add_tokens([AddedToken(t, normalized=False, special=False) for t in runs])
    tokenizer.chat_template = R1_TEMPLATE + "    {# user #}{% if tools %}<tool>{% endif %}"
    prompter = Prompter(tokenizer, PromptConfig())
    assert not prompter.has_special("a    b", "a user", "<unused>", "x < y > z", "<b>")
    for text in ("<tool>", "a<think>", "</think>", "<｜end▁of▁sentence｜>", "<｜User｜>"):
        assert prompter.has_special("1", f"a {text}")


def test_a_tag_that_is_a_token_without_being_added_counts():
    turns = TURNS.replace("<{{ m['role'] }}>", "[INST]")
    tokenizer = make_tokenizer(turns=turns)
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    backend["pre_tokenizer"] = {
        "type": "Split",
        "pattern": {"Regex": r"\[INST\]|."},
        "behavior": "Isolated",
        "invert": False,
    }
    vocab = backend["model"]["vocab"]
    backend["model"] |= {"merges": [], "ignore_merges": True}
    backend["model"]["vocab"] = {t: i for i, t in enumerate([*vocab, "[INST]", " ", "\n"])}
    backend["decoder"] = {"type": "Fuse"}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(backend)),
        bos_token="<bos>",
        eos_token="<eos>",
        chat_template=turns.replace("GENERATE", ""),
    )
    prompter = Prompter(tokenizer, PromptConfig(student="{question}"))
    assert prompter.has_special("2+2?[INST]no")
    assert not prompter.has_special("[INSTEAD]")


def test_a_tag_in_another_spelling_that_the_normaliser_makes_one_counts(r1_tokenizer: Any):
    prompter = Prompter(
        changed(r1_tokenizer, normalizer=normalizers.NFKC()), PromptConfig(student="{question}")
    )
    assert prompter.has_special("<|User|>")
    assert prompter.has_special("<\uff5cUser\uff5c>")


@pytest.mark.parametrize("normalizer", [None, normalizers.NFC()])
def test_half_a_character_is_named(r1_tokenizer: Any, normalizer: Any):
    prompter = Prompter(changed(r1_tokenizer, normalizer=normalizer), PromptConfig())
    rows = cases("lone_surrogate.jsonl")
    questions = [Question(id=row["id"], text=row["question"], answer=row["answer"]) for row in rows]
    message = r"question 's0': half a character .* at 32: .*9 A\\ud83d-three"
    with pytest.raises(ConfigError, match=message) as caught:
        prompter.prompt_within(questions, limit=9999, policy="drop")
    str(caught.value).encode()  # the message itself can be printed
    with pytest.raises(ConfigError, match="lone surrogate"):
        prompter.prompt([Question(id="a", text="1", answer="4", variants=("\ud800",))])


# Switches of the chat template, and the thought that it opens or closes.


def test_switches_reach_the_chat_template_of_both_views(qwen3_tokenizer: Any):
    for role in ("user", "system"):
        on = PromptConfig(chat_template_kwargs={"enable_thinking": True}, teacher_role=role)
        [got] = Prompter(qwen3_tokenizer, on).prompt([Question(id="q", text="2+2?", answer="4")])
        for ids in (got.student_ids, got.teacher_ids):
            assert qwen3_tokenizer.decode(ids).endswith("<|im_start|>assistant\n<think>\n")
            assert qwen3_tokenizer.decode(ids).count("<think>") == 1
    off = PromptConfig(chat_template_kwargs={"enable_thinking": False})
    with pytest.raises(ConfigError, match=r"a thought that is closed: .*enable_thinking: true"):
        Prompter(qwen3_tokenizer, off)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"messages": []}, "'messages' is given to the template already"),
        ({"tokenize": True}, "'tokenize' is given"),
        ({"add_generation_prompt": False}, "'add_generation_prompt' is given"),
        ({"chat_template": "x"}, "'chat_template' is given"),
        ({"eos_token": "x"}, "'eos_token' is given"),
        ({"enable_thinkin": True}, "never reads 'enable_thinkin'"),
        ({"message": True}, "never reads 'message'"),  # the template's own
        ({"role": True}, "never reads 'role'"),  # of a message
        ({"enable_thinking": "no"}, "enable_thinking is the text 'no', which any template takes"),
    ],
)
def test_switches_that_mean_nothing_are_refused(qwen3_tokenizer: Any, kwargs: dict, message: str):
    with pytest.raises(ConfigError, match=rf"prompt\.chat_template_kwargs: .*{message}"):
        Prompter(qwen3_tokenizer, PromptConfig(chat_template_kwargs=kwargs))


def test_switches_come_from_yaml_and_the_command_line(tmp_path: Path):
    file = tmp_path / "a.yaml"
    file.write_text("prompt:\n  chat_template_kwargs: {enable_thinking: true, level: high}\n")
    assert load(file).prompt.chat_template_kwargs == {"enable_thinking": True, "level": "high"}
    words = ["--prompt.chat_template_kwargs", "{enable_thinking: false}"]
    assert load(file, words).prompt.chat_template_kwargs["enable_thinking"] is False
    assert resolve(parse_overrides(words)).prompt.chat_template_kwargs == {"enable_thinking": False}
    for wrong in ("[1]", "{1: 2}", "yes"):
        with pytest.raises(ConfigError, match=r"prompt\.chat_template_kwargs"):
            resolve(parse_overrides(["--prompt.chat_template_kwargs", wrong]))


@pytest.mark.parametrize(
    ("tail", "prefix", "result"),
    [
        ("<think>\n\n</think>\n\n", "<think>\n", "a thought that is closed"),
        ("<think>\n\n</think>\n\n", "", "a thought that is closed"),
        ("</think>", "<think>\n", "a thought that is closed"),
        ("<think>\nOkay, ", "<think>\n", "opens a thought and begins it"),
        ("<think>\nOkay, ", "", "<assistant><think>\nOkay, "),
        ("<think>\nOkay, ", "<think>\nOkay, ", "<assistant><think>\nOkay, "),
        ("Now <think></think><think>", "<think>\n", "<assistant>Now <think></think><think>\n"),
    ],
)
def test_a_thought_is_opened_once_and_never_behind_a_closed_one(tail, prefix, result):
    tokenizer, cfg = make_tokenizer(tail), PromptConfig(think_prefix=prefix)
    if not result.startswith("<assistant>"):
        with pytest.raises(ConfigError, match=result):
            Prompter(tokenizer, cfg)
        return
    assert Prompter(tokenizer, cfg).student_text("a").endswith(f"within \\boxed{{}}.{result}")


def test_a_question_that_stands_in_the_end_of_the_template(qwen3_tokenizer: Any):
    """`think` and `a` are found there too; what is behind the turn is what counts."""
    cfg = PromptConfig(student="{question}", think_prefix="<think>")
    prompter = Prompter(qwen3_tokenizer, cfg)
    tokenizer = make_tokenizer("<think>\n")
    for question in ("think", "assistant", "a", "\n", ">"):
        text = prompter.student_text(question)
        assert text.endswith(f"{question}<|im_end|>\n<|im_start|>assistant\n<think>")
        text = Prompter(tokenizer, cfg).student_text(question)
        assert text == f"<bos><user>{question}<assistant><think>"


def test_tags_in_the_words_before_do_not_count():
    """A system turn of the template, or the user's own words, may explain the tags."""
    turns = "Write <think> and </think>. " + TURNS
    cfg = PromptConfig(student="{question} Use <think></think>.")
    text = Prompter(make_tokenizer("", turns=turns), cfg).student_text("a")
    assert text.endswith("Use <think></think>.<assistant><think>\n")


# Templates and files that cannot be used.

TEMPLATES = {
    "raises": ("{{ raise_exception('no') }}", "refuses the turns user: no; repair the template"),
    "an integer": (5, "is 5; expected the text of a Jinja template"),
    "too large": ("{{ 'x' * 10**12 }}", "refuses the turns user: MemoryError; repair"),
    "includes": ("{% include 'a.jinja' %}", "refuses the turns user: "),
    "a wrong type": ("{{ messages + 1 }}", "refuses the turns user: "),
    "no Jinja": ("{% if %}", "refuses the turns user: "),
    "recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "refuses the turns user: "),
    "a long range": ("{% for i in range(10**9) %}x{% endfor %}", "refuses the turns user: "),
    "endless": (
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "no end after 0.5 s",
    ),
    "a power": ("{{ 9**(9**9) }}", "no end after 0.5 s"),
    "megabytes": ("{{ messages[0].content }}{{ 'x' * 3000000 }}", "made 3000"),
    "no text": ("", "has no chat template"),
    "nothing of it": ("hello", "loses or changes the user turn"),
    "no default": ([{"name": "tool", "template": "x"}], "chat template of .* cannot be used"),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_broken_chat_template_is_refused(name: str, r1_tokenizer: Any, monkeypatch):
    monkeypatch.setattr(prompts, "RENDER_SECONDS", 0.5)
    template, message = TEMPLATES[name]
    tokenizer = changed(r1_tokenizer)
    tokenizer.chat_template = (
        {entry["name"]: entry["template"] for entry in template}
        if isinstance(template, list)
        else template
    )
    began = time.monotonic()
    with pytest.raises(ConfigError, match=message):
        Prompter(tokenizer, PromptConfig())
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ raise_exception('no') }}", "refuses the turns user: no"),
        ("{{ messages[0].content }}{{ 'x' * 3000000 }}", "made 3000"),
        ("hello", "loses or changes the user turn"),
        ("{{ messages[0].content }}<think></think>", "ends with a thought that is closed"),
        ("{{ messages[0].content }}<think>Well", "opens a thought and begins it"),
    ],
)
def test_an_error_of_a_chat_template_names_the_models_directory(
    template: str, said: str, r1_tokenizer: Any, r1_model_dir: str
):
    tokenizer = changed(r1_tokenizer)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(r1_model_dir)
    message = f"the chat template of {r1_model_dir} {said}"
    with pytest.raises(ConfigError, match=re.escape(message)):
        Prompter(load_tokenizer(r1_model_dir), PromptConfig())


def test_a_switch_that_is_never_read_names_the_models_directory(r1_model_dir: str):
    cfg = PromptConfig(chat_template_kwargs={"enable_thinking": True})
    said = f"the chat template of {r1_model_dir} never reads 'enable_thinking'"
    with pytest.raises(ConfigError, match=re.escape(said)):
        Prompter(load_tokenizer(r1_model_dir), cfg)


def test_the_time_limit_leaves_an_older_timer_running(r1_tokenizer: Any):
    import signal

    rang: list[int] = []
    before = signal.signal(signal.SIGALRM, lambda *_: rang.append(1))
    try:
        signal.setitimer(signal.ITIMER_REAL, 30)
        Prompter(r1_tokenizer, PromptConfig()).student_text("a")
        left, _ = signal.setitimer(signal.ITIMER_REAL, 0)
        assert 0 < left <= 30
    finally:
        signal.signal(signal.SIGALRM, before)
    made: list[str] = []
    prompter = Prompter(r1_tokenizer, PromptConfig())
    thread = threading.Thread(target=lambda: made.append(prompter.student_text("a")))
    thread.start()
    thread.join()
    assert made == [prompter.student_text("a")]  # a thread hears no signal: no limit there


@pytest.mark.parametrize("command", ["train", "eval"])
@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("tokenizer.json", None, "has no tokenizer.json; expected the tokenizer beside"),
        ("tokenizer.json", "{}", "cannot load a tokenizer from"),
        ("tokenizer.json", '{"version": ', "tokenizer.json is damaged (Expecting value"),
        ("tokenizer.json", "[]", "tokenizer.json is damaged (no JSON object)"),
        ("tokenizer.json", '{"model": {"type": "BPE", "vocab": 3}}', "cannot load a tokenizer"),
        ("tokenizer_config.json", None, "has no tokenizer_config.json, which names the tokens"),
        ("tokenizer_config.json", "{", "tokenizer_config.json is damaged"),
        ("tokenizer_config.json", '{"eos_token": 5}', "tokenizer"),
        ("tokenizer_config.json", '{"chat_template": 5, "eos_token": "</think>"}', "chat template"),
        ("generation_config.json", "{", "generation_config.json is damaged"),
        ("generation_config.json", '{"eos_token_id": "2"}', "expected tokens of 0..425"),
    ],
)
def test_a_broken_tokenizer_is_one_line(
    command, file, content, said, r1_model_dir, tmp_path, capsys
):
    path = Path(r1_model_dir) / file
    (path.parent / "chat_template.jinja").rename(tmp_path / "template")
    config = path.parent / "tokenizer_config.json"
    known = json.loads(config.read_text()) | {"chat_template": R1_TEMPLATE}
    config.write_text(json.dumps(known))
    path.unlink(missing_ok=True)
    if content is not None:
        path.write_text(content)
    data = tmp_path / "data.jsonl"
    data.write_text('{"question": "2+2?", "answer": "4"}\n')
    if command == "train":
        yaml = tmp_path / "a.yaml"
        yaml.write_text("train: {questions_per_step: 1}\nmodel: {device: cpu, dtype: float32}\n")
        words = [
            "train",
            str(yaml),
            "--verify.name",
            "number",
            "--data.train",
            str(data),
            "--model.path",
            r1_model_dir,
        ]
        words += ["--run.dir", str(tmp_path / "run")]
    else:
        words = ["eval", r1_model_dir, str(data), "--model.device", "cpu"]
    words += ["--verify.name", "number"]
    capsys.readouterr()
    assert main(words) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("vpgea: ")
    assert said in error
    assert "\n" not in error
    assert r1_model_dir in error
    assert not (tmp_path / "run").exists()


# generation_config.json


def with_generation(directory: str, **settings: Any) -> str:
    file = Path(directory) / "generation_config.json"
    file.write_text(json.dumps(settings))
    return directory


def test_a_generation_config_is_made_valid_and_exported(r1_model_dir: str, tmp_path: Path):
    shutil.copy(CASES / "generation_config.json", Path(r1_model_dir) / "generation_config.json")
    model = load_causal_lm(r1_model_dir, torch.float32)
    tokenizer = load_tokenizer(r1_model_dir)
    out = export_model(model, tokenizer, tmp_path / "out", world=World(torch.device("cpu")))
    written = GenerationConfig.from_pretrained(out)
    written.validate(strict=True)
    assert (written.do_sample, written.eos_token_id) == (False, 2)
    assert (written.temperature, written.top_p) == (None, None)
    sampled = with_generation(r1_model_dir, do_sample=True, temperature=0.6, eos_token_id=[2, 3])
    kept = load_generation_config(sampled, load_config(sampled))
    assert (kept.temperature, kept.eos_token_id) == (0.6, [2, 3])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": "hot", "do_sample": True}, "temperature is 'hot', expected a number"),
        ({"top_p": True}, "top_p is True, expected a number"),
        ({"do_sample": "no"}, "do_sample is 'no', expected true or false"),
        ({"eos_token_id": [1, 426]}, r"eos_token_id is \[1, 426\], expected tokens of 0..425"),
        ({"eos_token_id": -1}, "eos_token_id is -1, expected tokens"),
        ({"eos_token_id": [[1]]}, r"eos_token_id is \[\[1\]\]"),
        ({"eos_token_id": {"a": 1}}, "eos_token_id is"),
        ({"eos_token_id": True}, "eos_token_id is True"),
        ({"max_new_tokens": -5}, "max_new_tokens"),
        ({"max_new_tokens": "5"}, "cannot be used"),
        ({"pad_token_id": "a"}, "cannot be used"),
        ({"cache_implementation": "none"}, "cache_implementation"),
        ({"num_beams": 1, "early_stopping": True}, "early_stopping"),
    ],
)
def test_a_generation_config_that_cannot_be_written_is_refused(
    settings: dict, message: str, r1_model_dir: str
):
    with_generation(r1_model_dir, **settings)
    with pytest.raises(
        ModelError,
        match=rf"generation_config\.json cannot be used.*{message}|"
        rf"{message}.*generation_config\.json|generation_config\.json {message}",
    ):
        load_generation_config(r1_model_dir, load_config(r1_model_dir))


def test_an_unknown_vocabulary_is_refused_before_weights(r1_model_dir):
    tokenizer = load_tokenizer(r1_model_dir)
    config = load_config(r1_model_dir)
    check_vocabulary(tokenizer, config, r1_model_dir)
    config.vocab_size = 425
    with pytest.raises(ModelError, match="'</think>' is token 425, but the model embeds 425"):
        check_vocabulary(tokenizer, config, r1_model_dir)


# What is shown is what the model sees, and steers no terminal.


def test_control_characters_are_spelled():
    assert printable("a\x1b]52;c;aGk=\x07\tb\nc\r\x9b2J\u202e\ud83d\x00é") == (
        "a\\x1b]52;c;aGk=\\x07\tb\nc\\r\\x9b2J\\u202e\\ud83d\\x00é"
    )


def test_what_is_shown_are_the_ids_and_steers_no_terminal(r1_model_dir, tmp_path, capsys):
    data = tmp_path / "data.jsonl"
    text = "2+2\x1b[2J\x1b]52;c;aGk=\x07?"
    data.write_text(json.dumps({"id": "q\x1b[31m", "question": text, "answer": "4\x1b[0m"}) + "\n")
    tree = {
        "model": {"path": r1_model_dir, "device": "cpu", "dtype": "float32"},
        "data": {"train": str(data)},
        "eval": {"data": [str(data)], "max_new_tokens": 8},
        "rollout": {"max_new_tokens": 8},
        "train": {"questions_per_step": 1},
    }
    cfg = resolve(tree)
    dry_run(cfg)
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    assert (
        "student prompt:\n<｜begin▁of▁sentence｜><｜User｜>2+2\\x1b[2J\\x1b]52;c;aGk=\\x07?"
        in shown
    )
    prompter = Prompter(load_tokenizer(r1_model_dir), cfg.prompt)
    [benchmark] = load_benchmarks(cfg.eval, cfg.data, prompter).values()
    assert (
        benchmark.shown == prompter.student_text(text) == prompter.shown(benchmark.questions[0][1])
    )
    console = Console()
    console.message(f"student prompt: {benchmark.shown}")
    console.close()
    assert "\x1b" not in capsys.readouterr().out


# Damage of any kind.

JUNK = [None, True, -1, 10**30, 1.5, float("nan"), "", "x", "\ud800", [], {}, [1], {"a": 1}, [None]]


def places(tree: Any, path: tuple = ()) -> list[tuple]:
    items = tree.items() if isinstance(tree, dict) else enumerate(tree[:9])
    found = [(*path, key) for key, _ in items]
    deeper = [
        place
        for key, value in (tree.items() if isinstance(tree, dict) else enumerate(tree[:9]))
        if isinstance(value, (dict, list)) and key != "vocab"
        for place in places(value, (*path, key))
    ]
    return found + deeper


def damaged(content: bytes, *, is_json: bool, rng: random.Random) -> bytes:
    """One value replaced or taken away, the end cut off, or a few bytes changed."""
    kind = rng.random()
    if is_json and kind < 0.75:
        tree = json.loads(content)
        *path, last = rng.choice(places(tree))
        node = tree
        for key in path:
            node = node[key]
        if rng.random() < 0.3:
            del node[last]
        else:
            node[last] = rng.choice(JUNK)
        return json.dumps(tree).encode()
    if kind < 0.85:
        return content[: rng.randrange(len(content))]
    changed_bytes = bytearray(content)
    for _ in range(rng.choice([1, 3, 10])):
        changed_bytes[rng.randrange(len(content))] = rng.randrange(256)
    return bytes(changed_bytes)


@pytest.mark.parametrize(
    "file",
    ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"],
)
def test_no_damage_to_a_file_ends_in_a_traceback(file: str, r1_model_dir: str, monkeypatch):
    """Refused with its own words, or usable: prompts, decoded ids and what an export writes."""
    monkeypatch.setattr(prompts, "RENDER_SECONDS", 0.5)
    path, rng = Path(r1_model_dir) / file, random.Random(file)
    content = path.read_bytes()
    questions = [
        Question(id="a", text="What is 2 + 2?", answer="4", variants=("5",)),
        Question(id="b", text="é\n\n <x>中", answer="72"),
    ]
    refused = 0
    for _ in range(25):
        path.write_bytes(damaged(content, is_json=file.endswith("json"), rng=rng))
        try:
            tokenizer, config = load_tokenizer(r1_model_dir), load_config(r1_model_dir)
            prompter = Prompter(tokenizer, PromptConfig())
            check_vocabulary(tokenizer, config, r1_model_dir)
            generation = load_generation_config(r1_model_dir, config)
            assert eos_ids(tokenizer, generation)
            prompter.prompt_within(questions, limit=2000, policy="drop")
            tokenizer.save_pretrained(path.parent / "out")
            generation.save_pretrained(path.parent / "out")
        except (ConfigError, ModelError):
            refused += 1
    assert refused > 5
