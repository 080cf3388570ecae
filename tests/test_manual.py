"""The reference pages say what the source says: every key and metric, and nothing stale."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path
from typing import get_type_hints

import pytest

from vpgea_fast import book, config, manual
from vpgea_fast.cli import main
from vpgea_fast.config.schema import records_at

DOCS = Path(__file__).parents[1] / "docs"
HINTS = get_type_hints(config.Config, include_extras=True)
NAMES = ("configuration.md", "metrics.md", "api.md")
SENTENCE = re.compile(r"(?<=[.:;!?])\s+")


def sentences(text):
    """Sentences and the clauses that a colon or semicolon sets apart."""
    return [part for part in SENTENCE.split(text) if part]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """What the command writes, by file name."""
    folder = tmp_path_factory.mktemp("docs")
    manual.main([str(folder)])
    return {path.name: path.read_text("utf-8") for path in folder.iterdir()}


def test_the_command_writes_every_page(written):
    assert sorted(written) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_the_pages_in_docs_are_those_of_the_source(written, name):
    remedy = "write them again: python -m vpgea_fast.manual docs"
    assert (DOCS / name).read_text("utf-8") == written[name], remedy


def test_every_configuration_key_is_explained_with_its_type_and_default():
    cfg = config.Config()
    parts = {}
    for part in manual.sections():
        parts.setdefault(part.title, []).append(part)
    within = [title for title in parts if "." in title]
    assert within == ["objective.length_reward"]
    assert [title for title in parts if title not in within] == [*vars(cfg)]
    for title, found in parts.items():
        records = (
            records_at(*title.split("."))
            if title in within
            else manual._members(manual._bare(HINTS[title])[0])
        )
        records += [config.DataFile] if title == "data" else []
        names = [[field.name for field in dataclasses.fields(record)] for record in records]
        assert [[key.name for key in part.keys] for part in found] == names
        for part in found:
            assert part.text, f"{title} has no docstring in Config"
            for key in part.keys:
                where = f"{part.head}.{key.name}"
                assert key.kind, where
                assert key.text, f"{where} has no docstring in config/"
                assert key.text.endswith("."), where
                assert all(len(s.split()) <= 25 for s in sentences(key.text)), (
                    f"{where}: {key.text}"
                )


@pytest.mark.parametrize(
    ("key", "kind", "default"),
    [
        ("run.seed", "whole number from 0 to 4294967295", "0"),
        ("run.max_minutes", "number above 0, at most 1000000, or null", "null"),
        ("optim.betas", "list of 2: number from 0 to below 1", "[0.9, 0.999]"),
        ("model.device", "text", '"auto"'),
        ("rollout.top_p", "number above 0, at most 1", "1.0"),
        ("objective.u_min", "number from -1000000 to below 0", "-20.0"),
        ("data.choices_key", "text or list of text, or null", "null"),
        ("rollout.importance_cap", "number, 1 or more, or null", "null"),
        ("objective.norm", "`seq_sum`, `const`, `seq_mean` or `token_mean`", '"const"'),
        ("eval.data", "list of files, any number", "[]"),
    ],
)
def test_types_and_ranges_in_words(key, kind, default):
    title, _, name = key.partition(".")
    found = next(k for k in manual.section(title)[0].keys if k.name == name)
    assert (found.kind, found.default) == (kind, default)


def test_every_default_is_what_the_configuration_resolves_to():
    cfg = config.as_dict(config.Config())
    shown = {
        (part.title, key.name): key.default
        for part in manual.sections()
        if part.title in cfg and part.variant in ("", f"name: {cfg[part.title].get('name')}")
        for key in part.keys
    }
    resolved = {(s, k): manual._json(v) for s, keys in cfg.items() for k, v in keys.items()}
    assert shown == resolved


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["optim"], ["optim.betas", "Decay of AdamW's two moments."]),
        (["objective"], ["objective (name: vpgea)", "objective (name: grpo)", "objective.u_min"]),
        ([], ["run.dir", "objective (name: grpo)", "metrics.note"]),
        (["--metrics"], ["kl_gated, nats per token", "eval.json", "paths.jsonl"]),
    ],
)
def test_keys_prints_what_it_is_asked_for(words, expected, capsys):
    assert main(["keys", *words]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert all(text in out for text in expected)
    assert max(len(line) for line in out.splitlines()) <= 160


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["optm"], "got section 'optm'; did you mean 'optim'?"),
        (["optim.lr"], "got section 'optim.lr'; did you mean 'optim'?"),
        (["beta"], "got section 'beta'; did you mean 'objective'?"),
        (["zzz"], "got section 'zzz'; sections: run, model, parallel"),
        (["optim", "--metrics"], "got 'optim' and --metrics; give one of the two"),
    ],
)
def test_what_keys_does_not_know_is_one_line(words, message, capsys):
    assert main(["keys", *words]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    assert message in err


def test_a_reader_that_stops_early_is_no_error():
    command = f"{sys.executable} -m vpgea_fast.cli keys | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert done.stdout.startswith("run: ")


def test_the_api_page_has_every_public_name_of_the_modules_it_shows(written):
    from vpgea_fast import advantage, distillation, losses, trainer

    page = written["api.md"]
    shown = set(re.findall(r"^### (\w+)$", page, re.MULTILINE))
    for module in (losses, distillation, advantage):
        public = {
            name
            for name, value in vars(module).items()
            if not name.startswith("_") and getattr(value, "__module__", "") == module.__name__
        }
        assert public <= shown
    assert trainer.fit.__name__ in shown
    assert {"load", "resolve", "dump", "ConfigError"} <= shown
    assert "backend: str = 'auto'," in page


@pytest.mark.parametrize("name", ["configuration.md", "metrics.md"])
def test_no_sentence_of_a_page_is_long(written, name):
    text = re.sub(r"```.*?```", "", written[name], flags=re.DOTALL)
    cells = [cell for line in text.splitlines() for cell in re.split(r"(?<!\\)\|", line)]
    long = [s for cell in cells for s in sentences(cell.lstrip("#* ")) if len(s.split()) > 25]
    assert long == []


def test_the_metrics_page_names_every_metric(written):
    page = written["metrics.md"]
    keys = [key for part in (*book.STEP, book.EVALUATION, book.PATHS) for key in part.metrics]
    assert re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE) == keys
