"""The second tiny task and the other bases: right thoughts in every style, rows as the docs say."""

import json
import math
import random
import re
from collections import Counter
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from math_verify import parse, verify

from vpgea_fast import tiny
from vpgea_fast.tiny import base, recipes, task
from vpgea_fast.tiny.lookup import LOOKUP
from vpgea_fast.types import Question

ROOT = Path(__file__).parents[1]
RARE = recipes.RECIPES["lookup-rare"]
FLAWLESS = replace(RARE.corpus, slip=0.0)
SEEDS = st.integers(0, 10**9)


@pytest.fixture(scope="module")
def tokenizer():
    return LOOKUP.make_tokenizer()


def visited(text):
    """The digits on the way, by hand: the table read as pairs, a look per label."""
    pairs, asked = text.split(" at")
    table, way = dict(pairs.split()), [asked[0]]
    for _ in re.findall("[A-E]", asked):
        way.append(table[way[-1]])
    return way


def test_questions_are_right_distinct_and_always_the_same():
    train, test = LOOKUP.question_sets()
    assert (len(train), len(test)) == (4096, 800)
    assert len({question.text for question in (*train, *test)}) == 4896
    for question in (*train, *test):
        way = visited(question.text)
        assert question.answer == way[-2] + way[-1]
        assert len(set(way)) == len(way)
        assert 3 <= len(way) <= 6
        # A number of two digits: no other answer is equal to it.
        assert "0" not in question.text
    assert LOOKUP.question_sets() == (train, test)
    assert {len(visited(q.text)) for q in test} == {3, 4, 5, 6}


def test_the_verifier_wants_both_digits_in_their_order():
    said = {"47": True, "74": False, "4": False, "7": False, "48": False}
    for answer, right in said.items():
        assert verify(parse("$47$"), parse(task.ANSWER.format(answer=answer))) is right


@given(SEEDS)
def test_each_style_states_the_lookups_and_ends_on_the_answer(seed):
    rng = random.Random(seed)
    text = LOOKUP.random_question(rng)
    way = visited(text)
    hops = [f" {label}{a}{b}" for label, a, b in zip("ABCDE", way, way[1:], strict=False)]
    concise = "".join(hops) + "</think>"
    assert "".join(LOOKUP.shortest_thought(text)) == concise
    bare = [hop[:2] + hop[3] for hop in hops[1:]]
    assert "".join(LOOKUP.shortest_thought(text, "terse")) == hops[0] + "".join(bare) + "</think>"
    words, answer = LOOKUP.sample_thought(text, rng, FLAWLESS, style="verbose")
    first_pass = re.sub(r" check.*(?=</think>)", "", "".join(words))
    assert re.sub(r" wait [A-E]\d\d| ok| hmm", "", first_pass) == concise
    assert answer == way[-2] + way[-1]


@given(SEEDS, st.sampled_from(["verbose", "concise", "terse"]))
def test_a_slip_is_carried_on_and_answered(seed, style):
    rng = random.Random(seed)
    text = LOOKUP.random_question(rng)
    slippery = replace(RARE.corpus, slip=0.5, check=0.0)
    words, answer = LOOKUP.sample_thought(text, rng, slippery, style=style)
    # The last value that is stated under each label.
    last = {label: digits[-1] for label, digits in re.findall(r" ([A-E])(\d+)", "".join(words))}
    values = [visited(text)[0], *last.values()]
    assert answer == values[-2] + values[-1]
    if style != "terse":
        hops = re.findall(r" ([A-E])(\d)\d", "".join(words))
        assert all(key == values["ABCDE".index(label)] for label, key in hops)


def test_every_word_is_one_token_and_texts_survive(tokenizer):
    for word in (*LOOKUP.words, *task.WORDS, *task.DIGITS[1:], *task.SPECIAL, "{"):
        assert len(task.text_ids(tokenizer, word)) == 1
    rng = random.Random(7)
    for _ in range(300):
        text = LOOKUP.random_question(rng)
        style: task.Style = rng.choice(["verbose", "concise", "terse"])
        thought, answer = LOOKUP.sample_thought(text, rng, RARE.corpus, style=style)
        assert len(task.text_ids(tokenizer, "".join(thought))) == len(thought)
        whole = f"{text}<think>{''.join(thought)}{task.ANSWER.format(answer=answer)}</s>"
        assert tokenizer.decode(task.text_ids(tokenizer, whole)) == whole
    # Cue, target and end, which scoring tokenises apart.
    parts = ("</think>", "\\boxed", "{47 }", "</s>")
    answer = task.text_ids(tokenizer, "</think>" + task.ANSWER.format(answer=47) + "</s>")
    assert answer == [i for part in parts for i in task.text_ids(tokenizer, part)]


def test_thoughts_of_the_corpus_hold_the_shares_that_the_docs_state():
    rng, seen, count, corpus = random.Random(5), Counter(), Counter(), RARE.corpus
    for number in range(6000):
        text = LOOKUP.random_question(rng)
        question = Question(id="", text=text, answer=LOOKUP.solve(text))
        view = ("student", "teacher")[number % 2]
        style, words, said = base.sample_thought(rng, RARE, question, view)
        asked, stated = len(visited(text)) - 1, len({w for w in words if w in task.LABELS})
        count[view] += 1
        if view == "teacher":
            assert said == question.answer
            seen["stated"] += style is None and words == [" hint", *said, "</think>"]
            seen["silent"] += 0 < stated < asked
            seen["terse"] += style == "terse"
            seen["concise"] += style == "concise"
        elif asked == 5:
            count["longest"] += 1
            seen["hurry"] += stated == 4
        else:
            assert stated == asked
    walked = 1 - corpus.teacher_stated
    short = walked * corpus.teacher_concise
    wanted = {
        "stated": (corpus.teacher_stated, count["teacher"]),
        "silent": (walked * corpus.teacher_leak, count["teacher"]),
        "terse": (short * corpus.teacher_terse, count["teacher"]),
        "concise": (short * (1 - corpus.teacher_terse), count["teacher"]),
        "hurry": (corpus.hurry, count["longest"]),
    }
    for name, (share, rows) in wanted.items():
        error = math.sqrt(share * (1 - share) / rows)
        assert seen[name] / rows == pytest.approx(share, abs=3.5 * error), name


def test_both_decisions_of_a_student_weigh_what_the_recipe_wants(tokenizer):
    recipe = replace(RARE, student_concise=0.2, student_terse=0.1)
    rng, total, rare = random.Random(11), [0.0, 0.0], [0.0, 0.0]
    for _ in range(2000):
        row = base.sample_row(rng, recipe, tokenizer, frozenset(), pinned=True)
        wanted = (recipe.student_concise, recipe.student_terse)
        for number, pin in enumerate(row.pins):
            if pin.probability == wanted[number]:
                # A slip makes another digit of the same decision: the terse one has no key.
                total[number] += row.weight[pin.index]
                rare[number] += row.weight[pin.index] * (row.ids[pin.index] == pin.token)
    assert rare[0] / total[0] == pytest.approx(0.2, rel=0.2)
    assert rare[1] / total[1] == pytest.approx(0.1, rel=0.35)


@pytest.mark.parametrize("style", ["concise", "terse"])
def test_the_probability_of_a_style_is_the_product_of_its_tokens(style, tokenizer):
    model, some, expected = base.make_model(3, len(tokenizer)), LOOKUP.question_sets()[1][:4], 0.0
    for question in some:
        ids, logp = task.prompt_ids(tokenizer, question, "teacher"), 0.0
        for token in task.text_ids(
            tokenizer, "".join(LOOKUP.shortest_thought(question.text, style))
        ):
            next_logp = model(torch.tensor([ids])).logits[0, -1].double().log_softmax(-1)
            logp += next_logp[token].item()
            ids = [*ids, token]
        expected += math.exp(logp) / len(some)
    got = base.style_probability(LOOKUP, model, tokenizer, some, "teacher", style)
    assert got == pytest.approx(expected, rel=1e-3)


def test_a_strict_corpus_has_one_verbose_length_and_nothing_between():
    """All thoughts over a question are as long, unless they are concise."""
    strict, rng = recipes.RECIPES["strict"], random.Random(1)
    chain = recipes.TASKS[strict.task]
    for _ in range(100):
        text = chain.random_question(rng)
        steps = len(chain.parse(text)[1])
        thoughts = (
            chain.sample_thought(text, rng, strict.corpus, style="verbose") for _ in range(5)
        )
        assert {len(words) for words, _ in thoughts} == {steps * (4 + 5 + 2) + 1 + steps * 4 + 1}


def test_the_first_phase_is_shared_and_changes_nothing():
    """A base is the same whether another recipe with the same first phase went before or not."""
    phases = (recipes.Phase(2, 1e-3, pinned=False), recipes.Phase(2, 1e-3, pinned=True))
    one, two = (
        replace(recipes.RECIPES[name], phases=phases, batch=4) for name in ("demo", "chain-1e-3")
    )
    lines = []
    base.first_phase.cache_clear()
    base.train_once(one, 4, frozenset(), lines.append)
    after = base.train_once(two, 4, frozenset(), lines.append)
    base.first_phase.cache_clear()
    alone = base.train_once(two, 4, frozenset(), lines.append)
    assert all(
        torch.equal(a, b) for a, b in zip(after.parameters(), alone.parameters(), strict=True)
    )
    # Three second phases and two first ones.
    assert [line.split(",")[1] for line in lines].count(" phase 1") == 2


@pytest.mark.slow
@pytest.mark.timeout(1800)  # three minutes of a quiet core
def test_the_rare_lookup_base_passes_its_gate(tmp_path):
    world = tiny.make_tiny(tmp_path / "world", base="lookup-rare")
    assert base.gate_failures(world.report, RARE.gate) == []
    assert tiny.make_tiny(tmp_path / "world", base="lookup-rare") == world


def test_the_page_says_what_was_measured():
    page = (ROOT / "docs/tasks.md").read_text(encoding="utf-8")
    rows = json.loads((ROOT / "benchmarks/results/tiny_bases.json").read_text(encoding="utf-8"))
    assert {"lookup-rare", "lookup-common"} <= set(rows)
    for name, row in rows.items():
        known = {field.name: row[field.name] for field in fields(base.BaseReport)}
        assert base.gate_failures(base.BaseReport(**known), recipes.RECIPES[name].gate) == []
        styles = ["concise_student", "concise_teacher", "terse_student", "terse_teacher"]
        cells = [f"{row[key]:.2g}" if row[key] else "-" for key in styles]
        shares = [row[f"{kind}_accuracy"] for kind in ("greedy", "forced", "sampled")]
        cells += [f"{100 * share:.1f} %" for share in shares]
        cells += [f"{row['sampled_tokens']:.1f}", f"{100 * row['shorter']:.2f} %"]
        assert f"| `{name}` | {' | '.join(cells)} |" in page
    for name in ("demo", "strict"):
        assert f"* `{name}`: {100 * rows[name]['tenth']:.1f} % of 4,000" in page
