"""The closing table, the figure and the report: every number from a file, every gap said."""

import base64
import json
import re
import statistics
import time
import tracemalloc
from html.parser import HTMLParser

import matplotlib.image
import numpy as np
import pytest
import yaml

from vpgea_fast.report import (
    POINTS,
    Line,
    Log,
    ReportError,
    closing_notes,
    closing_table,
    plot_training,
    write_report,
)


def result(acc, tokens, **more):
    eps3 = (100 * acc) ** 2 / tokens
    return {
        "acc": acc,
        "acc_low": acc - 0.02,
        "acc_high": acc + 0.02,
        "tokens": tokens,
        "eps3": eps3,
        "eps3_mean": eps3,
        "truncated": 0.015,
        "n": 800,
        **more,
    }


BEFORE = {"sampled": result(0.812, 53.9), "greedy": result(0.95, 19), "step": 0}
AFTER = {"sampled": result(0.93, 17.2), "greedy": result(0.9625, 17), "step": 60}
COMPARE = {
    "rows": [{"name": "GRPO <eta>", "before": BEFORE, "after": {"sampled": result(0.5, 500)}}],
    "note": "best rate of three",
    "command": "vpgea train x.yaml",
    "commit": "1234abc",
}


def write_run(run_dir, *, steps=60, evaluation=None, compare=None, note=""):
    run_dir.mkdir(exist_ok=True)
    config = {
        "run": {"seed": 3},
        "objective": {"name": "vpgea", "preset": "robust", "alpha": 0.5},
        "metrics": {"note": note, "compare": compare and str(compare)},
    }
    (run_dir / "config.yaml").write_text(yaml.safe_dump(config))
    if evaluation is not None:
        (run_dir / "eval.json").write_text(json.dumps(evaluation))
    lines = [
        {
            "step": step,
            "len_prior": 54 - 0.6 * step,
            "len_post": 40 - 0.3 * step,
            "len_gated": None if step % 7 == 0 else 25.0,
            "len_gated_ratio": None if step % 7 == 0 else 0.8,
            "acc_student": 0.8 + 0.002 * step,
            "eps3_student": 100 + 5 * step,
            "adv_post": -0.5,
            "skipped": None,
        }
        for step in range(1, steps + 1)
    ]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run_dir


@pytest.fixture
def compare(tmp_path):
    path = tmp_path / "compare.json"
    path.write_text(json.dumps(COMPARE))
    return path


def test_the_table_shows_the_run_and_the_committed_rows_alike(tmp_path, compare):
    run_dir = write_run(
        tmp_path / "run", evaluation={"before": BEFORE, "after": AFTER}, compare=compare
    )
    headers, rows = closing_table(run_dir)
    assert headers == [
        "run",
        "answers",
        "accuracy %",
        "95 % interval",
        "tokens",
        "eps3",
        "cut %",
        "samples",
    ]
    own = "this run: vpgea, preset robust"
    assert rows == [
        row.split("|")
        for row in (
            f"{own}|sampled|81.2 -> 93.0|91.0 to 95.0|53.9 -> 17.2|122 -> 503|1.5 -> 1.5|800",
            f"{own}|greedy|95.0 -> 96.2|94.2 to 98.2|19.0 -> 17.0|475 -> 545|1.5 -> 1.5|800",
            "GRPO <eta>|sampled|81.2 -> 50.0|48.0 to 52.0|53.9 -> 500.0|122 -> 5|1.5 -> 1.5|800",
            "GRPO <eta>|greedy|95.0 -> -|-|19.0 -> -|475 -> -|1.5 -> -|-",
        )
    ]


def test_the_note_names_every_guard_and_the_time_of_the_one_that_takes_some(tmp_path):
    """Means over the steps that say it, by hand; a run without a guard says nothing."""
    run_dir = write_run(tmp_path / "run", steps=0)
    assert closing_notes(run_dir) == []
    section = {"name": "vpgea", "leak_guard": "max_kl", "lexical": True, "len_min_frac": 0.05}
    (run_dir / "config.yaml").write_text(yaml.safe_dump({"objective": section}))
    steps = [
        {"guard_caught": 0.1, "lexical_caught": 0.5, "short_caught": 0.0, "time_guard_ratio": 0.2},
        {"guard_caught": 0.2, "lexical_caught": 0.25, "short_caught": 0.0, "time_guard_ratio": 0.4},
        {"guard_caught": None},
    ]
    lines = [json.dumps({"step": number, **step}) for number, step in enumerate(steps, 1)]
    (run_dir / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (note,) = closing_notes(run_dir)
    assert note == (
        "of the teacher's paths leak_guard max_kl rejected 15.0%, lexical rejected 37.5%, "
        "len_min_frac 0.05 rejected 0.0%; leak_guard took 30.0% of the time"
    )
    # Without a leak guard the others took nothing that is told.
    del section["leak_guard"]
    (run_dir / "config.yaml").write_text(yaml.safe_dump({"objective": section}))
    (run_dir / "metrics.jsonl").write_text('{"step": 1, "lexical_caught": 0.5}\n')
    assert closing_notes(run_dir) == ["of the teacher's paths lexical rejected 50.0%"]


def test_several_benchmarks_show_both_aggregations(tmp_path):
    after = {"sampled": result(0.6, 4950, eps3=4.55, eps3_mean=0.727)}
    run_dir = write_run(tmp_path / "run", evaluation={"after": after})
    headers, ((*cells,),) = closing_table(run_dir)
    assert cells[headers.index("eps3")] == "- -> 4.55"
    assert cells[headers.index("eps3 of means")] == "- -> 0.727"


def test_the_notes_name_the_origin_of_every_row(tmp_path, compare):
    run_dir = write_run(tmp_path / "run", compare=compare, note="constructed task")
    assert closing_notes(run_dir) == [
        "constructed task",
        "best rate of three",
        f"the other runs: {compare} (commit 1234abc, command vpgea train x.yaml)",
    ]
    write_run(run_dir, compare=tmp_path / "gone.json")
    assert closing_notes(run_dir) == [
        f"committed rows are missing: there is no file {tmp_path / 'gone.json'}"
    ]
    write_run(run_dir)
    assert closing_notes(run_dir) == []


def test_no_evaluation_gives_no_rows(tmp_path, compare):
    headers, rows = closing_table(write_run(tmp_path / "run", compare=compare))
    assert headers[0] == "run"
    assert rows == []


class Page(HTMLParser):
    """Collects the text, the tags, and the addresses that a page loads."""

    def __init__(self, html):
        super().__init__()
        self.text, self.tags, self.sources = "", [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data):
        self.text += data


def test_the_report_is_one_whole_escaped_file(tmp_path, compare):
    run_dir = write_run(
        tmp_path / "run",
        evaluation={"before": BEFORE, "after": AFTER},
        compare=compare,
        note="<script>alert(1)</script>",
    )
    (run_dir / "environment.json").write_text(json.dumps({"commit": "1234abc", "torch": None}))
    html = write_report(run_dir).read_text("utf-8")
    page = Page(html)
    assert "script" not in page.tags
    assert "<script>alert(1)</script>" in page.text
    assert "GRPO <eta>" in page.text
    assert "122 -> 503" in page.text
    assert "alarm at step 5: preflight" in page.text
    assert re.search(r"len_prior\s*52.2\s*19.2\s*18\s*53.4", " ".join(cells(html)))
    assert "objective.alpha" in page.text
    assert "1234abc" in page.text
    (source,) = page.sources
    prefix = "data:image/png;base64,"
    assert source.startswith(prefix)
    embedded = base64.b64decode(source.removeprefix(prefix))
    assert embedded == (run_dir / "training.png").read_bytes()


def cells(html):
    return re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", html)


def test_a_bare_run_gives_a_partial_report_that_says_so(tmp_path):
    run_dir = write_run(tmp_path / "run", steps=0)
    (run_dir / "metrics.jsonl").unlink()
    page = Page(write_report(run_dir).read_text("utf-8"))
    for words in ("not evaluated", "No step was recorded", "None was raised", "is missing"):
        assert words in page.text
    assert page.sources == []
    with pytest.raises(ReportError, match=r"metrics\.jsonl has no step"):
        plot_training(run_dir, run_dir / "x.png")


BROKEN = [
    ("eval.json", "{", "is not JSON"),
    ("eval.json", "", "is not JSON.*or remove it"),
    ("eval.json", "[" * 9999, "is not JSON.*or remove it"),
    ("eval.json", "[]", "got a list, expected a JSON object"),
    ("eval.json", '{"after": [1]}', r"after: got \[1\], expected keys"),
    ("eval.json", '{"before": null}', "before: got None, expected keys"),
    ("eval.json", '{"after": {"sampled": 0.5, "step": 1}}', "after: got 0.5, expected keys"),
    ("eval.json", '{"after": {"step": null}}', "after: got step None, expected a number"),
    ("environment.json", "[]", "expected a JSON object"),
    ("config.yaml", "a: [", "is not YAML"),
    ("config.yaml", "", "got an empty file"),
    ("config.yaml", "objective: 3", "objective: got 3, expected keys"),
    ("metrics.jsonl", "nonsense\n{}\n", "line 1: not JSON"),
    ("metrics.jsonl", '{"step": null}\n', "line 1: got step None"),
]


@pytest.mark.parametrize(("name", "text", "message"), BROKEN)
def test_a_broken_file_is_named(tmp_path, name, text, message):
    run_dir = write_run(tmp_path / "run", steps=1)
    (run_dir / name).write_text(text)
    with pytest.raises(ValueError, match=rf"{re.escape(name)}.*{message}"):
        write_report(run_dir)
    assert not (run_dir / "report.html").exists()


def test_a_directory_that_is_no_run_and_rows_that_are_none(tmp_path, compare):
    with pytest.raises(ReportError, match=r"no run: config\.yaml is missing"):
        write_report(tmp_path)
    compare.write_text(json.dumps({"rows": [{"before": BEFORE}]}))
    run_dir = write_run(tmp_path / "run", evaluation={"after": AFTER}, compare=compare)
    with pytest.raises(ReportError, match="name, before and after"):
        closing_table(run_dir)


def test_lines_that_are_missing_are_said(tmp_path):
    run_dir = write_run(tmp_path / "run", steps=9)
    file = run_dir / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    assert "no line of steps" not in write_report(run_dir).read_text()
    file.write_text("".join(lines[:3] + lines[5:]))
    assert "metrics.jsonl has no line of steps 4 to 5" in write_report(run_dir).read_text()


def test_a_line_of_many_steps_has_few_points():
    line, exact = Line(), Line()
    for step in range(1, 10 * POINTS + 4):
        line.add(step, step % 3)
    steps, values = line.points()
    assert POINTS // 2 <= len(steps) <= POINTS
    assert line.width == 16
    assert steps == sorted(steps)
    assert steps[0] == statistics.fmean(range(1, 17))
    assert values[0] == statistics.fmean(step % 3 for step in range(1, 17))
    assert sum(count for *_, count in line.bins) == 10 * POINTS + 3
    assert sum(total for _, total, _ in line.bins) == sum(s % 3 for s in range(10 * POINTS + 4))
    for step in range(POINTS):
        exact.add(step, step / 7)
    assert exact.points() == ([*range(POINTS)], [step / 7 for step in range(POINTS)])
    smooth = exact.points(reach=1)[1]
    assert smooth[:2] == [statistics.fmean([0, 1 / 7]), statistics.fmean([0, 1 / 7, 2 / 7])]


@pytest.mark.slow
def test_time_and_memory_of_a_report_are_linear_in_the_steps(tmp_path):
    """100,000 lines took 185 s and 5.7 GB when each point had a window of its own; now 7.3 s and
    13 MB, measured on one core."""
    record = {f"metric_{i}": 0.1 * i for i in range(60)}
    record |= {"len_prior": 5.0, "len_post": 4.0, "acc_student": 0.5, "eps3_student": 2.0}
    spent, peak = {}, {}
    for steps in (5_000, 20_000):
        run_dir = write_run(tmp_path / str(steps), steps=0)
        with (run_dir / "metrics.jsonl").open("w") as file:
            for step in range(1, steps + 1):
                file.write(json.dumps({"step": step, **record}) + "\n")
        began = time.process_time()
        write_report(run_dir)
        spent[steps] = time.process_time() - began
        tracemalloc.start()
        Log(run_dir)
        peak[steps] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert spent[20_000] < 5 * spent[5_000]
    assert peak[20_000] < 2.5 * peak[5_000] < 2.5 * 5e6  # of the lines the steps' numbers alone


def colours(png):
    pixels = (255 * matplotlib.image.imread(png)[..., :3]).round().astype(int).reshape(-1, 3)
    found = {tuple(pixel) for pixel in np.unique(pixels, axis=0).tolist()}
    palette = {"prior": (0, 114, 178), "posterior": (213, 94, 0), "gated": (0, 158, 115)}
    return {name for name, colour in palette.items() if colour in found}


def test_the_figure_draws_what_was_recorded_and_leaves_out_what_was_not(tmp_path):
    full = write_run(tmp_path / "full", steps=100, evaluation={"before": BEFORE, "after": AFTER})
    assert colours(plot_training(full, tmp_path / "full.png")) == {"prior", "posterior", "gated"}
    bare = write_run(tmp_path / "bare")
    (bare / "metrics.jsonl").write_text('{"step": 1, "len_prior": 51.0, "len_post": null}\n')
    assert colours(plot_training(bare, tmp_path / "bare.png")) == {"prior"}
    # a mean over all questions says nothing beside len_post
    (bare / "metrics.jsonl").write_text('{"step": 1, "len_prior": 51.0, "len_gated": 60.0}\n')
    assert colours(plot_training(bare, tmp_path / "bare.png")) == {"prior"}


def test_metrics_explain_themselves_under_the_pointer(tmp_path):
    run_dir = write_run(tmp_path / "run", steps=3)
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 4, "len_prior": 1.0, "of_another_version": 1.0}) + "\n")
    page = write_report(run_dir).read_text()
    text = "Mean thought length of the student&#x27;s paths, cut ones included. [tokens]"
    assert f'<td title="{text}">len_prior</td>' in page
    assert "<td>of_another_version</td>" in page
