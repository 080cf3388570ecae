"""Damaged run directories: what is harmed is found and told in one line that names it, nothing is
trained on another state unsaid, and no log is cut without a word."""

import ctypes
import itertools
import json
import os
import random
import re
import shutil
import signal
import sys
import warnings
import zlib
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import pytest
from ranks import watch_ranks
from runs import untimed
from test_mutations import attempt, changed_bytes, mutate

TINY = Path(__file__).parents[1] / "configs/tiny.yaml"
LOGS = ("metrics.jsonl", "paths.jsonl")
STEP_2 = "checkpoints/step_2"
PARTED = "=== next command"


@dataclass(frozen=True)
class Runs:
    """A finished run of two steps; the same, gone on to step 3; one of another rate; one of another
    model; the questions of an evaluation."""

    run: Path
    whole: Path
    other: Path
    alien: Path
    test: str


def commands(*each):
    """The statuses of command lines, one after the other; their outputs are parted. One that hangs
    gets an error that no program foresees."""
    warnings.filterwarnings("always", message=".*falling back")
    signal.signal(signal.SIGALRM, hangs)
    statuses = []
    for words in each:
        print(PARTED, flush=True)
        signal.alarm(90)
        statuses.append(attempt(words))
        signal.alarm(0)
        sys.stdout.flush()
        sys.stderr.flush()
    return statuses


def hangs(*_):
    raise TimeoutError("hangs")


def resuming(run):
    return ["train", "--resume", str(run), "--train.steps", "3"]


def make_runs(world, folder, alien_model):
    settings = {
        "data.train": world["train"],
        "data.limit": 8,
        "eval.data": f"[{world['test']}]",
        "eval.limit": 2,
        "eval.greedy": False,
        "eval.max_new_tokens": 8,
        "eval.every": 1,
        "train.questions_per_step": 2,
        "train.steps": 2,
        "rollout.max_new_tokens": 8,
        "objective.group_size": 2,
        "objective.prior_samples": 2,
        "checkpoint.save_every": 1,
        "checkpoint.keep_best": "sampled_eps3",
        "checkpoint.keep_last": 3,
        "optim.schedule": "constant",
        "metrics.compare": "null",
        "metrics.figure": "false",
        "verify.name": "number",
    }
    fixed = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    base = ["--model.path", world["base"]]
    for name, more in {
        "run": base,
        "other": [*base, "--optim.lr", "2e-4"],
        "alien": ["--model.path", alien_model, "--train.steps", "1"],
    }.items():
        words = ["train", str(TINY), "--run.dir", f"{folder}/{name}", *fixed, *more]
        assert attempt(words) == 0
    assert attempt(["report", f"{folder}/run"]) == 0  # draws training.png, which is damaged too
    shutil.copytree(f"{folder}/run", f"{folder}/whole")
    assert attempt(resuming(f"{folder}/whole")) == 0


def shallow_model(base, folder):
    """The tiny base with one layer less and random weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    shutil.copytree(base, folder)
    settings = AutoConfig.from_pretrained(base)
    settings.num_hidden_layers -= 1
    if getattr(settings, "layer_types", None):
        settings.layer_types = settings.layer_types[:-1]
    AutoModelForCausalLM.from_config(settings).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def runs(tiny_world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    alien_model = shallow_model(tiny_world.base_dir, folder / "alien_model")
    world = {
        "base": str(tiny_world.base_dir),
        "train": str(tiny_world.train_path),
        "test": str(tiny_world.test_path),
    }
    (rank,) = watch_ranks(make_runs, world, str(folder), alien_model, size=1, timeout_s=300)
    assert rank.status == 0, rank.output[-3000:]
    return Runs(*(folder / name for name in ("run", "whole", "other", "alien")), world["test"])


# --- damages: functions of the directory of a run, beside which the other runs lie


def change(name, how):
    """The bytes of a file through `how`."""

    def harm(run):
        (run / name).write_bytes(how((run / name).read_bytes()))

    return harm


def write(name, raw):
    return change(name, lambda _: raw)


def rows(name, how):
    """The lines of a log through `how`: a list of bytes, each with its end."""
    return change(name, lambda raw: b"".join(how(raw.splitlines(keepends=True))))


def row(name, **keys):
    """The first line of a log with other values."""

    def how(lines):
        return [json.dumps({**json.loads(lines[0]), **keys}).encode() + b"\n", *lines[1:]]

    return rows(name, how)


def fields(name, how):
    """A JSON file through `how`, which changes the tree in place."""

    def edit(raw):
        tree = json.loads(raw)
        how(tree)
        return json.dumps(tree).encode()

    return change(name, edit)


def gone(name):
    def harm(run):
        path = run / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return harm


def folder(name):
    def harm(run):
        (run / name).unlink()
        (run / name).mkdir()

    return harm


def pipe(name):
    """A pipe that nobody writes: whoever opens it waits for ever."""

    def harm(run):
        (run / name).unlink()
        os.mkfifo(run / name)

    return harm


def linked(name, *, broken=False):
    """In its place a link, to the thing itself or to nothing."""

    def harm(run):
        away = run.with_name(f"{run.name}_away")
        away.mkdir(exist_ok=True)
        (run / name).rename(away / Path(name).name)
        (run / name).symlink_to(away / ("nothing" if broken else Path(name).name))

    return harm


def taken_from(which, name, source=None):
    """A file or folder of another run in the place of the run's own."""

    def harm(run):
        gone(name)(run)
        found = run.parent / which / (source or name)
        (shutil.copytree if found.is_dir() else shutil.copyfile)(found, run / name)

    return harm


def text(name, old, new):
    def how(raw):
        assert old in raw, raw
        return raw.replace(old, new, 1)

    return change(name, how)


def sealed(name, harm):
    """A harm to a file of step 2 that its manifest does not know of: somebody has edited both."""

    def both(run):
        harm(run)
        raw = (run / STEP_2 / name).read_bytes()
        entry = {"bytes": len(raw), "crc32": zlib.crc32(raw)}
        fields(f"{STEP_2}/manifest.json", lambda tree: tree["files"].update({name: entry}))(run)

    return both


def state(how):
    return sealed("state.json", fields(f"{STEP_2}/state.json", how))


def all_of(*harms):
    def harm(run):
        for each in harms:
            each(run)

    return harm


def unlisted(run):
    gone(f"{STEP_2}/process_0.pt")(run)
    fields(f"{STEP_2}/manifest.json", lambda tree: tree["files"].pop("process_0.pt"))(run)


def renamed(run):
    for path in (run / "checkpoints").iterdir():
        path.rename(path.with_name(f"old_{path.name}"))


def added(name, *, file=False):
    def harm(run):
        (run / name).touch() if file else (run / name).mkdir()

    return harm


def doubled(run):
    shutil.rmtree(run / STEP_2)
    shutil.copytree(run / "checkpoints/step_1", run / STEP_2)


def moved_and_linked(run):
    run.rename(run.with_name(f"{run.name}_far"))
    run.symlink_to(run.with_name(f"{run.name}_far"))


def step(n):
    return lambda lines: [x for x in lines if json.loads(x)["step"] == n]


def other_steps(n):
    return lambda lines: [x for x in lines if json.loads(x)["step"] != n]


def log_damages(name):
    """(what, harm, what the resumed run says: of this log, unless it is refused)."""
    lost = "no line of steps" if name == "metrics.jsonl" else "not all lines of steps"
    late = json.dumps({"step": 9}).encode() + b"\n"
    yield "last line torn", change(name, lambda raw: raw[:-9]), "1 damaged"
    yield "no end of the last line", change(name, lambda raw: raw[:-1]), "1 damaged"
    yield "first step removed", rows(name, other_steps(1)), f"{lost} 1$"
    yield "last step removed", rows(name, other_steps(2)), f"{lost} 2$"
    yield "order turned", rows(name, lambda lines: lines[::-1]), ""
    yield "a line twice", rows(name, lambda lines: lines[:1] + lines), "(damaged|not all lines)"
    yield "step null", row(name, step=None), "1 damaged"
    yield "step a text", row(name, step="1"), "1 damaged"
    yield "step a float", row(name, step=1.0), "1 damaged"
    yield "step below 0", row(name, step=-1), "1 damaged"
    yield "step beyond all", row(name, step=10**30), "1 of steps after 2"
    yield "step missing", rows(name, lambda lines: [b"{}\n", *lines]), "1 damaged"
    yield "a list", rows(name, lambda lines: [b"[1]\n", *lines]), "1 damaged"
    yield "deep", rows(name, lambda lines: [b"[" * 10**5 + b"\n", *lines]), "1 damaged"
    yield "zeros", rows(name, lambda lines: [b"\0" * 4096 + lines[0], *lines[1:]]), "1 damaged"
    yield "a step to come", rows(name, lambda lines: [*lines, late]), "1 of steps after 2"
    yield "byte order mark", change(name, lambda raw: b"\xef\xbb\xbf" + raw), ""
    yield "empty", write(name, b""), f"{lost} 1 to 2$"
    yield "removed", gone(name), f"{lost} 1 to 2$"
    yield "a link", linked(name), ""
    yield "a broken link", linked(name, broken=True), f"{lost} 1 to 2$"
    yield "a folder", folder(name), None
    yield "a pipe", pipe(name), None


def config_damages():
    name = "config.yaml"
    yield "removed", gone(name), None
    yield "empty", write(name, b""), None
    yield "half", change(name, lambda raw: raw[: len(raw) // 2]), None
    yield "latin-1", change(name, lambda raw: b"# \xe9\n" + raw), None
    yield "no mapping", write(name, b"- 1\n"), None
    yield (
        "a section null",
        change(name, lambda raw: re.sub(rb"(?s)train:\n.*", b"train:\n", raw)),
        None,
    )
    yield "a key twice", change(name, lambda raw: raw + b"\noptim: {}\n"), None
    yield "an unknown key", change(name, lambda raw: raw + b"\nnew: {}\n"), None
    yield "another seed", text(name, b"seed: 0", b"seed: 7"), None
    yield "another model", taken_from("alien", name), None
    yield "of another run", taken_from("other", name), "changed at step 2: optim.lr"
    yield "a folder", folder(name), None
    yield "a pipe", pipe(name), None
    yield "a link", linked(name), ""


def evaluation_damages():
    name = "eval.json"
    yield "empty", write(name, b""), None
    yield "half", change(name, lambda raw: raw[: len(raw) // 2]), None
    yield "a list", write(name, b"[]"), None
    yield "other shape", write(name, b'{"before": [1]}'), None
    yield "a mode that is none", write(name, b'{"before": {"step": 0, "sampled": 3}}'), None
    yield "step null", fields(name, lambda tree: tree["before"].update(step=None)), None
    yield "deep", write(name, b'{"a":' * 10**5), None
    yield "utf-16", change(name, lambda raw: raw.decode().encode("utf-16")), None
    yield "without before", fields(name, lambda tree: tree.pop("before")), "no evaluation before"
    yield "numbers as text", fields(name, lambda t: t["before"]["sampled"].update(acc="x")), ""
    yield "removed", gone(name), "no evaluation before"
    yield "of another run", taken_from("other", name), ""
    yield "a folder", folder(name), None
    yield "a pipe", pipe(name), None


def checkpoint_damages():
    before = "falling back to the checkpoint before"
    for name in ("state.json", "manifest.json", ".metadata", "__0_0.distcp", "process_0.pt"):
        file = f"{STEP_2}/{name}"
        yield f"{name} removed", gone(file), before
        yield f"{name} empty", write(file, b""), before
        yield f"{name} half", change(file, lambda raw: raw[: len(raw) // 2]), before
        yield f"{name} a byte", change(file, lambda raw: raw[:-9] + b"\x07" + raw[-8:]), before
        yield f"{name} a folder", folder(file), before
        yield f"{name} a pipe", pipe(file), before
        if name != "manifest.json":
            yield f"{name} garbage, sealed", sealed(name, write(file, b"\x80" * 99)), ".*"
            yield f"{name} empty, sealed", sealed(name, write(file, b"")), ".*"
    for what, shape in (("a list", b"[]"), ("null", b"null"), ("an empty object", b"{}")):
        yield f"state is {what}", sealed("state.json", write(f"{STEP_2}/state.json", shape)), before
    yield "another step inside", state(lambda tree: tree.update(step=7)), before
    yield "processes a text", state(lambda tree: tree.update(processes="x")), before
    yield "more processes than files", state(lambda tree: tree.update(processes=2)), before
    yield "an unknown key inside", state(lambda tree: tree.update(new=1)), before
    yield "no parameters", state(lambda tree: tree["optimizer"].update(parameters=None)), before
    yield "trainer state a text", state(lambda tree: tree.update(trainer_state="x")), before
    yield "skipped a text", state(lambda t: t["trainer_state"].update(skipped_in_a_row="x")), None
    yield "tokens a text", state(lambda t: t["trainer_state"].update(tokens="x")), None
    yield "no data", state(lambda tree: tree["trainer_state"].pop("data")), None
    yield "other data", state(lambda tree: tree["trainer_state"].update(data="0")), None
    yield (
        "another rate in its configuration",
        state(lambda tree: tree["trainer_state"]["config"]["optim"].update(lr=0.5)),
        "changed at step 2: optim.lr 0.5",
    )
    yield "a file that no manifest names", unlisted, before
    yield "step 1 in place of step 2", doubled, before
    yield "of another run", taken_from("other", STEP_2), "changed at step 2: optim.lr"
    yield "of another model", taken_from("alien", STEP_2, "checkpoints/step_1"), before
    yield "the last gone", gone(STEP_2), "lines taken out: 1 of steps after 1"
    yield "a link", linked(STEP_2), ""
    yield "all behind a link", linked("checkpoints"), ""
    yield "all gone", gone("checkpoints"), None
    yield "all renamed", renamed, None
    yield (
        "all damaged",
        all_of(gone(f"{STEP_2}/state.json"), gone("checkpoints/step_1/state.json")),
        None,
    )
    yield (
        "a file in their place",
        all_of(gone("checkpoints"), added("checkpoints", file=True)),
        None,
    )
    yield "an empty step 99", added("checkpoints/step_99"), before
    yield "a file step_99", added("checkpoints/step_99", file=True), before
    yield "step_x", added("checkpoints/step_x"), ""
    yield "a step in other digits", added("checkpoints/step_\u0663"), ""
    yield "step_002", added("checkpoints/step_002"), ""
    yield "a save that was cut off", added("checkpoints/.tmp-step_3"), ""
    yield "the mark gone", gone(".saved"), ""
    yield "the mark a folder", folder(".saved"), ""
    yield (
        "checkpoints and mark gone",
        all_of(gone("checkpoints"), gone(".saved")),
        "lines taken out: 2 of steps after 0, which are made again; kept in",
    )


def other_damages():
    yield "environment.json", "garbage", write("environment.json", b"\xff{"), ""
    yield "environment.json", "removed", gone("environment.json"), ""
    yield "environment.json", "a folder", folder("environment.json"), None
    yield "environment.json", "a pipe", pipe("environment.json"), None
    yield ".lock", "garbage", write(".lock", b"\xff\xfe\0"), ""
    yield ".lock", "removed", gone(".lock"), ""
    yield ".lock", "a folder", folder(".lock"), None
    yield ".lock", "a pipe", pipe(".lock"), None
    yield "report.html", "a folder", folder("report.html"), None
    yield "training.png", "a folder", folder("training.png"), None
    for name in ("config.json", "model.safetensors", "tokenizer.json", "generation_config.json"):
        yield "export", f"{name} removed", gone(f"export/{name}"), ""
        yield (
            "export",
            f"{name} half",
            change(f"export/{name}", lambda raw: raw[: len(raw) // 2]),
            "",
        )
    yield "export", "removed", gone("export"), ""
    yield "export", "a file", all_of(gone("export"), added("export", file=True)), ""
    yield "export", "a link", linked("export"), ""
    yield "export", "half written", added(".tmp-export-1"), ""
    yield "export", "of another model", taken_from("alien", "export"), ""
    yield "", "behind a link", moved_and_linked, ""
    yield (
        "checkpoints",
        "a link to a disk that is not there",
        linked("checkpoints", broken=True),
        None,
    )


def table():
    """(file, what, harm, said): `said` is a pattern of what the resumed run says; None: it stops
    with one line that names the file."""
    for name in LOGS:
        for what, harm, said in log_damages(name):
            yield name, what, harm, f"{name}: .*{said}" if said else said
    for name, damages in {
        "config.yaml": config_damages,
        "eval.json": evaluation_damages,
        "checkpoints": checkpoint_damages,
    }.items():
        for what, harm, said in damages():
            yield name, what, harm, said
    yield from other_damages()


TABLE = list(table())


# --- what must hold


def contents(run):
    """Every file but the lock and what a report makes."""
    made = (".lock", "report.html", "training.png")
    files = [path for path in run.rglob("*") if path.is_file() and path.name not in made]
    return {path.relative_to(run): path.read_bytes() for path in files}


def last_step(run):
    """What the third step left: its line without times, its paths, its weights."""
    found = [json.loads(x) for x in step(3)((run / "metrics.jsonl").read_bytes().splitlines())]
    return (
        untimed(found),
        step(3)((run / "paths.jsonl").read_bytes().splitlines()),
        (run / "export/model.safetensors").read_bytes(),
        (run / "checkpoints/step_3/__0_0.distcp").read_bytes(),
    )


def check_refusal(run, words, text, names):
    """One line, foreseen, that names one of the files; an evaluation without the run's settings has
    said before that they are gone."""
    refused = [line for line in text.splitlines() if line.startswith("vpgea: ")]
    assert len(refused) == 1, f"{words[0]}: {text}"
    assert "--traceback" not in refused[0], f"{words[0]}: {text}"
    gone = [line for line in text.splitlines() if re.match("settings: .* is missing", line)]
    told = " ".join([*refused, *gone])
    named = any(str(run) in told and name in told for name in names)
    assert named or not names, f"{words[0]}: {text}"


def check_resume(runs, run, status, text, before):
    if status == 2:
        assert contents(run) == before, "a refused resume changed the run"
        return
    told = [x for x in text.splitlines() if "changed at step" in x and "train.steps" not in x]
    assert told or last_step(run) == last_step(runs.whole), f"trained on another state: {text}"
    for name in LOGS:
        counts = [(each / name).read_bytes().count(b"\n") for each in (run, runs.whole)]
        if counts[0] < counts[1]:
            assert f"{run / name}: " in text, f"a log was cut unsaid: {text}"


@dataclass
class Case:
    label: str
    run: Path
    names: list[str]
    """Files one of which a refusal must name; none: it may name anything."""
    each: list[list[str]]
    """Command lines; the last one resumes."""
    said: str | None = ".*"
    before: dict | None = None


def check(runs, case, statuses, outputs):
    for words, status, text in zip(case.each, statuses, outputs, strict=True):
        assert status in (0, 2), f"{words[0]}: status {status}: {text}"
        if status == 2:
            check_refusal(case.run, words, text, case.names)
    assert case.before is not None
    check_resume(runs, case.run, statuses[-1], outputs[-1], case.before)
    assert (statuses[-1] == 2) == (case.said is None) or case.said == ".*", outputs[-1]
    if case.said is not None:
        assert re.search(case.said, outputs[-1], re.MULTILINE), f"not said: {outputs[-1]}"


def judge(runs, cases):
    """All command lines in one process: what it imports once takes longer than they do. Every case,
    and all that went wrong at the end; how many were refused by a command."""
    for case in cases:
        case.before = contents(case.run)
    lines = [words for case in cases for words in case.each]
    (rank,) = watch_ranks(commands, *lines, size=1, timeout_s=3000)
    assert rank.status == 0, f"traceback or crash ({rank.status}): {rank.output[-3000:]}"
    outputs, statuses, wrong = iter(rank.output.split(f"{PARTED}\n")[1:]), iter(rank.result), []
    refused = 0
    for case in cases:
        ours = [*islice(statuses, len(case.each))]
        refused += 2 in ours
        try:
            check(runs, case, ours, [*islice(outputs, len(case.each))])
        except AssertionError as error:
            wrong.append(f"{case.label}: {error}")
    assert not wrong, f"{len(wrong)} of {len(cases)}:\n" + "\n\n".join(wrong)
    return refused


def lines_of(run, runs, kind):
    out = ["--out", f"{run}_{kind}"]
    return {
        "report": ["report", str(run)],
        "last": ["export", str(run), *out],
        "best": ["export", str(run), "--step", "best", *out],
        "1": ["export", str(run), "--step", "1", *out],
        "eval": ["eval", str(run / "export"), runs.test, "--eval.limit", "2"],
    }[kind]


def copy_of(runs):
    """A new directory for every call, beside the other runs."""
    for number in itertools.count():
        run = runs.run.with_name(f"damaged_{number}")
        if not os.path.lexists(run):
            shutil.copytree(runs.run, run)
            return run
    raise AssertionError


READERS = {
    "metrics.jsonl": ["report", "best"],
    "config.yaml": ["report", "last", "eval"],
    "eval.json": ["report", "best"],
    "checkpoints": ["last", "best"],
    "export": ["eval"],
}
"""Which commands read a file besides the one that resumes; else the report."""


def cases_of(entries, runs, *, readers=True):
    for name, what, harm, said in entries:
        run = copy_of(runs)
        harm(run)
        kinds = READERS.get(name, ["report"]) if readers else []
        each = [lines_of(run, runs, kind) for kind in kinds]
        yield Case(f"{name}, {what}", run, [name], [*each, resuming(run)], said)


def test_the_table_is_long_enough():
    assert len({(name, what) for name, what, *_ in TABLE}) == len(TABLE) > 68


def test_a_few_damages_of_a_run_directory(runs):
    judge(runs, [*cases_of(TABLE[4::40], runs, readers=False)])


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("part", range(8))
def test_every_damage_of_a_run_directory(runs, part):
    assert judge(runs, [*cases_of(TABLE[part::8], runs)]) > 2


def bound_by_permissions(lines):
    """`commands` of a process that permissions bind, as they do not bind the superuser's."""
    capabilities, libc = (ctypes.c_uint32 * 6)(), ctypes.CDLL(None)
    version = (ctypes.c_uint32 * 2)(0x20080522, 0)
    assert libc.capget(version, capabilities) == 0
    capabilities[0] &= ~(1 << 1)  # CAP_DAC_OVERRIDE of the effective ones
    assert libc.capset(version, capabilities) == 0
    return commands(*lines)


@pytest.mark.slow
def test_a_read_only_run_directory(runs):
    run = copy_of(runs)
    for path in (run, *run.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    each = [["report", str(run)], ["export", str(run)], resuming(run)]
    before = contents(run)
    (rank,) = watch_ranks(bound_by_permissions, each, size=1, timeout_s=120)
    assert rank.result == [2, 2, 2], rank.output
    for words, text in zip(each, rank.output.split(f"{PARTED}\n")[1:], strict=True):
        check_refusal(run, words, text, [""])
    assert contents(run) == before


RUN_FILES = (
    *("config.yaml", *LOGS, "eval.json", "environment.json", ".lock", ".saved"),
    *(f"{STEP_2}/{x}" for x in ("state.json", "manifest.json", ".metadata", "process_0.pt")),
    *(f"{STEP_2}/__0_0.distcp", "checkpoints/step_1/state.json", "report.html", "training.png"),
    *("export/config.json", "export/model.safetensors", "export/tokenizer.json"),
)


def random_harm(name, draw):
    """One of the kinds that suit any file."""
    kinds = [gone(name), folder(name), linked(name), write(name, b"null\n"), write(name, b"")]
    kinds += [write(name, draw.randbytes(300))]
    kinds += [change(name, lambda raw: mutate(name, raw, draw) if raw else b"[1, 2]\n")] * 3
    kinds += [change(name, lambda raw: changed_bytes(raw, draw) if raw else b"\0")]
    return draw.choice(kinds)


def random_case(seed, runs):
    """One to three files harmed at random, one to three commands, the last one a resume."""
    draw, run = random.Random(seed), copy_of(runs)
    names = draw.sample(RUN_FILES, draw.choice([1, 1, 2, 3]))
    for name in names:
        random_harm(name, draw)(run)
    kinds = draw.sample(["report", "last", "best", "1", "eval"], draw.choice([0, 1, 2]))
    each = [*(lines_of(run, runs, kind) for kind in kinds), resuming(run)]
    # A word of config.yaml that still means something may name a file that is not there.
    tops = [] if "config.yaml" in names else [name.split("/")[0] for name in names]
    return Case(f"seed {seed}, {names}", run, tops, each)


def sweep(runs, seeds):
    return judge(runs, [random_case(seed, runs) for seed in seeds])


def test_eight_run_directories_damaged_at_random(runs):
    sweep(runs, range(8))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("part", range(4))
def test_a_hundred_run_directories_damaged_at_random(runs, part):
    assert sweep(runs, range(1000 + 25 * part, 1025 + 25 * part)) > 5
