"""What a run writes and prints: valid JSON always, alarms that a replay raises again, eps3."""

import contextlib
import io
import json
import math
import os
import pty
import resource
import subprocess
import time
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    Gemma2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MixtralConfig,
    Qwen2Config,
    Qwen3Config,
)

from vpgea_fast.config import TrainConfig
from vpgea_fast.metrics import (
    Alarms,
    Console,
    MetricsWriter,
    PhaseTimer,
    clock_time,
    environment,
    eps3,
    eps3_mean,
    finite,
    mfu,
    missing_steps,
    model_flops,
    peak_flops,
    read_steps,
    step_line,
)
from vpgea_fast.values import merge


def no_constant(text):
    raise AssertionError(f"{text} is not JSON")


def test_lines_are_json_on_disk_at_once_and_hold_no_nan(tmp_path):
    inf, nan = math.inf, math.nan
    with MetricsWriter(tmp_path) as writer:
        writer.write({"step": 1, "u_post": -inf, "loss": nan, "lr": 1e-6, "skipped": None})
        writer.write({"step": 2, "kl_q_pi_max": 0.1 + 0.2})
        writer.write_paths([{"step": 1, "text": "é\n", "logps": [nan, -1.5, {"x": (inf, 2)}]}])
        lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
        path = (tmp_path / "paths.jsonl").read_text()
    records = [json.loads(line, parse_constant=no_constant) for line in lines]
    assert records == [
        {"step": 1, "u_post": None, "loss": None, "lr": 1e-6, "skipped": None},
        {"step": 2, "kl_q_pi_max": 0.1 + 0.2},
    ]
    assert json.loads(path, parse_constant=no_constant) == {
        "step": 1,
        "text": "é\n",
        "logps": [None, -1.5, {"x": [None, 2]}],
    }


@pytest.mark.parametrize("key", ["U_post", "cov LS", "p10.u", "länge", "", "1st"])
def test_metric_names_are_snake_case_ascii(tmp_path, key):
    with MetricsWriter(tmp_path) as writer, pytest.raises(ValueError, match="snake_case ASCII"):
        writer.write({"step": 1, key: 1.0})
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_a_full_disk_names_the_file_and_the_remedy(tmp_path):
    writer = MetricsWriter(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
    try:
        with pytest.raises(OSError, match=r"cannot append to .*metrics\.jsonl .*--resume"):
            writer.write({"step": 1, "loss": 0.123456789})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    writer.close()


def test_merge_loses_nothing_and_refuses_a_repeated_key():
    assert merge({"a": 1.0}, {}, {"b": None}) == {"a": 1.0, "b": None}
    assert merge() == {}
    with pytest.raises(ValueError, match="got len_post, loss twice"):
        merge({"loss": 1.0, "len_post": 2.0}, {"u": 0.0}, {"loss": 1.0, "len_post": 2.0})


def test_reading_skips_only_an_unfinished_last_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert list(read_steps(tmp_path)) == []
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3, "lo')
    assert list(read_steps(tmp_path)) == [{"step": 1}, {"step": 2}]
    path.write_text("")
    assert list(read_steps(tmp_path)) == []


@pytest.mark.parametrize(
    ("line", "got"),
    [
        (b'{"step": 2', "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[" * 9999, "not JSON"),
        (b"[1]", "got a list"),
        (b'{"step": null}', "got step None"),
        (b'{"step": true}', "got step True"),
        (b'{"step": 1e400}', "got step inf"),
        (b'{"step": -1}', "got step -1"),
        (b'{"loss": 1}', "got step None"),
    ],
)
def test_a_line_that_is_no_step_is_named(tmp_path, line, got):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 3}\n')
    with pytest.raises(ValueError, match=rf"metrics\.jsonl, line 2: {got}.*--resume take it out"):
        list(read_steps(tmp_path))


def test_missing_steps_are_named_in_few_words():
    assert missing_steps({1, 2, 3}, 3) == missing_steps([], 0) == ""
    assert missing_steps({3}, 5) == "1 to 2, 4 to 5"
    assert missing_steps(range(2, 101, 2), 100) == "1, 3, 5, 7, 9, 11, 13, 15, 42 more gaps"


def test_phase_times_add_up_over_a_step_and_wait_for_the_device():
    waits = []
    timer = PhaseTimer(synchronize=lambda: waits.append(1))
    for _ in range(2):
        with timer("rollout"):
            time.sleep(0.02)
    with pytest.raises(KeyError), timer("train"):
        raise KeyError
    times = timer.metrics()
    assert list(times) == ["time_rollout_s", "time_train_s"]
    assert 0.04 <= times["time_rollout_s"] < 2
    assert len(waits) == 2


RECORD = {
    "step": 12,
    "acc_student": 0.8125,
    "eps3_student": 122.4,
    "len_prior": 53.94,
    "len_gated": 60.0,
    "len_gated_ratio": 0.734,
    "gate_rate": 0.375,
    "time_rollout_s": 1.5,
    "time_train_s": 0.5,
}


def test_a_step_is_one_line_without_the_metrics_it_lacks():
    assert step_line({**RECORD, "grad_norm": math.nan}, 60, 96.0) == (
        "step 12/60  acc 0.812  eps3 122  prior 53.9  gated 0.73x  gate 38%  left 1:36"
    )
    assert [clock_time(s) for s in (0, 59.5, 3599.4, 3600)] == ["0:00", "1:00", "59:59", "1:00:00"]


def test_plain_console_prints_whole_lines_with_the_time_left():
    stream = io.StringIO()
    console = Console(60, done=11, stream=stream, quiet_s=-1.0)
    console.step(RECORD)
    console.step({**RECORD, "step": 13, "time_train_s": 2.5})
    advance = console.samples(30)
    for _ in range(10):
        advance(3)
    silent = Console(60, stream=stream).samples(30)
    silent(29)
    console.message("[not markup] " + "x" * 300)
    console.close()
    lines = stream.getvalue().splitlines()
    assert lines[0].endswith("left 1:36")  # 48 steps of 2 s
    assert lines[1].endswith("left 2:21")  # 47 steps of 3 s, the mean of the two
    assert lines[2:-1] == [f"samples {n}/30  left 0:00" for n in range(3, 30, 3)]
    assert lines[-1] == "[not markup] " + "x" * 300


def test_tables_are_aligned_escaped_and_fit_an_ascii_log():
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    rows = [["this run [red]", "81.2 -> 95.0"], ["GRPO", "-"]]
    Console(1, stream=stream).table(
        ["run", "accuracy %"], rows, title="closing", notes=["toy", "b" * 200]
    )
    stream.flush()
    text = raw.getvalue().decode("ascii")
    body = [line for line in text.splitlines() if "run" in line or "GRPO" in line]
    assert "this run [red]" in text
    assert len({len(line) for line in body}) == 1
    assert text.endswith("toy\n" + "b" * 200 + "\n")


def on_terminal(show):
    """What `show(stream)` writes to a terminal, all of it: one read gives what has arrived."""
    parent, child = pty.openpty()
    with os.fdopen(child, "w") as stream:
        show(stream)
    shown = b""
    with contextlib.suppress(OSError):  # the end of a terminal that nobody holds
        while part := os.read(parent, 100_000):
            shown += part
    os.close(parent)
    return shown.decode()


def test_a_terminal_gets_a_bar():
    def show(stream):
        console = Console(60, done=11, stream=stream)
        console.step(RECORD)
        console.samples(3)(3)
        console.close()

    shown = on_terminal(show)
    assert "left 1:36" in shown
    assert "12/60" in shown
    assert "1:36 left" in shown


def test_a_judge_is_watched_on_a_terminal_and_quiet_in_a_log():
    """What the judge does not tell of (verdicts that it knew) is added when it returns."""

    def judge(golds, on_progress):
        on_progress(len(golds[1:]))
        time.sleep(0.3)  # the bar is drawn ten times a second
        return [gold == "4" for gold in golds]

    def show(stream):
        console = Console(stream=stream)
        assert console.watched(judge, "reference answers")(["4", "5", "4"]) == [True, False, True]
        assert console.watched(judge, "nothing")([]) == []
        console.close()

    shown = on_terminal(show)
    assert "reference answers" in shown
    assert "2/3" in shown
    log = io.StringIO()
    console = Console(stream=log, quiet_s=math.inf)
    assert console.watched(judge, "reference answers")(["4"]) == [True]
    console.close()
    assert log.getvalue() == ""


def raised(records):
    alarms = Alarms()
    return [text for step, record in enumerate(records) for text in update(alarms, step, record)]


def update(alarms, step, record):
    return alarms.update({"step": step, **record})


def test_preflight_warns_once_at_the_fifth_step():
    below = [{"adv_post": value} for value in (0.1, -0.4, 0.1, 0.0, 0.1, -1.0, -1.0)]
    (text,) = raised(below)
    assert text.startswith("alarm at step 4: preflight")
    assert "prompt.teacher" in text
    assert raised([{"adv_post": value} for value in (-0.1, -0.1, -0.1, -0.1, 0.5, -9, -9)]) == []
    assert len(raised([{"adv_post": 0.0}] * 5)) == 1
    assert raised([{"adv_post": None}, {}] * 9) == []
    assert raised([{"adv_post": -1.0}] * 4) == []


def test_collapse_needs_a_fall_and_a_rise_beyond_the_noise():
    noise = [0.01, -0.01] * 5

    def run(accuracies, utilities):
        halves = zip(accuracies, utilities, strict=True)
        return raised(
            {"acc_student": acc + shake, "u_post": u + shake}
            for acc, u in halves
            for shake in noise
        )

    (text,) = run([0.9, 0.8], [-3.0, -1.0])
    assert "fell by" in text
    assert "objective.verify" in text
    assert run([0.9, 0.95], [-3.0, -1.0]) == []
    assert run([0.9, 0.8], [-1.0, -3.0]) == []
    assert run([0.9, 0.889], [-3.0, -1.0]) == []  # below two points
    assert raised([{"acc_student": 0.9 - 0.1 * (i > 9), "u_post": -1.0} for i in range(20)]) == []
    assert raised([{"acc_student": None, "u_post": i} for i in range(40)]) == []


def test_shares_above_their_limit_name_the_remedy():
    records = [{"share_cov_negative": 0.4, "trunc_prior": 0.21, "trunc_post": 0.2}] * 9
    cov, cut = raised(records)
    assert "40% of the questions" in cov
    assert "objective.alpha" in cov
    assert "21% of the student's paths" in cut
    assert raised(records[:4]) == []


def test_a_sampler_that_is_off_is_named():
    (text,) = raised([{"mismatch_mean": 1.051}] * 6)
    assert "is 1.051" in text
    assert "engine.fp32_head" in text
    assert raised([{"mismatch_mean": 1.049}] * 6) == []


EMPTY = {"skipped": 1, "grad_norm": 0.0, "groups_zero_var": 4, "groups_all_rejected": 0}
FULL = {"skipped": 0, "grad_norm": 0.5, "groups_zero_var": 1, "std_s": 0.3}
WHY = {
    "equal and right": {"std_s": 0.01, "acc_student": 1.0, "acc_teacher": 1.0},
    "was not finite": {"grad_norm": None, "std_s": 0.3},
    "engine.timeout_s": {"groups_zero_var": None},
    "every path was rejected": {"groups_all_rejected": 4, "std_s": 0.0, "acc_student": 0.9},
    "worth the same": {"std_s": 0.0, "acc_student": 0.5, "accept_rate": 1.0},
    "objective.std_gate": {"std_s": 0.3, "acc_student": 1.0},
}


def halts(records, **limits):
    alarms, found = Alarms(replace(TrainConfig(), **limits)), {}
    for step, record in enumerate(records, start=1):
        update(alarms, step, record)
        if alarms.halt:
            found[step] = alarms.halt
    return found


@pytest.mark.parametrize("why", WHY)
def test_a_run_that_learns_nothing_says_why_and_stops(why):
    idle = {**EMPTY, **WHY[why]}
    assert raised([idle] * 4) == []
    (text,) = raised([FULL] + [idle] * 24)
    assert text.startswith("alarm at step 5: ")
    assert "no update for 5 steps in a row (5 x " in text
    assert why in text
    assert ("converged" in text) == (why == "equal and right")
    assert halts([idle] * 24) == halts(([idle] * 24 + [FULL]) * 2) == {}
    found = halts([idle] * 50)
    assert [*found] == [25, 50]  # a resumed run begins to count anew
    assert why in found[25]
    assert halts([idle] * 99, idle_stop=None) == {}
    assert [*halts([idle] * 5, idle_stop=2)] == [2, 4]


def test_without_verified_answers_right_is_what_the_objective_accepts():
    equal = {**EMPTY, "std_s": 0.0}
    assert "converged" in halts([{**equal, "accept_rate": 1.0}] * 25)[25]
    assert "converged" not in halts([{**equal, "accept_rate": 0.9}] * 25)[25]


def test_the_reasons_of_a_stop_are_counted():
    mixed = [{**EMPTY, **WHY["equal and right"]}] * 5 + [{**EMPTY, **WHY["engine.timeout_s"]}] * 20
    (text,) = halts(mixed).values()
    assert text.startswith("no update for 25 steps in a row (20 x the engine gave up")
    assert "5 x all paths of each question were equal and right" in text


def test_a_sampler_that_is_far_off_stops_the_run():
    off, fine, none = ({"mismatch_mean": value} for value in (2.01, 2.0, None))
    (text,) = halts([off, {}, off, off]).values()  # a step without trained tokens has no mean
    assert "above train.mismatch_stop (2) for 3 steps in a row, the last time 2.01" in text
    assert halts([off, off, fine, off, off]) == {}
    assert [*halts([none] * 3)] == [3]  # infinity
    assert halts([off] * 9, mismatch_stop=None) == {}
    assert [*halts([off] * 4, mismatch_steps=2)] == [2, 4]
    assert "rollout.probe_every 1" in text


def test_answers_that_nobody_judged_are_told():
    none, some = {"verdicts_missing": 0}, {"verdicts_missing": 2}
    assert raised([none] * 9) == raised([some] * 4) == []
    (text,) = raised([some, *[none] * 9])
    assert "0.4 answers per step have no verdict and count as wrong; raise verify.timeout_s" in text


def test_a_record_that_is_far_off_stops_the_run_with_a_remedy_of_its_own():
    """No engine draws there, so nothing of it can be at fault."""
    alarms = Alarms(TrainConfig(), replays=True)
    for step in (1, 2, 3):
        update(alarms, step, {"mismatch_mean": 2.5})
    assert "moved too far from the one whose paths are recorded" in alarms.halt
    assert "lower optim.lr, make fewer steps, or set train.mismatch_stop null" in alarms.halt
    assert "engine" not in alarms.halt
    alarms = Alarms(replays=True)
    *_, (text,) = [update(alarms, step, {"mismatch_mean": 1.06}) for step in range(5)]
    assert "moved too far" in text
    assert "1.060; lower optim.lr, make fewer steps" in text
    assert "engine" not in text


numbers = st.none() | st.floats(-1, 1) | st.just(math.nan) | st.just(-math.inf)
watched = ["adv_post", "acc_student", "u_post", "share_cov_negative", "trunc_prior", "trunc_post"]
watched += ["mismatch_mean", "grad_norm", "groups_zero_var"]
observed = {**dict.fromkeys(watched, numbers), "skipped": st.sampled_from([0, 1, 1, 1])}


@given(
    st.lists(st.fixed_dictionaries({}, optional=observed), max_size=60),
    st.integers(0, 60),
)
def test_a_replayed_run_raises_what_the_uninterrupted_one_does(tmp_path_factory, records, cut):
    run_dir = tmp_path_factory.mktemp("run")
    records = [{"step": step, **record} for step, record in enumerate(records)]
    straight = Alarms()
    whole = [straight.update(record) for record in records]
    with MetricsWriter(run_dir) as writer:
        for record in records[:cut]:
            writer.write(record)
    resumed = Alarms()
    assert resumed.replay(run_dir) == [text for texts in whole[:cut] for text in texts]
    assert [resumed.update(record) for record in records[cut:]] == whole[cut:]
    assert resumed.halt == straight.halt


def test_eps3_is_the_published_figure():
    published = [(0.79, 978, 6.38), (0.806, 4887, 1.33), (0.902, 3674, 2.21), (0.535, 10306, 0.28)]
    for acc, tokens, figure in published:
        assert round(eps3(acc, tokens), 2) == figure
    assert eps3(0.0, 10) == 0
    assert math.isnan(eps3(0.5, 0))


def test_eps3_aggregations():
    mean_of_ratios, ratio_of_means = eps3_mean([(0.9, 900), (0.3, 9000)])
    assert mean_of_ratios == pytest.approx((9.0 + 0.1) / 2)
    assert ratio_of_means == pytest.approx(60.0**2 / 4950)
    assert eps3_mean([(0.5, 100)]) == (eps3(0.5, 100),) * 2
    with pytest.raises(ValueError, match="no benchmark"):
        eps3_mean([])


def test_finite_takes_numbers_only():
    assert [finite(v) for v in (1, 0.5, True, None, math.nan, math.inf, "1")] == [
        1.0,
        0.5,
        *[None] * 5,
    ]


def test_environment_is_json_and_names_the_checkout():
    found = environment()
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["torch"].split(".")[0].isdigit()
    git = ["git", "-C", os.path.dirname(__file__), "rev-parse", "HEAD"]  # noqa: PTH120
    head = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    assert found["commit"] is None or found["commit"].removesuffix("+changes") == head


QWEN_7B = {
    "hidden_size": 3584,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "intermediate_size": 18944,
    "vocab_size": 152064,
}
LLAMA_8B = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 128256,
}


def by_hand(hidden_size, layers, heads, kv_heads, head_size, mlp, matrices=3):
    """Query and output, key and value, and the MLP of every layer."""
    return layers * hidden_size * (2 * heads * head_size + 2 * kv_heads * head_size) + (
        layers * matrices * hidden_size * mlp
    )


def test_mfu_of_the_torchtitan_row():
    """Llama-3.1-8B at T 8192, 6,667 tokens a second and H100: 34.7 %, and 39.0 % where the other
    half of the attention is counted too."""
    flops = model_flops(LlamaConfig(**LLAMA_8B))
    seconds = 8192 / 6667
    assert mfu(flops.row(8192), seconds, "NVIDIA H100 80GB HBM3") == pytest.approx(0.347, abs=5e-4)
    whole = flops.row(8192) + 6 * flops.width * 8192**2
    assert mfu(whole, seconds, "NVIDIA H100 80GB HBM3") == pytest.approx(0.390, abs=5e-4)


@pytest.mark.parametrize(("rate", "share"), [(7310, 0.35), (8360, 0.40), (9400, 0.45)])
def test_mfu_of_the_qwen_row(rate, share):
    """Qwen2.5-7B with sum(l^2) / sum(l) = 8192, at tokens a second and GPU, on 8 GPUs."""
    flops = model_flops(Qwen2Config(**QWEN_7B))
    lengths = [8192] * 3
    done = flops.rows(lengths * 8)
    assert mfu(done, sum(lengths) / rate, "NVIDIA H200", devices=8) == pytest.approx(
        share, abs=1e-3
    )


def test_flops_count_every_matrix_once():
    small = {"num_hidden_layers": 2, "vocab_size": 100, "hidden_size": 64, "intermediate_size": 96}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    dense = by_hand(64, 2, 4, 2, 16, 96)
    for tied in (False, True):
        flops = model_flops(Qwen2Config(**small, **heads, tie_word_embeddings=tied))
        assert (flops.decoder, flops.head, flops.width) == (dense, 6400, 2 * 64)
    flops = model_flops(Qwen3Config(**small, **heads, head_dim=32))
    assert (flops.decoder, flops.width) == (by_hand(64, 2, 4, 2, 32, 96), 2 * 4 * 32)
    flops = model_flops(Gemma2Config(**small, **heads, head_dim=8))
    assert (flops.decoder, flops.head) == (by_hand(64, 2, 4, 2, 8, 96), 6400)
    flops = model_flops(GPTNeoXConfig(**small, num_attention_heads=4))
    assert flops.decoder == by_hand(64, 2, 4, 4, 16, 96, matrices=2)
    experts = model_flops(
        MixtralConfig(**small, **heads, num_local_experts=8, num_experts_per_tok=2)
    )
    router = 2 * 8 * 64
    assert experts.decoder == router + by_hand(64, 2, 4, 2, 16, 2 * 96)


def test_flops_of_rows_and_forwards():
    flops = model_flops(Qwen2Config(**QWEN_7B))
    lengths = [1, 17, 4096]
    per_token = 6 * (flops.decoder + flops.head)
    expected = sum(per_token * n + 6 * flops.width * n * n for n in lengths)
    assert flops.rows(lengths) == 3 * flops.forward_rows(lengths) == expected
    unheaded = [flops.forward_row(n, head_rows=0) for n in lengths]
    assert flops.forward_rows(lengths, [0, 5, 9]) == sum(unheaded) + 2 * flops.head * 14
    assert flops.rows([]) == 0


def test_an_unknown_device_has_no_peak_and_no_mfu():
    assert peak_flops("cpu") is None
    assert mfu(1e12, 1.0, "NVIDIA GeForce GTX 1080") is None
    assert peak_flops("NVIDIA H100 PCIe") < peak_flops("NVIDIA H100 80GB HBM3")
    assert mfu(1e12, 0.0, "NVIDIA H200") is None
