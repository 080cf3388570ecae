"""Where a text stands in tokens: against the bytes of a real byte-level BPE, and in a run."""

import collections
import itertools
import json
import random
from pathlib import Path
from typing import Any

import chat_models
import pytest
from batches import sampled
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from vpgea_fast import config
from vpgea_fast.objectives.guards import EARLY
from vpgea_fast.spans import Tag, stated, tokens_before, tokens_holding
from vpgea_fast.trainer import Trainer

TINY = Path(__file__).parents[1] / "configs/tiny.yaml"
TEXTS = [
    "Half of it is \\frac{1}{2}, so the answer is \\frac{1}{2}. I take x+1, not 2x+1.",
    "The capital is Paris; Parisians say 12, 120 and 3.12. Option (B), not AB. Größe √2 → 日本 🙂.",
]


def bpe(vocabulary: int, texts: list[str]) -> Any:
    tokenizer = chat_models.trained_bpe(texts, vocabulary)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


BYTE_OF = {c: i for i, c in chat_models.BYTE_LETTERS.items()}


def ends_in_bytes(tokenizer, ids):
    """Bytes of the text after each token, of the vocabulary alone."""
    ends, total = [], 0
    for token in tokenizer.convert_ids_to_tokens(ids):
        total += len(bytes(BYTE_OF[c] for c in token))
        ends.append(total)
    return ends


@pytest.mark.parametrize("vocabulary", [256, 300, 420])
def test_a_character_of_the_text_ends_where_its_last_byte_does(vocabulary):
    tokenizer = bpe(vocabulary, TEXTS)
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        ends = ends_in_bytes(tokenizer, ids)
        assert ends[-1] == len(text.encode())
        for place in range(len(text)):
            start, end = len(text[:place].encode()), len(text[: place + 1].encode())
            first = next(n for n, e in enumerate(ends, 1) if e >= end)
            assert tokens_holding(ids, tokenizer.decode, text, place + 1) == first, place
            before = sum(e <= start for e in ends)
            assert tokens_before(ids, tokenizer.decode, text, place) == before, place
        assert tokens_holding(ids, tokenizer.decode, text, 0) == 0


def test_ids_that_are_no_text_end_somewhere():
    """Drawn bytes need not be UTF-8."""
    tokenizer, rng = bpe(300, TEXTS), random.Random(0)
    for _ in range(200):
        ids = [rng.randrange(len(tokenizer)) for _ in range(30)]
        text = tokenizer.decode(ids)
        end = rng.randrange(1, len(text) + 1)
        count = tokens_holding(ids, tokenizer.decode, text, end)
        assert tokenizer.decode(ids[:count]).startswith(text[:end])
        assert not tokenizer.decode(ids[: count - 1]).startswith(text[:end])
        assert text.startswith(
            tokenizer.decode(ids[: tokens_before(ids, tokenizer.decode, text, end - 1)])
        )


WHOLE = {
    ("7", "it is 7."): "7",
    ("7", "(7)"): "7",
    ("7", "\\boxed{7}"): "7",
    ("7", "10-7 is 3"): "7",
    ("7", "5 - 7"): "7",
    ("7", "答案是7。"): "7",
    ("7", "17 or 71 or 7.5 or 3.7 or 7,000 or -7 or x=-7 or 7x or x7"): None,
    ("7", "-7"): None,
    ("12", "a\n-12"): None,
    ("-7", "5-7"): None,
    ("-7", "x = -7."): "-7",
    ("0.5", "10.5 and .5"): None,
    ("x+1", "2x+1, x+12"): None,
    ("x+1", "so x+1."): "x+1",
    ("Paris", "Parisians"): None,
    ("B", "ABBA_B"): None,
    ("B", "option (B)"): "B",
    ("New York", "New\nYork"): "New\nYork",
    ("\\frac{1}{2}", "is \\frac{1}{2}x"): "\\frac{1}{2}",
    ("", "anything"): None,
}


@pytest.mark.parametrize(("answer", "text"), WHOLE)
def test_an_answer_stands_as_a_whole_word_or_number(answer, text):
    found = stated(text, str, [answer])
    assert (found and text[slice(*found)]) == WHOLE[answer, text]


def test_inside_others_where_asked_and_in_any_spelling():
    assert stated("A+three47", str, ["7"], whole=False) == (8, 9)
    assert stated("A+three47", str, ["7"]) is None
    assert stated("is 0.5, or 1/2", str, ["1/2", "0.5"]) == (3, 6)
    assert stated("is \\frac12", str, ["1/2", "\\frac12"]) == (3, 10)


# --- the tag that ends a thought ------------------------------------------------------------------

END = "<|end_of_thought|>"
MARKED = [
    f"Then 7 + 5 is 12.{END}\n\n**Final**",
    f"{END}{END}",
    "<|end_of",
    "é🙂<|",
    "|>\n\\boxed{1}",
]


def first_boundary(tokenizer, ids, tag):
    """By definition: token by token, all that was decoded so far."""
    holding = (n for n in range(1, len(ids) + 1) if tag in tokenizer.decode(ids[:n]))
    return next(holding, 0)


def pieces_of(text: str, cuts) -> list[str]:
    """The bytes of a text between these places, as tokens of a byte-level vocabulary."""
    letters = [chat_models.BYTE_LETTERS[byte] for byte in text.encode()]
    return ["".join(letters[a:b]) for a, b in itertools.pairwise([0, *cuts, len(letters)])]


def every_cut(text: str, most: int):
    """Every set of at most `most` places between the bytes of a text."""
    places = range(1, len(text.encode()))
    for count in range(most + 1):
        yield from itertools.combinations(places, count)


@pytest.mark.parametrize("vocabulary", [256, 300, 420])
def test_a_thought_ends_at_the_first_token_with_which_its_text_holds_the_tag(vocabulary):
    """1,000 texts of random pieces, some of which hold the tag, most of them in pieces."""
    tokenizer, rng = bpe(vocabulary, [*TEXTS, *MARKED]), random.Random(vocabulary)
    assert len(tokenizer(END)["input_ids"]) > 1 or vocabulary > 256
    tag, found = (
        Tag(END, tuple(tokenizer(END)["input_ids"]), tokenizer.decode),
        collections.Counter(),
    )
    pieces = [END[:i] for i in range(1, len(END))] + [END[i:] for i in range(len(END))]
    for _ in range(1000):
        some = rng.choices([*pieces, *MARKED, "a", " and ", "é", "🙂", "\n"], k=rng.randint(1, 9))
        ids = [token for piece in some for token in tokenizer(piece)["input_ids"]]
        if rng.random() < 0.3:  # drawn tokens need not be UTF-8
            ids.insert(rng.randrange(len(ids) + 1), rng.randrange(len(tokenizer)))
        first = first_boundary(tokenizer, ids, END)
        assert tag.end(ids) == first
        # As an engine sees them come, whenever it looks.
        since = rng.randrange(first) if first else rng.randrange(len(ids) + 1)
        assert tag.end(ids, since) == first
        found[bool(first)] += 1
    assert min(found[True], found[False]) > 200


@pytest.mark.parametrize(("text", "most"), [("</t>é", 5), (END, 3)])
def test_a_tag_is_found_wherever_its_tokens_break(text, most):
    """Every cut between its bytes, within letters too; the token that ends it may go on behind, and
    the one that begins it may have begun before."""
    ways = [
        pieces_of(before + text + behind, [len(before.encode()) + cut for cut in cuts])
        for before, behind in [("", ""), ("é", ""), ("<", "\n\n"), ("", "é"), ("", ">")]
        for cuts in every_cut(text, most)
    ]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(t for way in ways for t in way))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.decoder = decoders.ByteLevel()
    tag = Tag(text, (), tokenizer.decode)
    size, boundaries = len(text.encode()), collections.Counter()
    for way in ways:
        ids = [vocabulary[token] for token in way]
        ends = list(itertools.accumulate(map(len, way)))
        start = (
            "".join(chr(BYTE_OF[c]) for token in way for c in token)
            .encode("latin-1")
            .index(text.encode())
        )
        # By bytes: the first token with which all of the tag's are there.
        first = next(n for n, end in enumerate(ends, 1) if end >= start + size)
        assert tag.end(ids) == tag.end(ids, first - 1) == first
        assert tag.end(ids[: first - 1]) == 0
        boundaries.update(end - start for end in ends)
    assert {*range(1, size)} <= boundaries.keys()


# --- in a run -------------------------------------------------------------------------------------

THOUGHTS = {
    "\\frac{1}{2}": "One of two is \\frac{1}{2} then",
    "x+1": "2x+1 less x is x+1, and that is all there is to it",
    "Paris": "Parisians live in Paris.",
    "12": "120 is no use: 12.",
    "B": "AB is none; option (B).",
    "0.25": "a quarter is 1/4 of it",
}


@pytest.fixture
def scored_thoughts(r1_model_dir, tmp_path):
    """Score thoughts of a model with a byte-level BPE by an objective; the batch, and the texts."""

    def score(*more):
        rows = [
            {
                "id": answer,
                "question": "Which?",
                "answer": answer,
                "others": ["1/4"] * (answer[0] == "0"),
            }
            for answer in THOUGHTS
        ]
        file = tmp_path / "train.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        words = ["--run.dir", str(tmp_path / "run"), "--model.path", r1_model_dir]
        words += ["--data.train", str(file), "--data.variants_key", "others", "--eval.data", "[]"]
        words += ["--prompt.answer_words", "true", "--prompt.think_prefix", "<think>\n"]
        words += ["--verify.name", "text", "--data.max_prompt_tokens", "200", "--eval.every", "0"]
        words += ["--train.questions_per_step", str(len(rows))]
        words += ["--objective.group_size", "2", "--rollout.max_new_tokens", "60", *more]
        with Trainer(config.load(TINY, words)) as trainer:
            collector = trainer.stages.collector
            decode, tokenizer = collector.decode, trainer.stages.intake.text.tokenizer
            questions, groups = trainer.stages.intake.questions, {}
            for stream, _, count in collector.draws.plan[:2]:
                groups[stream] = tuple(
                    tuple(
                        sampled(
                            tokenizer(THOUGHTS[q.question.id] + "</think>")["input_ids"],
                            question_id=q.question.id,
                            stream=stream,
                            index=i,
                        )
                        for i in range(count)
                    )
                    for q in questions
                )
            batch = collector.score(questions, groups["posterior"], groups["prior"], step=0)
        return batch, decode

    return score


def test_lc_r1_finds_every_answer_among_the_tokens_of_a_thought(scored_thoughts):
    batch, decode = scored_thoughts(
        "--objective.name", "drgrpo", "--objective.length_reward", "lc_r1"
    )
    for (question, path), end in zip(
        batch.pairs("prior"), batch.prior.stated_BP.flatten().tolist(), strict=True
    ):
        answer, text = question.question.answer, THOUGHTS[question.question.id]
        spelled = "1/4" if answer == "0.25" else answer
        upto = text[: text.rindex(spelled) + len(spelled)]
        assert decode(path.z_ids[:end]).startswith(upto)
        assert not decode(path.z_ids[: end - 1]).startswith(upto)
    terms = config.resolve(
        {
            "objective": {"name": "drgrpo", "group_size": 2, "length_reward": "lc_r1"},
            "rollout": {"full_answer": True},
        }
    ).objective.terms(batch, {})
    assert terms.parts[0].close_BP is not None


def test_an_early_answer_is_cut_before_its_first_token(scored_thoughts):
    batch, decode = scored_thoughts("--objective.leak_guard", "early_answer")
    found = {}
    for question, path in batch.pairs("posterior"):
        answer, text = question.question.answer, THOUGHTS[question.question.id]
        start = text.rindex("1/4" if answer == "0.25" else answer)
        before = max(n for n in range(len(path.z_ids)) if len(decode(path.z_ids[:n])) <= start)
        found[answer] = 2 * before < len(path.z_ids)
        assert batch.logps[EARLY][path.key].numel() == found[answer], answer
    assert {*found.values()} == {True, False}


def test_nobody_looks_for_the_answer_unasked(scored_thoughts):
    batch, _ = scored_thoughts("--objective.name", "drgrpo")
    assert batch.prior.stated_BP is None
    assert batch.posterior.stated_BP is None
