"""The tiny world: a right corpus, an invertible tokenizer, exact probabilities, a strict gate."""

import json
import math
import random
import re
import unicodedata
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from math_verify import parse, verify

from vpgea_fast import config, tiny
from vpgea_fast.tiny import base, recipes, task
from vpgea_fast.tiny.chain import CHAIN
from vpgea_fast.trainer import fit

TINY = Path(__file__).parents[1] / "configs/tiny.yaml"
DEMO = recipes.RECIPES["demo"]
FLAWLESS = task.Corpus(slip=0.0, teacher_leak=0.0)
SEEDS = st.integers(0, 10**9)


@pytest.fixture(scope="module")
def questions():
    return CHAIN.question_sets()


@pytest.fixture(scope="module")
def tokenizer():
    return CHAIN.make_tokenizer()


def in_digits(text):
    for name, digit in zip(("one", "two", "three", "four", "five"), "12345", strict=True):
        text = text.replace(name, digit)
    return text


def expected_answer(text):
    return str(sum(int(number) for number in re.findall(r"[+-]?\d", in_digits(text))) % 10)


def asked_steps(text):
    return [(label, int(n)) for label, n in re.findall(r"([A-E])([+-]\d)", in_digits(text))]


def stated_steps(thought):
    """Every (label, shift, value before, value after) in the text, redundancy included."""
    steps = re.findall(r" ([A-E])([+-]\d)(\d)(\d)", in_digits(thought))
    return [(label, int(shift), int(before), int(after)) for label, shift, before, after in steps]


def row_texts(row, tokenizer):
    """(view, question, prompt ids, completion) of a row."""
    ids = row.ids[: row.weight.index(1.0)]
    content = re.search(r"<\|user\|>(.*)<\|assistant\|><think>$", tokenizer.decode(ids))
    assert content
    question, hint, _ = content[1].partition(" hint ")
    return "teacher" if hint else "student", question, ids, tokenizer.decode(row.ids[len(ids) :])


# The task


def test_question_sets_are_disjoint_right_and_always_the_same(questions):
    train, test = questions
    assert (len(train), len(test)) == (4096, 800)
    texts = {question.text for question in (*train, *test)}
    assert len(texts) == len(train) + len(test) == len({q.id for q in (*train, *test)})
    assert all(question.answer == expected_answer(question.text) for question in (*train, *test))
    assert CHAIN.question_sets() == questions


def test_both_sets_hold_every_length_in_like_shares(questions):
    def shares(part):
        counts = Counter(len(asked_steps(question.text)) for question in part)
        return [counts[steps] / len(part) for steps in range(2, 6)]

    for train, test in zip(*map(shares, questions), strict=True):
        assert train > 0.1
        assert abs(train - test) < 3 * math.sqrt(train * (1 - train) / task.TEST_QUESTIONS)


@given(SEEDS)
def test_a_concise_thought_is_the_arithmetic_and_nothing_else(seed):
    text = CHAIN.random_question(random.Random(seed))
    words = CHAIN.shortest_thought(text)
    value, expected = int(text[0]), []
    for label, shift in asked_steps(text):
        expected.append((label, shift, value, (value + shift) % 10))
        value = (value + shift) % 10
    assert stated_steps("".join(words)) == expected
    assert len(words) == 4 * len(expected) + 1
    assert words[-1] == "</think>"
    assert str(value) == expected_answer(text) == CHAIN.solve(text)


@given(SEEDS)
def test_a_verbose_thought_without_its_redundancy_is_the_concise_one(seed):
    rng = random.Random(seed)
    text = CHAIN.random_question(rng)
    words, digit = CHAIN.sample_thought(text, rng, FLAWLESS, style="verbose")
    concise = CHAIN.shortest_thought(text)
    first_pass = re.sub(r" check.*(?=</think>)", "", "".join(words))
    assert re.sub(r" wait [A-E][+-][a-z]+\d\d| ok| hmm", "", first_pass) == "".join(concise)
    assert words[CHAIN.step_tokens] == " wait"
    assert concise[CHAIN.step_tokens] == task.LABELS[1]
    assert digit == expected_answer(text)
    assert set(stated_steps("".join(words))) == set(stated_steps("".join(concise)))


@given(SEEDS, st.sampled_from(["verbose", "concise"]))
def test_slips_are_stated_carried_on_and_answered(seed, style):
    rng = random.Random(seed)
    text = CHAIN.random_question(rng)
    slippery = task.Corpus(slip=0.5, check=0.0)
    words, digit = CHAIN.sample_thought(text, rng, slippery, style=style)
    carried, steps = int(text[0]), stated_steps("".join(words))
    for (label, _, before, after), following in zip(steps, [*steps[1:], None], strict=True):
        assert before == carried
        if following is None or following[0] != label:  # the last time that this step is stated
            carried = after
    assert digit == str(carried)


# Tokenizer


def test_every_word_is_one_token_and_a_thousand_texts_survive(tokenizer):
    for word in (*CHAIN.words, *task.WORDS, *task.DIGITS, *task.SPECIAL, "{"):
        assert len(task.text_ids(tokenizer, word)) == 1
    rng = random.Random(7)
    for _ in range(1000):
        text = CHAIN.random_question(rng)
        style: task.Style = rng.choice(["verbose", "concise"])
        thought, digit = CHAIN.sample_thought(text, rng, DEMO.corpus, style=style)
        assert len(task.text_ids(tokenizer, text)) == 1 + 2 * len(asked_steps(text))
        assert len(task.text_ids(tokenizer, "".join(thought))) == len(thought)
        whole = f"{text}<think>{''.join(thought)}{task.ANSWER.format(answer=digit)}</s>"
        assert tokenizer.decode(task.text_ids(tokenizer, whole)) == whole


@given(st.text())
def test_no_text_is_dropped(text):
    tokenizer = CHAIN.make_tokenizer()
    assert tokenizer.decode(task.text_ids(tokenizer, text)) == unicodedata.normalize("NFC", text)


def test_cue_and_target_split_where_the_whole_text_does(tokenizer):
    """Scoring tokenises them apart: that has to give the ids that the base was trained on."""
    whole = task.text_ids(tokenizer, "</think>" + task.ANSWER.format(answer=7) + "</s>")
    parts = ("</think>", "\\boxed{", "7 }", "</s>")
    assert whole == [i for part in parts for i in task.text_ids(tokenizer, part)]
    assert verify(parse("$7$"), parse(task.ANSWER.format(answer=7)))


def test_the_template_takes_a_system_turn_and_refuses_other_roles(tokenizer):
    turns = [{"role": "system", "content": "hint"}, {"role": "user", "content": "4 A+two"}]
    text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    assert text == "<s>hint<|user|>4 A+two<|assistant|><think>"
    with pytest.raises(Exception, match="no role tool"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "4"}], tokenize=False)


# The supervised rows and their loss


def test_rows_start_with_the_ids_of_the_chat_template(tokenizer):
    rng, views = random.Random(3), Counter()
    for _ in range(300):
        row = base.sample_row(rng, DEMO, tokenizer, frozenset(), pinned=True)
        view, text, ids, _ = row_texts(row, tokenizer)
        content = text if view == "student" else f"{text} hint {expected_answer(text)}"
        turns = [{"role": "user", "content": content}]
        assert ids == tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
        views[view] += 1
    assert min(views["student"], views["teacher"]) > 100


def test_rows_keep_held_out_questions_out_and_teachers_right(questions, tokenizer):
    train, test = questions
    rng, held_out = random.Random(5), frozenset(q.text for q in (*train, *test))
    leaks = teachers = 0
    for _ in range(2000):
        row = base.sample_row(rng, DEMO, tokenizer, held_out, pinned=False)
        view, text, _, completion = row_texts(row, tokenizer)
        assert text not in held_out
        if view == "teacher":
            thought, answer = completion.split("</think>")
            assert answer == f"\\boxed{{{expected_answer(text)} }}</s>"
            leaks += len({step[0] for step in stated_steps(thought)}) < len(asked_steps(text))
            teachers += 1
    assert leaks / teachers == pytest.approx(DEMO.corpus.teacher_leak, abs=0.025)  # 3.5 errors


@pytest.mark.parametrize("rarity", [0.01, 0.2])
def test_weights_of_the_mode_decision_average_to_the_wanted_rarity(rarity, tokenizer):
    rng, recipe = random.Random(11), replace(DEMO, student_concise=rarity)
    (second_label,) = task.text_ids(tokenizer, " B")
    total = concise = 0.0
    for _ in range(4000):
        row = base.sample_row(rng, recipe, tokenizer, frozenset(), pinned=True)
        (pin,) = row.pins
        if pin.probability == rarity:
            total += row.weight[pin.index]
            concise += row.weight[pin.index] * (row.ids[pin.index] == second_label)
            assert {w for i, w in enumerate(row.weight) if i != pin.index} == {0.0, 1.0}
    assert concise / total == pytest.approx(rarity, rel=0.14)  # 3.5 standard errors


@pytest.mark.parametrize("pinned", [False, True])
def test_the_loss_of_a_padded_batch_is_the_formula_row_by_row(pinned, tokenizer):
    rng, model = random.Random(2), base.make_model(1, len(tokenizer)).double()
    rows = [base.sample_row(rng, DEMO, tokenizer, frozenset(), pinned=pinned) for _ in range(6)]
    nll, count, misses = 0.0, 0, []
    for row in rows:
        logp = model(torch.tensor([row.ids])).logits[0].log_softmax(-1)
        for t in range(1, len(row.ids)):
            nll -= row.weight[t] * logp[t - 1, row.ids[t]].item()
            count += row.weight[t] > 0
        for pin in row.pins:
            logp_concise = logp[pin.index - 1, task.text_ids(tokenizer, " B")[0]].item()
            misses.append((logp_concise - math.log(pin.probability)) ** 2)
    assert len(misses) == (len(rows) if pinned else 0)
    expected = nll / count + DEMO.pin * (sum(misses) / len(misses) if misses else 0.0)
    got = base.supervised_loss(model, rows, DEMO).item()
    assert got == pytest.approx(expected, rel=1e-6)  # the weights are float32


@pytest.mark.parametrize("view", ["student", "teacher"])
def test_concise_probability_is_the_product_of_next_token_probabilities(view, questions, tokenizer):
    model, some = base.make_model(3, len(tokenizer)), questions[1][:5]
    expected = 0.0
    for question in some:
        ids = task.prompt_ids(tokenizer, question, view)
        logp = 0.0
        for token in task.text_ids(tokenizer, "".join(CHAIN.shortest_thought(question.text))):
            next_logp = model(torch.tensor([ids])).logits[0, -1].double().log_softmax(-1)
            logp += next_logp[token].item()
            ids = [*ids, token]
        expected += math.exp(logp) / len(some)
    got = base.style_probability(CHAIN, model, tokenizer, some, view)
    assert got == pytest.approx(expected, rel=1e-3)


# The shipped base and the gate


def test_the_shipped_base_is_small_complete_and_float32(tiny_world, tiny_model):
    files = {path.name: path.stat().st_size for path in tiny.SHIPPED_BASE.iterdir()}
    assert set(files) == set(tiny.BASE_FILES)
    assert sum(files.values()) <= 500_000
    assert {p.dtype for p in tiny_model.parameters()} == {torch.float32}
    assert tiny_model.config.hidden_size // tiny_model.config.num_attention_heads == 32
    assert tiny_model.lm_head.weight is tiny_model.model.embed_tokens.weight
    assert base.gate_failures(tiny_world.report, DEMO.gate) == []


def test_the_shipped_base_passes_its_gate_again(tiny_world, tiny_model, tiny_tokenizer, questions):
    _, test = questions
    report = tiny_world.report
    given = CHAIN, tiny_model, tiny_tokenizer
    greedy, _ = base.answer_accuracy(*given, test[:100], seed=None)
    forced, _ = base.answer_accuracy(*given, test[:200], seed=None, forced=True)
    sampled, tokens = base.answer_accuracy(*given, test[:100], seed=1)
    again = replace(
        report,
        concise_student=base.style_probability(*given, test[:200], "student"),
        concise_teacher=base.style_probability(*given, test[:200], "teacher"),
        greedy_accuracy=greedy,
        forced_accuracy=forced,
        sampled_tokens=tokens,
    )
    assert base.gate_failures(again, DEMO.gate) == []
    assert sampled == pytest.approx(report.sampled_accuracy, abs=0.13)  # 3.5 standard errors


def test_forced_accuracy_is_that_of_a_concise_start_continued_token_by_token(
    tiny_model, tiny_tokenizer, questions
):
    """On a spoilt base, so that some of the answers are wrong."""
    some, correct, generated = questions[1][:40], 0, 0
    with torch.no_grad():
        for parameter in tiny_model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    for question in some:
        (label, shift), (second, _), *_ = asked_steps(question.text)
        start = int(question.text[0])
        operation = question.text[question.text.index("A") + 1 : question.text.index(" B")]
        given = f" {label}{operation}{start}{(start + shift) % 10} {second}"
        prompt = f"<s><|user|>{question.text}<|assistant|><think>{given}"
        ids, answer = task.text_ids(tiny_tokenizer, prompt), []
        while len(answer) < base.MAX_NEW_TOKENS and "</s>" not in tiny_tokenizer.decode(answer):
            answer.append(tiny_model(torch.tensor([ids + answer])).logits[0, -1].argmax().item())
        right = f"</think>\\boxed{{{expected_answer(question.text)} }}</s>"
        correct += tiny_tokenizer.decode(answer).endswith(right)
        generated += len(answer)
    assert 0 < correct < len(some)
    got = base.answer_accuracy(CHAIN, tiny_model, tiny_tokenizer, some, seed=None, forced=True)
    assert got == (correct / len(some), generated / len(some))


def test_autotokenizer_gives_the_ids_that_the_base_was_trained_on(
    tiny_tokenizer, tokenizer, questions
):
    assert tiny_tokenizer.get_vocab() == tokenizer.get_vocab()
    assert tiny_tokenizer.chat_template == task.CHAT_TEMPLATE
    assert tiny_tokenizer.convert_tokens_to_ids(list(task.SPECIAL)) == list(range(7))
    assert (tiny_tokenizer.pad_token, tiny_tokenizer.eos_token) == ("<pad>", "</s>")
    for question in questions[1][:50]:
        text = f"{question.text} hint 3<think>{''.join(CHAIN.shortest_thought(question.text))}"
        assert task.text_ids(tiny_tokenizer, text) == task.text_ids(tokenizer, text)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("concise_student", 1e-4),
        ("concise_teacher", 0.1),
        ("greedy_accuracy", 0.98),
        ("forced_accuracy", 0.96),
        ("sampled_accuracy", math.nan),
        ("sampled_tokens", 20.0),
    ],
)
def test_the_gate_names_what_is_out_of_band(tiny_world, name, value):
    (failure,) = base.gate_failures(replace(tiny_world.report, **{name: value}), DEMO.gate)
    assert failure.startswith(f"{name} is ")


def short_recipe():
    phases = (recipes.Phase(2, 1e-3, pinned=False), recipes.Phase(2, 1e-3, pinned=True))
    return replace(DEMO, phases=phases, batch=4)


def test_training_is_a_function_of_the_seed():
    def weights(seed):
        model = base.train_once(short_recipe(), seed, frozenset(), progress=lambda _: None)
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    assert torch.equal(weights(4), weights(4))
    assert not torch.equal(weights(4), weights(5))


def test_a_base_trained_for_four_steps_is_refused_and_says_why():
    lines = []
    with pytest.raises(RuntimeError, match=r"no demo base passed.*seed 2: .*greedy_accuracy is 0,"):
        base.train_base(short_recipe(), seed=1, tries=2, measure_on=10, progress=lines.append)
    assert sum("refused" in line for line in lines) == 2


# Files


def test_make_tiny_writes_what_it_says_and_reuses_it(tmp_path, questions):
    out = tmp_path / "new" / "world"
    world = tiny.make_tiny(out)
    for path, part in zip((world.train_path, world.test_path), questions, strict=True):
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        solutions = [row.pop("solution") for row in rows]
        assert rows == [{"id": q.id, "question": q.text, "answer": q.answer} for q in part]
        # Four words a step, of which the last says the result.
        steps = [len(re.findall(" [A-E]", q.text)) for q in part]
        assert [len(re.findall(r" [A-E][+-][a-z]+\d\d", text)) for text in solutions] == steps
        assert [text[-1] for text in solutions] == [q.answer for q in part]
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert tiny.make_tiny(out) == world
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    assert list(out.parent.iterdir()) == [out]


def test_make_tiny_fills_an_empty_directory(tmp_path):
    assert tiny.make_tiny(tmp_path).base_dir == tmp_path / "base"


def test_make_tiny_never_touches_a_directory_that_differs(tmp_path):
    world = tiny.make_tiny(tmp_path / "world")
    out = world.base_dir.parent
    with pytest.raises(ValueError, match="holds a demo base, asked for common"):
        tiny.make_tiny(out, base="common")
    with pytest.raises(ValueError, match=r"of seed \d+, asked for 70; remove"):
        tiny.make_tiny(out, from_scratch=True, seed=70)
    world.train_path.write_text("mine", encoding="utf-8")
    with pytest.raises(ValueError, match=r"train.jsonl is not the tiny world's"):
        tiny.make_tiny(out)
    world.train_path.unlink()
    with pytest.raises(ValueError, match=r"no complete tiny world: no train.jsonl"):
        tiny.make_tiny(out)
    assert not world.train_path.exists()
    with pytest.raises(
        ValueError, match="unknown tiny base 'dmeo'; choose one of demo, stated, common, "
    ):
        tiny.make_tiny(out, base="dmeo")


def test_a_world_that_cannot_be_written_is_refused_in_words(tmp_path):
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    with pytest.raises(ValueError, match=r"cannot write the tiny world .*/file/x: .*; give a dir"):
        tiny.make_tiny(tmp_path / "file" / "x")
    assert (tmp_path / "file").read_text(encoding="utf-8") == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_an_interrupted_make_leaves_nothing_behind(tmp_path):
    def interrupt(line):
        assert "phase 1, step 1/" in line
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tiny.make_tiny(tmp_path / "world", from_scratch=True, progress=interrupt)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.timeout(1800)  # trains a base and two runs: three minutes of a quiet core
def test_the_guard_of_robust_holds_where_a_teacher_states_the_answer(tmp_path):
    """The thoughts that only state it have U near 0 and the shortest length: without the guard the
    student learns to state what it cannot know."""
    world = tiny.make_tiny(tmp_path / "world", base="stated")
    accuracy = {}
    for guard in ("counterfactual", "none"):
        settings = {
            "run.dir": tmp_path / guard,
            "model.path": world.base_dir,
            "data.train": world.train_path,
            "eval.data": f"[{world.test_path}]",
            "eval.greedy": "false",
            "objective.leak_guard": guard,
        }
        words = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
        assert fit(config.load(TINY, words))
        results = json.loads((tmp_path / guard / "eval.json").read_text(encoding="utf-8"))
        accuracy[guard] = results["after"]["sampled"]["acc"]
    # Measured: 0.98 and 0.10, of 0.92 before.
    assert accuracy["counterfactual"] >= 0.8
    assert accuracy["none"] < 0.3
