"""Recorded paths in place of drawn ones: the same updates, bit for bit, and each fault a line."""

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from runs import untimed

from vpgea_fast import config
from vpgea_fast.cli import main
from vpgea_fast.config import ReplayEngineConfig
from vpgea_fast.objectives import METHODS
from vpgea_fast.objectives.length_rewards import LENGTH_REWARDS
from vpgea_fast.rollout.engine import Sampling, prompt_digest
from vpgea_fast.rollout.hf import HFEngine
from vpgea_fast.rollout.recorded import Expected, RecordError, Records
from vpgea_fast.rollout.replay import Replay
from vpgea_fast.trainer import fit
from vpgea_fast.types import SampleRequest

TINY = Path(__file__).parents[1] / "configs/tiny.yaml"
SMALL = {
    "train.questions_per_step": 2,
    "train.steps": 2,
    "rollout.max_new_tokens": 24,
    "objective.group_size": 3,
    "metrics.paths_per_step": 8,
    "metrics.diag_every": 0,
    "metrics.compare": "null",
    "verify.name": "number",
}


def weights(run):
    return (run / "export/model.safetensors").read_bytes()


def lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def trained(words):
    assert fit(config.load(TINY, words))


# name -> more of the run: what rests on the sampler's log-probs, on answers that are drawn behind
# the recorded thoughts, on several updates of a rollout, and on questions that others replace.
KINDS = {
    "resampled": [
        *("--objective", "grpo", "--objective.group_size", "3", "--train.resample_rounds", "2"),
        *("--metrics.paths_per_step", "40", "--rollout.max_new_tokens", "72"),
    ],
    "vpgea": ["--rollout.importance_cap", "2"],
    "answers": ["--scoring.u_source", "accuracy", "--scoring.answer_samples", "2"],
    "grpo": [
        *("--objective", "grpo", "--train.minibatches", "2", "--objective.group_size", "3"),
        *("--rollout.max_new_tokens", "72"),
    ],
}


@pytest.mark.parametrize("name", KINDS)
def test_a_recorded_run_replayed_makes_the_same_updates(name, tiny_words, tmp_path):
    words = tiny_words(SMALL)
    trained(words("run", *KINDS[name]))
    record = tmp_path / "run/paths.jsonl"
    trained(words("again", *KINDS[name], "--engine", "replay", "--engine.paths", f"[{record}]"))
    assert weights(tmp_path / "again") == weights(tmp_path / "run")
    assert (tmp_path / "again/paths.jsonl").read_bytes() == record.read_bytes()
    keys = ("loss", "grad_norm", "mismatch_max", "tokens_generated")
    runs = [lines(tmp_path / run / "metrics.jsonl") for run in ("run", "again")]
    of = [[[line.get(key) for key in keys] for line in run] for run in runs]
    assert of[0] == of[1]
    assert any(norm for _, norm, *_ in of[0])
    replaced = [line["replaced"] for line in lines(record)]
    assert any(replaced) == (name == "resampled")


# More of what a record must hold: paths of the reference policy, prompts with a field of their own,
# log-probs of other prompts, and nothing at all.
MORE = {
    **{name: ["--objective.name", name] for name in METHODS},
    **{
        f"grpo, {name}": ["--objective.name", "grpo", "--objective.length_reward", name]
        for name in LENGTH_REWARDS
    },
    **{
        f"vpgea, {guard}": ["--objective.leak_guard", guard, "--objective.lexical", "true"]
        for guard in ("counterfactual", "max_kl", "early_answer")
    },
}
BUDGETED = ["--prompt.student", "{question} ={budget}", "--data.max_prompt_tokens", "32"]


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE)
def test_every_method_is_replayed(name, tiny_words, tmp_path):
    small = {key: value for key, value in SMALL.items() if not key.startswith("objective")}
    words = tiny_words({**small, "rollout.max_new_tokens": 72, "metrics.paths_per_step": 100})
    more = [*MORE[name], *(BUDGETED if "l1_" in name else [])]
    trained(words("run", *more))
    record = tmp_path / "run/paths.jsonl"
    trained(words("again", *more, "--engine", "replay", "--engine.paths", f"[{record}]"))
    assert weights(tmp_path / "again") == weights(tmp_path / "run")
    runs = [untimed(lines(tmp_path / run / "metrics.jsonl")) for run in ("run", "again")]
    for line in itertools.chain(*runs):
        del line["prefix_hit_rate"]  # no engine read a prompt again
    assert runs[0] == runs[1]


def test_another_run_would_have_other_weights(tiny_words, tmp_path):
    """What the comparison above can see: a log-prob and a token of one line."""
    words = tiny_words({**SMALL, "rollout.importance_cap": 2, "train.steps": 1})
    trained(words("run"))
    record = lines(tmp_path / "run/paths.jsonl")
    alive = next(i for i, line in enumerate(record) if line["advantage"])
    for number, key in enumerate(("ids", "logps")):
        changed = [json.loads(json.dumps(line)) for line in record]
        del changed[alive]["text"]  # else the line is refused
        changed[alive][key][0] = 9 if key == "ids" else changed[alive][key][0] - 0.5
        file = tmp_path / f"{key}.jsonl"
        file.write_text("".join(json.dumps(line) + "\n" for line in changed))
        trained(words(f"other{number}", "--engine", "replay", "--engine.paths", f"[{file}]"))
        assert weights(tmp_path / f"other{number}") != weights(tmp_path / "run")


def test_a_policy_far_from_its_record_is_told_so_by_run_and_report(tiny_words, tmp_path, capsys):
    """By nothing that an engine could mend, as no engine draws here."""
    words = tiny_words({**SMALL, "train.steps": 1, "train.mismatch_steps": 1})
    trained(words("run"))
    far = lines(tmp_path / "run/paths.jsonl")
    for line in far:
        line["logps"] = [value - 3.0 for value in line["logps"]]
    file = tmp_path / "far.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in far))
    fit(config.load(TINY, words("far", "--engine", "replay", "--engine.paths", f"[{file}]")))
    remedy = "lower optim.lr, make fewer steps, or set train.mismatch_stop null"
    page = (tmp_path / "far/report.html").read_text()
    for text in (capsys.readouterr().out, page):
        assert "moved too far from the one whose paths are recorded" in text
        assert remedy in text
        assert "engine.fp32_head" not in text


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vpgea", "vr"])
def test_two_processes_replay_the_run_of_two(name, tiny_words, tmp_path):
    vr = {"objective": "vr", "objective.prior_samples": 3, "scoring.answer_samples": 2}
    long = {"rollout.max_new_tokens": 72, "metrics.paths_per_step": 12}
    words = tiny_words({**SMALL, **vr, **long} if name == "vr" else SMALL)
    run_ranks(trained, words("run"), size=2)
    record = f"[{tmp_path / 'run/paths.jsonl'}]"
    run_ranks(trained, words("again", "--engine", "replay", "--engine.paths", record), size=2)
    assert weights(tmp_path / "again") == weights(tmp_path / "run")
    pair = [tmp_path / run / "paths.jsonl" for run in ("again", "run")]
    assert pair[0].read_bytes() == pair[1].read_bytes()
    assert ("attempts" in pair[0].read_text()) == (name == "vr")


SAMPLING = Sampling(
    max_new_tokens=4, think_close_id=3, eos_ids=(1,), full_answer=True, max_answer_tokens=2
)
LINE = {
    "step": 1,
    "question_id": "q",
    "stream": "prior",
    "index": 0,
    "ids": [7, 8, 3],
    "logps": [-0.5, -0.25, -1.0],
    "answer_ids": [9, 1],
    "answer_logps": [-2.0, None],
    "finish": "stop",
}


def asked(*, step: int | None = 0, index=0):
    ids = torch.tensor([5, 6])
    place = {"question_id": "q", "stream": "prior", "index": index, "step": step}
    return SampleRequest(**place, prompt_ids=ids, seed=11)


@pytest.fixture
def replay(tmp_path, random_qwen2):
    """`replay(lines or text, match="step")`: an engine over a file of these lines."""

    def make(record, **more):
        text = record
        if not isinstance(record, str):
            text = "".join(json.dumps(line) + "\n" for line in record)
        (tmp_path / "r.jsonl").write_text(text)
        needs = more.pop("needs_logps", False)
        names = ("questions", "prompts", "temperature", "answer_temperature")
        expected = {key: more.pop(key) for key in names if key in more}
        cfg = ReplayEngineConfig(paths=(str(tmp_path / "r.jsonl"),), **more)
        records = Records(cfg, Expected(spelled, 53, **expected))
        live = HFEngine(random_qwen2(), max_batch=4)
        return Replay(live, records, needs_logps=needs)

    return make


def spelled(ids):
    return " ".join(f"t{n}" for n in ids.tolist())


def test_a_path_is_what_its_line_says(replay):
    (path,) = replay([LINE]).generate([asked()], SAMPLING)
    assert (path.z_ids.tolist(), path.answer_ids.tolist()) == ([7, 8, 3], [9, 1])
    assert (path.closed, path.finish, path.key) == (True, "stop", ("q", "prior", 0))
    assert path.logps.tolist() == [-0.5, -0.25, -1.0]
    assert path.response_logps[3] == -2.0
    assert path.response_logps[4].isnan()


def test_a_path_is_cut_to_the_limits_as_a_drawn_one(replay):
    long = {**LINE, "ids": [7, 8, 9, 9, 9, 3], "logps": [-1.0] * 6}
    (path,) = replay([long]).generate([asked()], SAMPLING)
    assert (path.z_ids.tolist(), path.closed, path.finish) == ([7, 8, 9, 9], False, "length")


@pytest.mark.parametrize(
    ("ids", "answer", "finish"),
    [
        ([7, 8, 3], [9], "stop"),  # two tokens are the answer's limit
        ([7, 8, 3], [], "stop"),
        ([7, 8, 3], [9, 9], "length"),
        ([7, 8, 3], [9, 1], "stop"),
        ([7, 8], [], "length"),
        ([7, 1], [], "stop"),
        ([], [], "length"),
    ],
)
def test_a_line_that_does_not_say_how_its_path_ended(replay, ids, answer, finish):
    line = {"question_id": "q", "stream": "prior", "ids": ids, "answer_ids": answer}
    (path,) = replay([line]).generate([asked()], SAMPLING)
    assert (path.finish, path.closed) == (finish, 3 in ids)
    (thought,) = replay([line]).generate([asked()], replace(SAMPLING, full_answer=False))
    assert thought.finish == ("stop" if 3 in ids or 1 in ids else "length")


def test_lines_without_step_and_index_serve_every_step_in_their_order(replay):
    bare = [
        {"question_id": "q", "stream": "prior", "ids": [n, 3], "answer_ids": []} for n in (7, 8)
    ]
    engine = replay(bare)
    for step in (0, 5):
        paths = engine.generate([asked(step=step), asked(step=step, index=1)], SAMPLING)
        assert [path.z_ids.tolist() for path in paths] == [[7, 3], [8, 3]]
        assert paths[0].logps.isnan().all()


def test_by_question_the_steps_of_the_record_do_not_count(replay):
    later = [LINE, {**LINE, "step": 4, "ids": [8, 3], "logps": [-1.0, -1.0]}]
    paths = replay(later, match="question").generate([asked(step=9), asked(index=1)], SAMPLING)
    assert [path.z_ids.tolist() for path in paths] == [[7, 8, 3], [8, 3]]


def test_what_is_no_path_of_a_step_is_drawn(replay):
    (path,) = replay([LINE]).generate([asked(step=None)], SAMPLING)
    assert path.z_ids.tolist() != [7, 8, 3]
    assert path.logps.isfinite().all()


ANSWERED = {
    **LINE,
    "share": 0.25,
    "attempt_ids": [[9, 1], [8]],
    "attempt_right": [True, False],
    "attempts": [1, 0, 0],
}


def test_answers_behind_a_thought_and_its_weight_come_with_it(replay):
    (path,) = replay([ANSWERED]).generate([asked()], SAMPLING)
    assert path.share == 0.25
    found = [(attempt.ids.tolist(), attempt.right) for attempt in path.attempts]
    assert found == [([8], False), ([9, 1], True), ([9, 1], True)]
    # Files of earlier versions have neither; a thought that another limit cuts is another one.
    (plain,) = replay([LINE]).generate([asked()], SAMPLING)
    assert (plain.share, plain.attempts) == (None, ())
    (cut,) = replay([{**ANSWERED, "ids": [7, 8, 3, 5], "logps": [-1.0] * 4}]).generate(
        [asked()], SAMPLING
    )
    assert cut.attempts == ()


def test_answers_of_another_temperature_are_refused(replay):
    line = {**ANSWERED, "answer_temperature": 0.7}
    replay([line], answer_temperature=0.7)
    with pytest.raises(RecordError, match=r"at temperature 0.7, and scoring.answer_temp.* is 0.9"):
        replay([line], answer_temperature=0.9)


DAMAGE = [
    ("", "without a line, expected recorded paths"),
    ("{\n", "line 1: not JSON"),
    ("[1]\n", "line 1: got a list; expected an object with question_id"),
    ([LINE, {**LINE, "index": 1, "ids": [1.5]}], "line 2: got ids '[1.5]'"),
    ([{**LINE, "ids": [True]}], "got ids '[True]'"),
    ([{**LINE, "stream": "post"}], "got stream 'post'"),
    ([{**LINE, "finish": "end"}], "got finish 'end'"),
    ([{**LINE, "step": 0}], "got step 0"),
    ([{**LINE, "index": "0"}], "got index '0'"),
    ([{**LINE, "question_id": 3}], "got question_id 3"),
    ([{**LINE, "logps": "a"}], "got logps 'a'"),
    *(
        (
            [{**LINE, "logps": [-0.5, value, -1.0]}],
            f"got logps with {value!r}, no log-prob",
        )
        for value in ("a", True, 5.0, math.nan, math.inf, -math.inf)
    ),
    ([{**LINE, "share": 1.5}], "got share 1.5"),
    ([{**LINE, "share": True}], "got share True"),
    ([{**ANSWERED, "attempt_ids": [[7], 8]}], "got attempt_ids '[[7], 8]'"),
    ([{**ANSWERED, "attempt_right": [1, 0]}], "got attempt_right '[1, 0]'"),
    ([{**ANSWERED, "attempt_right": [True]}], "got attempt_right '[True]' beside 2 attempt_ids"),
    ([{**ANSWERED, "attempts": [0, 2]}], "got attempts '[0, 2]'"),
    ([{**ANSWERED, "attempt_ids": [[7], [53]]}], "got the token 53, but the model embeds 53"),
    (
        [LINE, {**LINE, "index": 1, "ids": [53]}],
        "line 2: got the token 53, but the model embeds 53",
    ),
    ([LINE, LINE], "line 2: path 0 of the prior stream of question 'q' of step 1 stands at"),
]


@pytest.mark.parametrize(("record", "said"), DAMAGE)
def test_a_damaged_file_is_refused_with_its_line(replay, record, said):
    with pytest.raises(RecordError) as error:
        replay(record)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_a_torn_last_line_is_left_out(replay):
    """And named, where a step misses that path."""
    records = replay(json.dumps(LINE) + '\n{"step": 1, "que').records
    assert len(records.index) == 1
    with pytest.raises(RecordError, match=r"torn, and left out: .*r\.jsonl, line 2: record with"):
        records.find((1, "q", "prior", 1))
    with pytest.raises(RecordError, match=r"without a line.*torn, and left out: .*, line 1$"):
        replay('{"step": 1, "que')


def test_paths_of_another_tokenizer_are_refused_by_their_text(replay):
    """The first line at once, another when it is asked for; white space does not count."""
    good = {**LINE, "text": "t7t8  t3", "answer": "t9 t1 "}
    (path,) = replay([good]).generate([asked()], SAMPLING)
    assert path.z_ids.tolist() == [7, 8, 3]
    for change, said in (
        ({"text": "two plus"}, "line 1: its ids say 't7 t8 t3' with this model's tokenizer, and "),
        ({"answer": "4"}, "line 1: its answer_ids say 't9 t1'"),
    ):
        with pytest.raises(RecordError, match=said):
            replay([{**good, **change}])
        engine = replay([good, {**good, **change, "index": 1}])
        with pytest.raises(RecordError, match=said.replace("line 1", "line 2")):
            engine.generate([asked(index=1)], SAMPLING)


def test_paths_of_another_question_or_prompt_are_refused(replay):
    """By their text and their prompt's hash: at once where it is known, else when asked for."""
    own = {**LINE, "question": "2 + 2 = ?", "prompt": prompt_digest(asked().prompt_ids)}
    texts, prompts = {"q": "2 + 2 = ?"}, {("q", "prior"): own["prompt"]}
    assert replay([own], questions=texts, prompts=prompts).generate([asked()], SAMPLING)
    with pytest.raises(RecordError, match=r"line 1: question 'q' is '2 \+ 2 = \?' there and '1'"):
        replay([own], questions={"q": "1"})
    with pytest.raises(RecordError, match="line 1: the prior path of question 'q' was drawn from"):
        replay([own], prompts={("q", "prior"): "0"})
    engine = replay([{**own, "prompt": "0"}])
    with pytest.raises(RecordError, match="drawn from another prompt than this run's"):
        engine.generate([asked()], SAMPLING)


def test_paths_of_another_temperature_are_refused(replay):
    drawn = {**LINE, "temperature": 0.5}
    assert replay([drawn], temperature=0.5).generate([asked()], SAMPLING)
    assert replay([LINE], temperature=1.0).generate([asked()], SAMPLING)
    with pytest.raises(RecordError, match="line 1: drawn at temperature 0"):
        replay([drawn], temperature=1.0)


def test_a_gap_is_found_before_the_first_step_and_an_early_end_is_told(replay):
    def wanted(*steps):
        return [(step, "q", "prior", index) for step in steps for index in (0, 1)]

    both = [{**LINE, "step": step, "index": index} for step in (1, 2, 4) for index in (0, 1)]
    records = replay(both).records
    records.require(wanted(1, 2))
    assert records.notes == []
    with pytest.raises(RecordError, match="no path 0 of the prior stream of question 'q' for step"):
        records.require(wanted(1, 2, 3, 4))
    records.require(wanted(4, 5))
    (note,) = records.notes
    assert "the record ends with step 4; the run ends there with an error, unless a" in note
    assert "set train.steps 4, or give more paths" in note
    # A file whose lines serve every step does not end.
    bare = [{"question_id": "q", "stream": "prior", "ids": [7, 3]}]
    with pytest.raises(RecordError, match="no path 1 of the prior stream"):
        replay(bare).records.require(wanted(9))


LATE = [
    ({}, {"step": 1}, "no path 0 of the prior stream of question 'q' for step 2, expected a line"),
    ({"logps": [0.0]}, {}, "got 1 numbers as logps, expected 3, one per token"),
]


@pytest.mark.parametrize(("change", "place", "said"), LATE)
def test_a_path_that_cannot_be_used_is_refused_when_it_is_asked_for(replay, change, place, said):
    with pytest.raises(RecordError, match=said):
        replay([{**LINE, **change}]).generate([asked(**place)], SAMPLING)


def test_what_a_line_lacks_is_refused_where_it_is_needed(replay):
    lacking = {key: value for key, value in LINE.items() if key != "answer_ids"}
    del lacking["answer_logps"]
    with pytest.raises(RecordError, match="got no answer_ids"):
        replay([lacking]).generate([asked()], SAMPLING)
    # As a run without full answers writes it: judged, such a path would be wrong.
    unjudged = {**lacking, "answer_ids": [], "answer_logps": [], "correct": None}
    with pytest.raises(RecordError, match="got no answer_ids"):
        replay([unjudged]).generate([asked()], SAMPLING)
    bare = replace(SAMPLING, full_answer=False)
    assert replay([unjudged]).generate([asked()], bare)[0].z_ids.tolist() == [7, 8, 3]
    for known in ({"correct": False}, {"finish": "error"}):
        assert (
            not replay([{**unjudged, **known}]).generate([asked()], SAMPLING)[0].answer_ids.numel()
        )
    with pytest.raises(RecordError, match="got 1 numbers as answer_logps, expected 2"):
        replay([LINE], needs_logps=True).generate([asked()], SAMPLING)


def test_a_file_that_has_changed_is_noticed(replay, tmp_path):
    engine = replay([LINE])
    (tmp_path / "r.jsonl").write_text(json.dumps({**LINE, "question_id": "p"}) + "\n")
    with pytest.raises(RecordError, match="the file has changed since the run began"):
        engine.generate([asked()], SAMPLING)


def test_a_missing_path_ends_a_run_in_a_line(tiny_words, tmp_path, capsys):
    file = tmp_path / "r.jsonl"
    file.write_text(json.dumps(LINE) + "\n")
    words = tiny_words(SMALL)("run", "--engine", "replay", "--engine.paths", f"[{file}]")
    assert main(["train", str(TINY), *words]) == 2
    told = capsys.readouterr()
    (line,) = told.err.splitlines()
    assert not any("evaluating" in said for said in told.out.splitlines())  # no weight was read
    assert "engine.paths: got no path 0 of the posterior stream of question 'train-" in line
    assert "and 1 in all, of steps 1 to 1: record with metrics.paths_per_step" in line


def test_replay_without_a_file_is_refused():
    with pytest.raises(config.ConfigError, match=r"engine\.paths: got no file"):
        config.resolve({"engine": {"name": "replay"}})


def test_paths_of_another_program_train_without_log_probs(tiny_words, tmp_path):
    """hint-RFT from lines that hold ids alone: no mismatch is known, and none is made up."""
    words = tiny_words({**SMALL, "train.steps": 1})
    trained(words("run"))
    bare = ("question_id", "stream", "index", "ids", "answer_ids")
    record = [{key: line[key] for key in bare} for line in lines(tmp_path / "run/paths.jsonl")]
    (tmp_path / "bare.jsonl").write_text("".join(json.dumps(line) + "\n" for line in record))
    more = ["--objective", "hint_rft", "--engine", "replay"]
    more += ["--engine.paths", str(tmp_path / "bare.jsonl")]
    trained(words("live", "--objective", "hint_rft"))
    trained(words("bare", *more))
    (line,), (live,) = (lines(tmp_path / f"{run}/metrics.jsonl") for run in ("bare", "live"))
    assert "mismatch_max" not in line
    assert line["grad_norm"] > 0
    assert line["loss"] == live["loss"] > 0  # - mean log p, whoever drew the paths
    assert line["trunc_post"] == live["trunc_post"] > 0  # what a line does not say of its end
    assert weights(tmp_path / "bare") == weights(tmp_path / "live")
