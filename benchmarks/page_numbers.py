"""Hold the numbers of the pages to the committed results.

    python benchmarks/page_numbers.py            one line for each number that is not held
    python benchmarks/page_numbers.py --write    write the tables of the pages again, then the same

A table below `<!-- table: COMMAND -->` is what the command prints, or with `COMMAND # TITLE` the
table that it prints under this heading. All else stands in benchmarks/page_numbers.yaml:

names           name -> expression, for what several texts read
pages           page -> `bound` and `allowed`
    bound       texts of the page as f-strings; results/NAME.json is NAME, with dots for its keys
    allowed     text with numbers that are no results -> the reason. With it a page is complete:
                any other number is a problem. Code, links and NAMES hold none; a block of
                ```text does. Numbers that are spelled as words are not looked for.
with_changes    result that was made with uncommitted changes -> what is known of them
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib
import io
import json
import re
import shlex
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
BOOK = "benchmarks/page_numbers.yaml"
COMPLETE = ("README.md", "docs/demo.md", "docs/replication.md")
"""Pages, where they exist, of which each number needs a source."""
NUMBER = re.compile(r"(?<!\w)\d(?:[.,-]?\w)*")
"""Not the digits of a name: eps3, sm_90. Those of top-5 are a number."""
NAMES = ("Qwen-7B",)
"""Names with digits that would be a number."""
TABLE = re.compile(r"^(<!-- table: (.+) -->\n)((?:\|.*\n)*)", re.M)
CODE = rf"`[^`\n]*`|\b(?:{'|'.join(NAMES)})\b"
FENCE = r"^```.*?^```$"
SILENT = re.compile(rf"{FENCE}|<!--.*?-->|\]\([^)]*\)|{CODE}|arXiv \d{{4}}\.\d{{5}}", re.M | re.S)
"""What holds no results: code, names, comments, targets of links, papers."""
ITEM = re.compile(r"( *)(\d+)\. ")
WORDS = "no one two three four five six seven eight nine ten eleven twelve".split()


class Keys(dict[str, Any]):
    """An object of a JSON, with dots for its keys."""

    def __getattr__(self, name: str) -> Any:
        return self[name]


def same(values: Iterable[Any]) -> Any:
    """The one value of equal ones. ValueError where they differ."""
    first, *rest = values
    if any(value != first for value in rest):
        raise ValueError(f"got {[first, *rest]}, expected equal values")
    return first


def short(value: float, digits: int = 6) -> str:
    """A small number as people write it: 5e-4."""
    factor, exponent = f"{value:.{digits - 1}e}".split("e")
    return f"{float(factor):g}e{int(exponent)}"


def runs(result: Any, method: str, *rates: float) -> list[Any]:
    """The runs of a sweep with a method and one of these rates."""
    return [run for run in result.runs if run.method == method and run.lr in rates]


def acc(runs: Iterable[Any], mode: str = "sampled") -> list[float]:
    """What runs end with, in %, on the half of the questions that is reported."""
    return [100 * run.after[mode].benchmarks.test.acc for run in runs]


HELPERS: dict[str, Any] = {f.__name__: f for f in (same, short, runs, acc)}
HELPERS["word"] = WORDS.__getitem__


def filled(text: str, scope: Mapping[str, Any]) -> str:
    """A text with its fields replaced. ValueError for a number that no result gives."""
    tree = ast.parse(f"f'''{text}'''", mode="eval")
    assert isinstance(tree.body, ast.JoinedStr)
    fields = [part.value for part in tree.body.values if isinstance(part, ast.FormattedValue)]
    words = " ".join(str(part.value) for part in tree.body.values if isinstance(part, ast.Constant))
    if not fields or NUMBER.search(re.sub(CODE, "", words)):
        raise ValueError("expected each number as a field {...}, and one at least")
    for field in fields:
        if not scope.keys() & {part.id for part in ast.walk(field) if isinstance(part, ast.Name)}:
            raise ValueError(f"{{{ast.unparse(field)}}} reads no result")
    return eval(compile(tree, BOOK, "eval"), {**HELPERS, **scope})


def scope_of(root: Path, names: Mapping[str, str]) -> dict[str, Any]:
    """The results by file name, and what `names` makes of them and of the names before."""
    files = (root / "benchmarks/results").glob("*.json")
    scope = {file.stem: json.loads(file.read_text("utf-8"), object_hook=Keys) for file in files}
    for name, expression in names.items():
        try:
            scope[name] = eval(expression, {**HELPERS, **scope})
        except Exception as error:  # whatever an expression raises
            raise SystemExit(f"{BOOK}: {name}: {type(error).__name__}: {error}; mend it") from error
    return scope


def blanked(found: re.Match[str]) -> str:
    return re.sub(r"[^\n]", " ", found[0])


def looked_at(page: str) -> str:
    """The page without what holds no results; a block of ```text shows some."""
    page = SILENT.sub(lambda found: found[0] if found[0][:7] == "```text" else blanked(found), page)
    lines, last, above = page.split("\n"), dict[int, int](), ""
    for place, line in enumerate(lines):
        begins = not above.strip() or above.startswith("#")
        if found := ITEM.match(line):
            depth, number = len(found[1]), int(found[2])
            # Else the line goes on with a sentence, whose last number this is.
            if number == last.get(depth, 0) + 1 and (begins or depth in last):
                last = {d: n for d, n in last.items() if d < depth} | {depth: number}
                lines[place] = ITEM.sub(blanked, line, count=1)
        elif begins and line[:1].strip():
            last = {}  # a paragraph after the list
        above = line
    return "\n".join(lines)


def taken(page: str, text: str) -> str:
    """The page without a text that is once in it. ValueError where it is not, or more often."""
    words = r"\s+".join(map(re.escape, text.split()))
    rest, times = re.subn(rf"(?<![\w.,+−-]){words}(?!\w|[.,]\d)", blanked, page)
    if times != 1:
        raise ValueError(f"is {times} times on the page, expected once; mend the page or {BOOK}")
    return rest


def printed(root: Path, command: str) -> str:
    """The table that a command of benchmarks/ prints; SystemExit where there is none."""
    _, script, *words = shlex.split(command, comments=True)
    output = io.StringIO()
    with contextlib.chdir(root), contextlib.redirect_stdout(output):
        importlib.import_module(Path(script).stem).main(words)
    title = command.partition(" # ")[2]
    head = rf"^#+ {re.escape(title)}\n\s*" if title else r"\A"
    found = re.search(head + r"((?:\|.*\n)+)", output.getvalue(), re.M)
    if found is None:
        raise SystemExit(f"{command}: it prints no such table; mend the page")
    return found[1]


def page_problems(
    root: Path, name: str, entry: Mapping[str, Any], scope: Mapping[str, Any]
) -> Iterator[str]:
    """One line for each number of a page that is not as its source says, or has none."""
    page = (root / name).read_text("utf-8")
    for mark, command, shown in TABLE.findall(page):
        wanted = printed(root, command)
        if shown != wanted:
            new = [line for line in wanted.splitlines() if line not in shown.splitlines()]
            yield f"{name}: not the table of {command!r}, which has {new[:1]}; use --write"
        page = page.replace(mark + shown, "\n" * (mark + shown).count("\n"))
    for text in entry.get("bound", ()):
        said = text
        try:
            said = filled(text, scope)
            page = taken(page, said)
        except Exception as error:  # whatever a field raises
            yield f"{name}: {said!r}: {type(error).__name__}: {error}"
    if "allowed" not in entry:
        return
    page = looked_at(page)
    for text, reason in entry["allowed"].items():
        try:
            page = taken(page, text)
        except ValueError as error:
            yield f"{name}: {text!r} ({reason}): {error}"
    for found in NUMBER.finditer(page):
        line = page.count("\n", 0, found.start()) + 1
        yield f"{name}:{line}: {found[0]} has no source; bind it or allow it in {BOOK}"


def origin_problems(name: str, result: Any, changed: bool, history: set[str]) -> Iterator[str]:
    """One line for each thing that a result does not say of where it is from. Without a history
    no commit is looked up."""
    facts = {"command": result.get("command")} | result.get("environment", {})
    for key in ("command", "commit", "python", "torch", "transformers", "vpgea_fast"):
        if not facts.get(key):
            yield f"{name}.json has no {key}; make it again with its command"
    # Of a stage that another version made, its own.
    for stage, made in result.get("stages", {}).items():
        if made.get("commit") != facts.get("commit") and not made.get("environment", {}).get(
            "torch"
        ):
            yield f"{name}.json: stage {stage} is of another commit, and has no versions"
    commits = " ".join(re.findall(r'"commit": "([^"]+)"', json.dumps(result)))
    if changed != ("+changes" in commits):
        yield f"{name}.json is of {commits!r}, but {'' if changed else 'not '}in `with_changes`"
    for commit in set(re.findall(r"[0-9a-f]{40}", commits)) - history if history else ():
        yield f"{name}.json is of commit {commit}, which does not lead to this tree"


def history_of(root: Path) -> set[str]:
    """Commits that lead to this tree; none where they cannot all be known."""
    if not (root / ".git").exists():  # an unpacked archive, perhaps inside another repository
        return set()
    asked = ("rev-parse", "--is-shallow-repository"), ("rev-list", "HEAD")
    shallow, commits = (
        subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True).stdout
        for words in asked
    )
    return set(commits.split()) if shallow.strip() == "false" else set()


def problems(root: Path = ROOT) -> list[str]:
    """One line for each number that the committed results do not hold."""
    source = (root / BOOK).read_text("utf-8")
    book = yaml.safe_load(source)
    scope, lines = scope_of(root, book["names"]), []
    for name, entry in book["pages"].items():
        lines += page_problems(root, name, entry, scope)
        source += " ".join(found[1] for found in TABLE.findall((root / name).read_text("utf-8")))
    for name in COMPLETE:
        if (root / name).exists() and "allowed" not in book["pages"].get(name, {}):
            lines.append(f"{name}: not every number is looked at; give it `allowed` in {BOOK}")
    history = history_of(root)
    for name in sorted(scope.keys() - book["names"].keys()):
        if re.search(rf"\b{name}\b", source):
            lines += origin_problems(name, scope[name], name in book["with_changes"], history)
    return lines


def write(root: Path = ROOT) -> None:
    """Write the tables of all pages again."""
    for name in yaml.safe_load((root / BOOK).read_text("utf-8"))["pages"]:
        page = (root / name).read_text("utf-8")
        now = TABLE.sub(lambda found: found[1] + printed(root, found[2]), page)
        (root / name).write_text(now, encoding="utf-8")


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0], allow_abbrev=False)
    parser.add_argument("--write", action="store_true", help="write the tables again, then check")
    if parser.parse_args(words).write:
        write()
    lines = problems()
    print("\n".join(lines) or "every number is that of its result")
    if not history_of(ROOT):
        print("the commits of the results were not looked up: this tree has not its whole history")
    raise SystemExit(bool(lines))


if __name__ == "__main__":
    main()
