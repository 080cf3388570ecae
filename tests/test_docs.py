"""README.md and docs/ say what is true: their code and commands run, their links lead somewhere,
their sentences are short; and the examples in docstrings do what they show."""

import doctest
import importlib
import re
import shlex
import shutil
import subprocess
import textwrap
from pathlib import Path
from typing import NamedTuple

import pytest
from ranks import Program

from vpgea_fast import config
from vpgea_fast.cli import main
from vpgea_fast.metrics.console import STEP_LINE

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "vpgea_fast"
README = ROOT / "README.md"
GENERATED = ("api.md", "configuration.md", "metrics.md")
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in [README, *sorted((ROOT / "docs").glob("*.md"))]
}
KINDS = {"python", "bash", "yaml", "text", "py"}
"""Of blocks: code that runs, commands that run, a configuration that resolves; what is only shown:
drawings and output, and the signatures of generated pages."""
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)


class Command(NamedTuple):
    """One command of a page, and what it needs that a test has not: "" where it runs."""

    page: str
    text: str
    needs: str


def blocks(kind):
    return [(name, code) for name in PAGES for k, code in FENCE.findall(PAGES[name]) if k == kind]


def commands():
    """Every command of every page. `# needs X` behind it, or alone in the first line of its block,
    names what it needs."""
    found = []
    for page, code in blocks("bash"):
        lines = code.replace("\\\n", " ").splitlines()
        of_all = needed(lines[0]) if lines[0].startswith("#") else ""
        split = [(shlex.split(line, comments=True), of_all or needed(line)) for line in lines]
        found += [Command(page, shlex.join(words), needs) for words, needs in split if words]
    return found


def needed(line):
    found = re.search(r"# .*?needs ([^:]+)", line)
    return found[1].strip() if found else ""


# --- code ---------------------------------------------------------------------------------------


def test_every_block_says_what_it_is():
    found = {(name, kind) for name, text in PAGES.items() for kind, _ in FENCE.findall(text)}
    assert {kind for _, kind in found} == KINDS
    assert {Path(name).name for name, kind in found if kind == "py"} == {"api.md"}
    for name, text in PAGES.items():
        assert "```" not in FENCE.sub("", text), f"{name}: a block without an end"


def in_their_place():
    """Blocks of other trainers import those, seconds each: they are among the tests of these."""
    hosts = "docs/hosts.md"
    return [
        pytest.param(page, code, marks=[pytest.mark.hosts] if page == hosts else [])
        for page, code in blocks("python")
    ]


@pytest.mark.parametrize(("page", "code"), in_their_place())
def test_python_runs_as_it_stands(page, code, tmp_path):
    """In a process of its own, in a directory that holds nothing."""
    file = tmp_path / "block.py"
    file.write_text(code, encoding="utf-8")
    program = Program(file, cwd=tmp_path, strict=True)
    _, errors = program.communicate()
    assert program.returncode == 0, f"{page}\n{code}\n{errors}"


@pytest.mark.parametrize(("page", "code"), blocks("yaml"))
def test_yaml_is_a_configuration(page, code, tmp_path):
    file = tmp_path / "block.yaml"
    file.write_text(code, encoding="utf-8")
    assert config.load(file) != config.Config(), page


# --- commands -----------------------------------------------------------------------------------

RUNS = [command for command in commands() if not command.needs]
WAITS = [command for command in commands() if command.needs]
STEPS = "--train.steps 1 --train.questions_per_step 4 --objective.group_size 4 --eval.limit 2"
LIMITS = (
    "--data.limit 64 --rollout.max_new_tokens 48 --eval.max_new_tokens 48 --metrics.figure false"
)
SMALL = {"train": shlex.split(f"{STEPS} {LIMITS}"), "eval": ["--eval.limit", "2"]}
"""Added to a command of a page: the same run, shorter."""


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    """A directory with what the pages presuppose: the tree's files and a published data set."""
    for name in ("benchmarks", "configs"):
        shutil.copytree(ROOT / name, tmp_path / name)
    (tmp_path / "published").mkdir()
    rows = (ROOT / "tests/cases/gsm8k_raw.jsonl").read_text("utf-8").splitlines(keepends=True)
    for split, part in {"train": rows[1:], "test": rows[:1]}.items():
        (tmp_path / f"published/{split}.jsonl").write_text("".join(part), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", sorted({command.page for command in RUNS}))
def test_the_commands_of_a_page_run(page, workspace, capsys):
    """One after the other, in one directory."""
    for command in (each for each in RUNS if each.page == page):
        program, *words = shlex.split(command.text)
        if program == "make":
            dry = ["make", "-C", ROOT, "-n", *words]
            done = subprocess.run(dry, capture_output=True, text=True, timeout=60)
            assert done.returncode == 0, done.stderr
        elif words[0].startswith("examples/"):  # tests/test_examples.py runs them
            assert (ROOT / words[0]).is_file()
        elif program == "python":
            run = Program(*words, cwd=workspace)
            _, errors = run.communicate()
            assert run.returncode == 0, f"{command.text}\n{errors}"
        else:
            assert program == "vpgea", command.text
            more = [] if "--resume" in words else SMALL.get(words[0], [])
            status = main([*words, *more])
            assert status == 0, f"{command.text}\n{capsys.readouterr().err}"


@pytest.mark.usefixtures("workspace")
def test_the_output_in_the_readme_is_what_make_train_prints(monkeypatch, capsys):
    """Line by line but for the numbers, which benchmarks/page_numbers.yaml holds."""
    done = subprocess.run(["make", "-C", ROOT, "-n", "train"], capture_output=True, text=True)
    for command in ("vpgea make-tiny data/tiny", "vpgea train configs/tiny.yaml"):
        assert command in done.stdout
    monkeypatch.setenv("COLUMNS", "160")
    assert main(["make-tiny", "data/tiny"]) == 0
    assert main(["train", "configs/tiny.yaml", *SMALL["train"]]) == 0, capsys.readouterr().err
    printed = {form(line) for line in capsys.readouterr().out.splitlines()}
    (shown,) = [code for name, code in blocks("text") if name == "README.md" and "this run" in code]
    assert [line for line in shown.splitlines() if form(line) not in printed] == []
    assert len(shown.splitlines()) == 2


def test_each_word_of_a_steps_line_has_its_metric_on_the_page():
    rows = re.findall(r"`([^`]+)` \| `([^`]+)`", PAGES["docs/runs.md"])
    assert {(word, key) for word, key, _ in STEP_LINE} <= set(rows)


def form(line):
    return " ".join(re.sub(r"\d+(\.\d+)?", "0", line).split())


@pytest.mark.parametrize("command", WAITS, ids=[command.text[:50] for command in WAITS])
def test_a_command_that_waits_is_spelled_right(command, capsys):
    """Its program, files and options exist; what it needs is the reason of the skip."""
    words = shlex.split(command.text.rpartition("-m vpgea_fast.cli")[2])
    words = [word for word in words if not re.match(r"[A-Z_]+=", word)]
    if "-m vpgea_fast.cli" in command.text or words[0] == "vpgea":
        check_vpgea(words[words[0] == "vpgea" :], capsys)
    elif words[0] == "python":
        source = (ROOT / words[1]).read_text(encoding="utf-8")
        for option in (word for word in words if word.startswith("--")):
            assert f'"{option}"' in source, f"{words[1]} has no {option}"
    else:
        assert words[:2] == ["pip", "install"], command.text
        (extra,) = re.findall(r"^(?:vpgea_fast|\.)\[(\w+)\]$", words[2])
        assert f'"{extra}": [' in (ROOT / "setup.py").read_text(encoding="utf-8")
    pytest.skip(f"needs {command.needs}")


def check_vpgea(words, capsys):
    """The options with a dot are keys of the configuration, the others those of the command."""
    words = words[: words.index("--")] if "--" in words else words
    keys = [at for at, word in enumerate(words) if re.match(r"--\w+\.|--engine$", word)]
    settings = [part for at in keys for part in words[at : at + 2]]
    if any(word.startswith("--engine.") for word in settings) and "--engine" not in settings:
        settings += ["--engine", "vllm"]
    source = words[1] if words[0] == "train" and not words[1].startswith("-") else "tiny"
    assert main(["train", source, *settings, "--print-config"]) == 0, capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        main([words[0], "--help"])
    assert stopped.value.code == 0
    known = capsys.readouterr().out
    for at, word in enumerate(words):
        if word.startswith("--") and at not in keys:
            assert f"{word} " in known or f"{word}]" in known, f"{words[0]} has no {word}"


# --- words --------------------------------------------------------------------------------------

COLUMNS = 100
READ = PAGES | {
    name: (ROOT / name).read_text(encoding="utf-8")
    for name in ("CONTRIBUTING.md", "benchmarks/README.md", "kernels/README.md")
}


def prose(text):
    """Paragraphs, list items and cells of a page, one text each, without markup."""
    text = re.sub(r"<!--.*?-->", "", FENCE.sub("\n", text), flags=re.S)
    for part in re.split(r"\n\s*\n|\n(?=\s*(?:[*-]|\d+\.) )|\n(?=\|)", text):
        formula = all(line.startswith("    ") for line in part.splitlines())
        if formula or part.startswith("#") or re.fullmatch(r"\|[-| ]*", part.strip()):
            continue
        for cell in re.split(r"(?<!\\)\|", part) if part.startswith("|") else [part]:
            plain = re.sub(r"!?\[([^]]*)\]\([^)]*\)", r"\1", cell)
            if plain.strip():
                yield re.sub(r"^\s*(?:[*-]|\d+\.) ", "", " ".join(plain.split()))


def sentences(text, ends=".!?"):
    """A code span is one word."""
    spoken = re.sub(r"`[^`]*`", "`", text)
    return re.split(rf"(?<=[{ends}])[*)\"']*\s+", spoken)


@pytest.mark.parametrize("name", READ)
def test_sentences_are_short(name):
    """Generated pages repeat docstrings, where a colon or semicolon sets clauses apart."""
    ends = ".!?:;" if Path(name).name in GENERATED else ".!?"
    found = [s for text in prose(READ[name]) for s in sentences(text, ends)]
    assert [f"{len(s.split())} words: {s}" for s in found if len(s.split()) > 25] == []


@pytest.mark.parametrize("name", READ)
def test_paragraphs_are_short(name):
    long = [text for text in prose(READ[name]) if len(textwrap.wrap(text, COLUMNS)) > 6]
    assert long == []


def test_the_readme_is_one_page():
    assert len(PAGES["README.md"].splitlines()) <= 120


def test_the_measure_tells_long_from_short():
    page = (
        "One two.\n\n* three `a b c d` four\n* five:\n  six\n\n| a | b c |\n|---|---|\n| d | e |\n"
    )
    assert list(prose(page)) == [
        *("One two.", "three `a b c d` four", "five: six", "a", "b c", "d", "e")
    ]
    assert sentences("A `x. y` b. C (d.) E") == ["A ` b.", "C (d.", "E"]


# --- places -------------------------------------------------------------------------------------

TREE = ("vpgea_fast", "kernels", "tests", "benchmarks", "configs", "docs", "examples")


@pytest.mark.parametrize("name", [name for name in READ if Path(name).name not in GENERATED])
def test_links_and_paths_lead_somewhere(name):
    text = FENCE.sub("", READ[name])
    here = (ROOT / name).parent
    links = [link for link in re.findall(r"\]\(([^)\s#]+)", text) if "://" not in link]
    assert [link for link in links if not (here / link).exists()] == []
    paths = re.findall(rf"`((?:{'|'.join(TREE)})/[\w./-]+)`", text)
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_the_readme_leads_to_every_page():
    linked = set(re.findall(r"\]\((docs/[\w-]+\.md)\)", PAGES["README.md"]))
    assert linked == set(PAGES) - {"README.md"}


def test_the_tree_names_every_room():
    rooms = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or path.is_dir()}
    rooms -= {"__init__", "__pycache__", "configs", "results", "kernels"}
    # In the package's own part, by its ending: other folders have files of the same names.
    part = PAGES["docs/tree.md"].partition("\nvpgea_fast/")[2].partition("\nconfigs/")[0]
    named = set(re.findall(r"(\w+)(?:\.py|/)", part))
    assert rooms - named == set(), "give each a line in docs/tree.md"
    files = {path.name for path in [*PACKAGE.rglob("*.py"), *ROOT.glob("*/*.py")]}
    files |= {path.name for path in (PACKAGE / "kernels").iterdir()}
    gone = set(re.findall(r"\w+\.py", PAGES["docs/tree.md"])) - files
    assert gone == set(), "docs/tree.md names files that are no more"


# --- docstrings ---------------------------------------------------------------------------------


def modules():
    """Files that hold an example, by module name; the kernels are reached through their link."""
    files = [*PACKAGE.rglob("*.py"), *(PACKAGE / "kernels").glob("*.py")]
    with_examples = {file for file in files if re.search(r"^ *>>> ", file.read_text("utf-8"), re.M)}
    parts = [file.relative_to(PACKAGE.parent).with_suffix("").parts for file in with_examples]
    return sorted(".".join(part for part in words if part != "__init__") for words in parts)


@pytest.mark.parametrize("name", modules())
def test_examples_in_docstrings(name):
    found = doctest.testmod(importlib.import_module(name))
    assert found.attempted > 0
    assert found.failed == 0
