"""benchmarks/page_numbers.py: every number of the pages is that of a committed result."""

import importlib
import json
from pathlib import Path

import pytest

pytestmark = pytest.mark.around
ROOT = Path(__file__).parents[1]
README, BOOK = "README.md", "benchmarks/page_numbers.yaml"
RESULT = "benchmarks/results/tiny_demo.json"
PAGE = f"""# A page of numbers

<!-- table: python benchmarks/objective_bench.py --table {RESULT} -->
Three such runs took 54 to 83 s, and
eps3 is of 400 questions ([arXiv 2605.11019](https://arxiv.org/abs/2605.11019)).

1. A rate of 5e-4 is for 8 GPUs, as `--rate 4` says.

```bash
vpgea train --steps 60
```
"""
BINDINGS = """
names:
  mine: runs(tiny_demo, "demo (robust, beta 1)", 5e-4)
pages:
  README.md:
    bound:
      - "{word(len(mine)).capitalize()} such runs took {min(run.wall_s for run in mine):.0f} to
        {max(run.wall_s for run in mine):.0f} s"
      - of {same(run.before.sampled.benchmarks.test.n for run in tiny_demo.runs)} questions
      - rate of {short(mine[0].lr)} is
    allowed:
      for 8 GPUs: what it is made for
with_changes: {}
"""


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("page_numbers")


@pytest.fixture
def tree(tmp_path, bench):
    """A page of numbers and its result, to be changed."""
    (tmp_path / RESULT).parent.mkdir(parents=True)
    (tmp_path / RESULT).write_bytes((ROOT / RESULT).read_bytes())
    (tmp_path / BOOK).write_text(BINDINGS, encoding="utf-8")
    (tmp_path / README).write_text(PAGE, encoding="utf-8")
    bench.write(tmp_path)
    return tmp_path


def change(tree, name, old, new):
    """Once, and in what was there."""
    text = (tree / name).read_text(encoding="utf-8")
    assert text.count(old) == 1, (name, old)
    (tree / name).write_text(text.replace(old, new), encoding="utf-8")


UNKNOWN = "the commits of the results are not looked up: needs the whole history of the repository"


def test_every_number_of_the_pages_is_that_of_its_result(bench):
    assert bench.problems() == []
    if not bench.history_of(ROOT):
        pytest.skip(f"each number is held, but {UNKNOWN}")


def test_the_commits_of_the_results_are_looked_up(bench):
    if not (history := bench.history_of(ROOT)):
        pytest.skip(UNKNOWN)
    result = json.loads((ROOT / RESULT).read_text(encoding="utf-8"))
    assert list(bench.origin_problems("r", result, False, history)) == []
    result["environment"]["commit"] = "0" * 40
    (said,) = bench.origin_problems("r", result, False, history)
    assert said == f"r.json is of commit {'0' * 40}, which does not lead to this tree"


def test_a_stage_of_another_commit_says_its_versions(bench):
    result = json.loads((ROOT / RESULT).read_text(encoding="utf-8"))
    facts = result["environment"]
    result["stages"] = {"a": {"commit": facts["commit"]}, "b": {"commit": "1" * 40}}
    (said,) = bench.origin_problems("r", result, False, set())
    assert said == "r.json: stage b is of another commit, and has no versions"
    result["stages"]["b"]["environment"] = facts
    assert list(bench.origin_problems("r", result, False, set())) == []


@pytest.mark.parametrize(
    ("name", "old", "new", "said"),
    [
        # a digit of the text
        (README, "took 54 to 83 s", "took 54 to 84 s", "took 54 to 83 s': ValueError: is 0 times"),
        (README, "took 54 to 83 s", "took 54 to 83.5 s", "took 54 to 83 s': ValueError: is 0"),
        (README, "Three such", "Four such", "'Three such runs took 54 to 83 s'"),
        (README, "of 400 questions", "of 4000 questions", "'of 400 questions'"),
        (README, "rate of 5e-4", "rate of 5e-5", "'rate of 5e-4 is'"),
        (README, "of 400 questions", "of 400 questions of 400 questions", "is 2 times on the page"),
        # a digit of a table, of its head; a row less; its command
        (README, "20.8 | 134 → 459", "20.9 | 134 → 459", "README.md: not the table of 'python"),
        (README, "runs, of 12 |", "runs, of 13 |", "README.md: not the table of 'python"),
        (README, "| GRPO with", "GRPO with", "README.md: not the table of 'python"),
        # a number that nobody bound
        (README, "such runs", "such 9 runs", "9 has no source; bind it or allow it in bench"),
        (README, "# A page", "# A page of 3.5x,", "README.md:1: 3.5x has no source"),
        (README, "eps3 is", "eps3 is 5 %", "README.md:11: 5 has no source"),
        (README, "eps3 is", "eps3 is a\n7. It is", "README.md:12: 7 has no source"),
        (README, "```bash", "```text", "README.md:16: 60 has no source"),
        # a number that is allowed: another one, more than once, none
        (README, "for 8 GPUs", "for 9 GPUs", "'for 8 GPUs' (what it is made for): is 0 times"),
        (README, "for 8 GPUs", "for 8 GPUs or for 8 GPUs", "made for): is 2 times"),
        # a result
        (RESULT, '"wall_s": 82.8', '"wall_s": 88.8', "took 54 to 89 s"),
        (RESULT, '"short_runs": 10,', '"short_runs": 11,', "README.md: not the table of 'python"),
        (RESULT, '"command": "python benchmarks/objective_bench.py --out', '"it": "', "no command"),
        (RESULT, '  "torch": "2.13.0+cpu"', '  "torch": null', "tiny_demo.json has no torch"),
        # a binding: of nothing, of a literal number, of a constant, with a mistake
        (BOOK, "questions", "answers", "'of 400 answers': ValueError: is 0 times"),
        (BOOK, "of {same", "of 400 or {same", "expected each number as a field"),
        (BOOK, "{short(mine[0].lr)}", "5e-4", "expected each number as a field"),
        (BOOK, "{short(mine[0].lr)}", "{short(5e-4)}", "{short(0.0005)} reads no result"),
        (BOOK, "{short(mine[0].lr)}", "{mine[0].rate}", "KeyError: 'rate'"),
        (BOOK, "{short(mine[0].lr)}", "{mine[0].}", "SyntaxError"),
        (BOOK, "(run.before.sampled.benchmarks.test.n", "(run.seed", "expected equal values"),
        (BOOK, "    allowed:", "    other:", "README.md: not every number is looked at"),
        (BOOK, "changes: {}", "changes: {tiny_demo: no}", "'afb1d6180d8aaef0bb1070da9d647847d3b8"),
    ],
)  # fmt: skip
def test_a_change_is_found(bench, tree, name, old, new, said):
    change(tree, name, old, new)
    found = bench.problems(tree)
    assert [line for line in found if said in line], found
    assert not [line for line in found if "\n" in line]


def test_a_name_that_cannot_be_read_is_one_line(bench, tree):
    change(tree, BOOK, "mine: runs(tiny_demo", "mine: runs(small_demo")
    with pytest.raises(SystemExit, match=r"page_numbers.yaml: mine: NameError: .*small_demo"):
        bench.problems(tree)


def test_a_table_is_written_again(bench, tree):
    assert bench.problems(tree) == []
    before = (tree / README).read_text(encoding="utf-8")
    change(tree, README, "20.8 | 134 → 459", "20.9 | 134 → 450")
    bench.write(tree)
    assert (tree / README).read_text(encoding="utf-8") == before


def test_one_table_of_several_is_taken_by_its_heading(bench, tree, monkeypatch):
    (tree / "printing").mkdir()
    (tree / "printing/two_tables.py").write_text(
        'def main(words):\n    print("### a\\n\\n| 1 |\\n|---|\\n| 2 |\\n\\n### b, c\\n\\n| 3 |")\n'
    )
    monkeypatch.syspath_prepend(str(tree / "printing"))
    command = "python benchmarks/two_tables.py"
    assert bench.printed(tree, f"{command} # a") == "| 1 |\n|---|\n| 2 |\n"
    assert bench.printed(tree, f"{command} # b, c") == "| 3 |\n"
    for title in ("", " # b"):
        with pytest.raises(SystemExit, match=r"two_tables.py.*: it prints no such table"):
            bench.printed(tree, command + title)


def test_a_page_that_comes_needs_all_its_sources(bench, tree):
    (tree / "docs").mkdir()
    (tree / "docs/replication.md").write_text("It takes 5 hours.\n", encoding="utf-8")
    (said,) = bench.problems(tree)
    assert said.startswith("docs/replication.md: not every number is looked at; give it `allowed`")
    change(tree, BOOK, "pages:\n", "pages:\n  docs/replication.md: {allowed: {}}\n")
    (said,) = bench.problems(tree)
    assert said.startswith("docs/replication.md:1: 5 has no source")


def test_the_command_says_whether_all_is_held(bench, tree, capsys, monkeypatch):
    monkeypatch.setattr(bench.problems, "__defaults__", (tree,))
    for status, said in ((0, "every number is that of its result\n"), (1, "README.md:1: 7 has")):
        with pytest.raises(SystemExit) as ended:
            bench.main([])
        assert ended.value.code == status
        assert capsys.readouterr().out.startswith(said)
        change(tree, README, "# A page", "# A page of 7")


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("eps3 of sm_90 and DeepSeek-R1-Distill-Qwen-7B, H200", []),
        ("Qwen-8B, top-5, best-of-32", ["8B", "5", "32"]),
        ("3 of 11,520, 1.1e-6, 33 %.", ["3", "11,520", "1.1e-6", "33"]),
        ("1.5B-7B, 2605.11019", ["1.5B-7B", "2605.11019"]),
        ("| 92.2 → 97.8 | −4 | +3.5", ["92.2", "97.8", "4", "3.5"]),
        ("`--rate 5` ([arXiv 2605.11019](https://a.b/2605.11019))\n\n1. <!-- 3 --> `4`", []),
        ("```bash\nstep 60\n```\n8\n```text\nstep 9\n```\n```\n10\n```", ["8", "9"]),
        ("1. a\n2. b, of\n4. It\n\n   more\n\n3. c\n   1. d", ["4", "1"]),
        ("# A\n1. a\n\nText of\n2. Two\n\n2. And", ["2", "2"]),
        ("It is about\n400. A sentence,\n1. one", ["400", "1"]),
    ],
)
def test_what_is_a_number(bench, text, numbers):
    assert bench.NUMBER.findall(bench.looked_at(text)) == numbers


def test_small_numbers_are_written_as_people_write_them(bench):
    assert [bench.short(x) for x in (5e-4, 2.5e-4, 6.25e-5, 1)] == "5e-4 2.5e-4 6.25e-5 1e0".split()
    assert bench.short(1.1308e-6, 2) == "1.1e-6"
