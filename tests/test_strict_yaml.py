"""YAML 1.2 as it is specified, and nothing lost on the way."""

import datetime
import math
import string

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from vpgea_fast.strict_yaml import YamlError, dump, parse, parse_word

# Word -> what the core schema of YAML 1.2 makes of it (section 10.3.2), and what PyYAML does, which
# follows 1.1.
WORDS = {
    "yes": ("yes", True),
    "no": ("no", False),
    "on": ("on", True),
    "Off": ("Off", False),
    "true": (True, True),
    "False": (False, False),
    "010": (10, 8),
    "-010": (-10, -8),
    "0o17": (15, "0o17"),
    "0x1F": (31, 31),
    "0b11": ("0b11", 3),
    "1_000": ("1_000", 1000),
    "1:30": ("1:30", 90),
    "1.5:30": ("1.5:30", "1.5:30"),
    "1e-6": (1e-6, "1e-6"),
    "5E3": (5000.0, "5E3"),
    ".5": (0.5, 0.5),
    "1.": (1.0, 1.0),
    "-.inf": (-math.inf, -math.inf),
    "inf": ("inf", "inf"),
    "2026-01-02": ("2026-01-02", datetime.date(2026, 1, 2)),
    "~": (None, None),
    "NULL": (None, None),
    "~/x": ("~/x", "~/x"),
    "=": ("=", None),
    "+1": (1, 1),
    "e5": ("e5", "e5"),
    ".": (".", "."),
    "'1'": ("1", "1"),
    '"no"': ("no", "no"),
}


@pytest.mark.parametrize("word", WORDS)
def test_a_word_means_what_version_1_2_says(word):
    want, by_version_1_1 = WORDS[word]
    assert parse(word) == want
    assert type(parse(word)) is type(want)
    if word != "=":  # a tag of 1.1 that PyYAML cannot construct
        assert yaml.safe_load(word) == by_version_1_1  # else the table tells no difference


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("a: 1\nb: {c: 1,\n    c: 2}\n", 3, "'c' stands twice, first in line 2"),
        ("a: 1\n\na: 1\n", 3, "'a' stands twice, first in line 1"),
        ("'a': 1\na: 2\n", 2, "'a' stands twice"),
        ("x: &x {a: 1}\ny: 2\n", 1, "got &x; write the value out"),
        ("x: 1\ny: *x\n", 2, "got *x; write the value out"),
        ("x:\n  <<: {a: 1}\n", 2, "got a merge (<<)"),
        ("x: !!python/object/apply:os.system [ls]\n", 1, "python/object/apply:os.system"),
        ("x: !!str 1\n", 1, "put text in quotes"),
        ("x: ! 1\n", 1, "got the tag '!'"),
        ("a: 1\n---\na: 2\n", 2, "another document"),
        ("a: 1\n...\n---\n", 3, "another document"),
        ("%YAML 1.1\n---\na: 1\n", 1, "read as YAML 1.2"),
        ("%TAG ! x\n---\na: 1\n", 1, "got %TAG"),
        ("%ODD\n---\na: 1\n", 1, "got %ODD"),
        ("a:\n\tb: 1\n", 2, r"found character '\t'"),
        ("a: 1\n2: 3\n", 2, "got '2' as a key"),
        ("? [a]\n: 1\n", 1, "got 'a list or mapping' as a key"),
        ("a: 1\n~: 3\n", 2, "got '~' as a key"),
        ("a: [1, [2\n", 2, "while parsing a flow sequence"),
        ("[" * 10_000, 1, "more than 16 levels"),
        ("{a: " * 10_000, 1, "more than 16 levels"),
        ("a: 1\nb: x\0y\n", 2, "U+0000"),
        ("a: 1\r\nb: x\u2028y\n", 2, "U+2028"),
        ("a: \x1b[2J\n", 1, "U+001B"),
        ('a: "\\ud83d\\ude00"\n', 1, "half a character"),
        ('a: "\\UFFFFFFFF"\n', 1, "no such character"),
        (f"%YAML {'1' * 5000}.1\n---\n", 1, "no such character or version"),
        (f"a: {'9' * 5000}\n", 1, "a number of 5000 digits"),
        ("a: 1\nb: 1e999\n", 2, "beyond float64"),
    ],
)
def test_what_would_be_lost_or_guessed_is_refused_with_its_line(text, line, said):
    with pytest.raises(YamlError) as error:
        parse(text)
    assert said in str(error.value)
    assert error.value.line == line


def test_what_is_allowed_around_one_document():
    assert parse("%YAML 1.2\n---\na: 1  # why\n...\n") == {"a": 1}
    assert parse("# nothing\n") is None
    assert parse("a:\nb: |\n  two\n  lines\n") == {"a": None, "b": "two\nlines\n"}


def test_a_comment_in_a_word_would_be_lost():
    assert parse_word("[a, b] ") == ["a", "b"]
    assert parse_word("a#b") == "a#b"
    for word in ("1 # one", "[a] # b", "'x' #"):
        with pytest.raises(YamlError, match="would be lost"):
            parse_word(word)


texts = st.one_of(
    st.sampled_from([word for word in WORDS if word != "="]),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=12),
    st.text(string.digits + "+-._:eExob~<&*!%\x85\u2028\ufeff\n\t ", max_size=8),
)
trees = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(2**63), 2**63), texts)
    | st.floats(allow_nan=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)


@given(tree=trees)
@settings(max_examples=150, deadline=None)
def test_what_is_written_is_read_back_by_both_versions(tree):
    written = dump({"a": tree})
    merges = "<<" in str(tree)  # as a key: refused here, merged by 1.1
    if not merges:
        assert parse(written) == {"a": tree}
        assert yaml.safe_load(written) == {"a": tree}
