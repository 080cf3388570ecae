"""Damaged inputs: whatever happens to a data file, a tokenizer or a model directory, a run ends
with status 0 or with one line and status 2; never in a traceback, a hang or a left-over file."""

import csv
import io
import json
import random
import re
import shutil
from collections import Counter
from itertools import islice
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from ranks import watch_ranks

TINY = Path(__file__).parents[1] / "configs/tiny.yaml"
DATA = ("data.jsonl", "data.json", "data.csv", "data.parquet")
MODEL = (
    *("config.json", "generation_config.json", "model.safetensors"),
    *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
)
ODD = (
    *(None, True, -1, 0, 1e400, 10**30, 0.5, "", "x", "9" * 5000, "\ud83d", "\x00", "\x1b[2J"),
    *([], {}, [[]], [None], {"a": {"a": {}}}, "{{", "{% include 'x' %}", "../../x", "<think>"),
)


def nodes(tree, path=()):
    """The places of a JSON tree, its root among them."""
    yield path
    children = {dict: dict.items, list: enumerate}.get(type(tree), lambda _: ())
    for key, child in children(tree):
        yield from nodes(child, (*path, key))


def changed_tree(text, draw):
    """JSON text with one value replaced, removed, or put twice."""
    tree = json.loads(text)
    places = [place for place in nodes(tree) if place]
    short = [place for place in places if len(place) <= 2]  # a vocabulary would win every draw
    *way, last = draw.choice(draw.choice([places, short]))
    owner = tree
    for key in way:
        owner = owner[key]
    kind = draw.choice(["replace", "replace", "remove", "again"])
    if kind == "replace":
        owner[last] = draw.choice(ODD)
    elif kind == "remove":
        del owner[last]
    elif isinstance(owner, list):
        owner.append(owner[last])
    else:
        owner[f"{last}_again"] = owner[last]
    return json.dumps(tree).encode()


def changed_bytes(raw, draw):
    """Bytes cut, doubled, overwritten, or replaced by another encoding."""
    start = draw.randrange(len(raw))
    end = min(len(raw), start + draw.choice([1, 1, 8, 200]))
    kind = draw.choice(["cut", "flip", "remove", "twice", "insert", "empty", "utf-16"])
    match kind:
        case "cut":
            return raw[:start]
        case "flip":
            return raw[:start] + draw.randbytes(end - start) + raw[end:]
        case "remove":
            return raw[:start] + raw[end:]
        case "twice":
            return raw[:end] + raw[start:]
        case "insert":
            words = [b"\x00", b"\xff\xfe", b'"', b"}", b"{%", b"\n\n", b"<\xef\xbd\x9cUser", b"["]
            return raw[:start] + draw.choice(words) + raw[start:]
        case "empty":
            return b""
        case _:
            return raw.decode("latin-1").encode("utf-16")


def mutate(name, raw, draw):
    lines = raw.splitlines()
    if name.endswith(".jsonl") and draw.random() < 0.5:
        number = draw.randrange(len(lines))
        lines[number] = changed_tree(lines[number], draw)
        return b"\n".join(lines)
    if name.endswith(".json") and draw.random() < 0.7:
        return changed_tree(raw, draw)
    return changed_bytes(raw, draw)


def write_data(folder, rows):
    """The same questions in every format."""
    folder.mkdir()
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "data.json").write_text(json.dumps(rows))
    text = io.StringIO(newline="")
    table = csv.DictWriter(text, fieldnames=[*rows[0]])
    table.writeheader()
    table.writerows(rows)
    (folder / "data.csv").write_text(text.getvalue())
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "data.parquet")


def attempt(words):
    from vpgea_fast.cli import main

    return main(words)


@pytest.fixture
def inputs(tiny_world, tmp_path):
    """A model directory and a folder of data files, all valid."""
    model, data = tmp_path / "in/model", tmp_path / "in/data"
    shutil.copytree(tiny_world.base_dir, model)
    if not (model / "chat_template.jinja").exists():
        settings = json.loads((model / "tokenizer_config.json").read_text())
        (model / "chat_template.jinja").write_text(settings.pop("chat_template"))
        (model / "tokenizer_config.json").write_text(json.dumps(settings))
    with Path(tiny_world.train_path).open() as file:
        rows = [json.loads(line) for line in islice(file, 12)]
    write_data(data, rows)
    return model, data


@pytest.fixture
def outcome(inputs, tmp_path):
    """Runs one damaged input; returns (status, last line) after the checks that always hold."""
    model, data = inputs

    def run(name, raw, *more, source="data.jsonl"):
        file = (data if name in DATA else model) / name
        kept = file.read_bytes()
        file.write_bytes(raw)
        words = {
            "run.dir": tmp_path / "run",
            "model.path": model,
            "data.train": data / (name if name in DATA else source),
            "data.max_prompt_tokens": 64,
            "eval.data": "[]",
            "train.questions_per_step": 2,
            "train.steps": 1,
            "rollout.max_new_tokens": 8,
            "objective.group_size": 2,
            "objective.prior_samples": 2,
            "metrics.compare": "null",
        }
        options = [word for key, value in words.items() for word in (f"--{key}", str(value))]
        before = sorted(tmp_path.rglob("*"))
        (rank,) = watch_ranks(attempt, ["train", str(TINY), *options, *more], size=1, timeout_s=60)
        text = rank.output.strip()
        try:
            assert rank.status == 0, f"{name}: traceback or crash ({rank.status}):\n{text[-3000:]}"
            assert rank.result in (0, 2), f"{name}: status {rank.result}: {text}"
            if rank.result == 2:
                error = re.sub(r"^(?!vpgea: ).*\n", "", text, flags=re.MULTILINE)
                assert re.fullmatch(r"vpgea: [^\n]{10,2000}", error), f"{name}: {text!r}"
                assert sorted(tmp_path.rglob("*")) == before, f"{name}: left something behind"
        finally:
            file.write_bytes(kept)
            shutil.rmtree(tmp_path / "run", ignore_errors=True)
        return rank.result, text

    return run


def sweep(inputs, outcome, seeds):
    """Every seed, and all that went wrong at the end: one failure hides no other."""
    model, data = inputs
    statuses, wrong = Counter(), []
    for seed in seeds:
        draw = random.Random(seed)
        name = (*DATA, *MODEL)[seed % 10]
        raw = ((data if name in DATA else model) / name).read_bytes()
        more = ["--dry-run"] if draw.random() < 0.7 else []
        try:
            statuses[outcome(name, mutate(name, raw, draw), *more)[0]] += 1
        except AssertionError as error:
            wrong.append(f"seed {seed}, {' '.join([name, *more])}: {error}")
    assert not wrong, "\n\n".join(wrong)
    assert statuses[2] > len(seeds) // 4, f"the damage did not bite: {statuses}"


@pytest.mark.parametrize("name", DATA)
def test_valid_inputs_of_every_format_train(inputs, outcome, name):
    """What is damaged below works: else every refusal would pass."""
    _, data = inputs
    assert outcome(name, (data / name).read_bytes())[0] == 0


def test_twenty_damaged_inputs(inputs, outcome):
    """Each file twice."""
    sweep(inputs, outcome, range(20))


@pytest.mark.slow
def test_two_hundred_damaged_inputs(inputs, outcome):
    sweep(inputs, outcome, range(1000, 1200))
