"""Methods against each other on the tiny world: `vpgea sweep` on its configuration.

    vpgea make-tiny data/tiny
    python benchmarks/objective_bench.py --out benchmarks/results/tiny_demo.json

The runs lie in runs/bench_NAME, and the same command goes on with what is missing there.
docs/sweep.md says how rates are picked. A run is short if it ends (sampled) with at most SHORT
tokens and at least the base's accuracy minus one point. Constructed task: it shows the mechanism,
not the paper's result.

    python benchmarks/objective_bench.py --reevaluate benchmarks/results/tiny_demo.json

makes the rows of a file again from its runs by these rules. Runs of before the split have one
benchmark: their rate is picked on the questions that are reported, and the file says so.
`--table FILE` prints the rows as they stand, as the table of the pages.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from vpgea_fast.cli import main as vpgea
from vpgea_fast.metrics import environment

ROOT = Path(__file__).parents[1]
METHODS = {
    "demo (robust, beta 1)": "vpgea",
    "paper preset": "vpgea:preset=paper,beta=0.5",
    # As VPG-EA is trained here: thoughts alone, the sum over their tokens.
    "GRPO + length factor": "grpo:group_size=12,alpha=0.5,trains=thought,norm=seq_sum,"
    "eta_clip=[0.25, 4.0],std_gate=0.05,eps=1e-3",
    # As many paths, from the teacher's view alone; sums as well, so that no length is favoured.
    "hint-RFT": "hint_rft:group_size=12,trains=thought,norm=seq_sum",
}
LABELS = {
    "demo (robust, beta 1)": "VPG-EA, preset `robust`, beta 1",
    "paper preset": "VPG-EA, the literal preset `paper`",
    "GRPO + length factor": "GRPO with the same length factor",
    "hint-RFT": "Hint-RFT, the teacher's verified paths",
}
RATES = {"hint-RFT": ("6.25e-5", "1.25e-4", "2.5e-4", "5e-4")}
"""Grids to begin with. hint-RFT forgets how to answer at the rates of the others."""
COMMON_RATES = ("5e-4", "1e-3", "2e-3")
SHORT = 22
"""Mean tokens, answer included, up to which a run may count as short; a concise chain has 21."""
NOTE = "constructed task: it shows the mechanism, not the paper's result"


def main(argv: Sequence[str] | None = None) -> None:
    words = list(sys.argv[1:] if argv is None else argv)
    args = _arguments(words)
    if args.table:
        print("\n".join(table(known(args.table, "--table")["rows"])))
        return
    command = shlex.join(["python", "benchmarks/objective_bench.py", *words])
    file = args.reevaluate or args.out
    result: dict[str, Any]
    if args.reevaluate:
        facts = {"command": command, "commit": environment()["commit"]}
        result = known(file, "--reevaluate") | {"reevaluated": facts}
    else:
        result = measure(args) | {"command": command}
    result |= evaluated(result["runs"])
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for row in result["rows"]:
        print(json.dumps(row))


def table(rows: Sequence[Any]) -> list[str]:
    """The rows as Markdown: means over seeds before and after, in % and in tokens."""
    (runs,) = {row["runs"] for row in rows}
    heads = ["run", "sampled accuracy", "sampled tokens", "sampled eps3", "greedy accuracy"]
    cells = [[*heads, f"short runs, of {runs}"]]
    for row in rows:
        greedy = _arrow(row, "greedy", "acc", 1, scale=100).replace("100.0", "100")
        accuracy = _arrow(row, "sampled", "acc", 1, scale=100)
        counts = [_arrow(row, "sampled", "tokens", 1), _arrow(row, "sampled", "eps3", 0)]
        label, short = str(LABELS.get(row["method"], row["method"])), str(row["short_runs"])
        cells.append([label, f"{accuracy} %", *counts, f"{greedy} %", short])
    head, *lines = [f"| {' | '.join(line)} |" for line in cells]
    return [head, "|---" * len(cells[0]) + "|", *lines]


def _arrow(row: Any, mode: str, key: str, digits: int, scale: int = 1) -> str:
    return " → ".join(f"{scale * row[when][mode][key]:.{digits}f}" for when in ("before", "after"))


def evaluated(runs: Sequence[Any]) -> dict[str, Any]:
    from vpgea_fast.sweep import evaluate  # imports transformers, 3 s that --table need not wait

    return evaluate(runs, short=SHORT)


def known(file: Path, option: str) -> dict[str, Any]:
    """An earlier result; one line and status 2 for a file that is none."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if option == "--table":
            table(found["rows"])
        else:
            evaluated(found["runs"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        stop(f"{option} {file}: {error!r}; expected a file that --out wrote, with its runs")
    return found


def stop(why: str) -> NoReturn:
    print(f"objective_bench: {why}", file=sys.stderr)
    raise SystemExit(2)


def measure(args: Any) -> dict[str, Any]:
    """Run a sweep per grid, in one folder; return all runs and the base that they began from."""
    from vpgea_fast.sweep import origin

    grids: dict[tuple[str, ...], list[str]] = {}
    for name in args.methods:
        rates = tuple(args.rates or RATES.get(name, COMMON_RATES))
        grids.setdefault(rates, []).append(name)
    results = [sweep(args, rates, names) for rates, names in grids.items()]
    base = json.loads((args.world / "base/tiny_base.json").read_text(encoding="utf-8"))["measured"]
    runs = [run for one in results for run in one["runs"]]
    # The notes are of one sweep's rows alone.
    facts = {key: value for key, value in results[-1].items() if key != "notes"}
    return facts | origin(runs) | {"runs": runs, "base": base}


def sweep(args: Any, rates: Sequence[str], methods: Sequence[str]) -> dict[str, Any]:
    folder, world = Path("runs") / f"bench_{args.out.stem}", args.world
    words = ["sweep", str(args.config), "--out", str(folder), "--short", str(SHORT)]
    words += ["--methods", *(f"{name}={METHODS[name]}" for name in methods)]
    words += ["--rates", *rates, "--seeds", *map(str, args.seeds)]
    words += ["--extend", str(args.extend), "--metrics.note", NOTE]
    words += [] if args.jobs is None else ["--jobs", str(args.jobs)]
    words += ["--model.path", f"{world}/base", "--data.train", f"{world}/train.jsonl"]
    status = vpgea([*words, "--eval.data", f"{world}/test.jsonl"])
    if status:
        raise SystemExit(status)
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


def _arguments(argv: Sequence[str]) -> Any:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0], allow_abbrev=False)
    parser.add_argument("--config", type=Path, default=ROOT / "configs/tiny.yaml")
    parser.add_argument("--world", type=Path, default=Path("data/tiny"), help="of make-tiny")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--rates", nargs="+", help="first grid of all")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--extend", type=int, default=3, help="as of vpgea sweep")
    parser.add_argument("--jobs", type=int, help="as of vpgea sweep")
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--out", type=Path, help="where the measured runs and rows are written")
    target.add_argument("--reevaluate", type=Path, metavar="FILE", help="rows anew from its runs")
    target.add_argument("--table", type=Path, metavar="FILE", help="print its rows as Markdown")
    args = parser.parse_args(argv)
    reads = "--table" if args.table else "--reevaluate"
    idle = [word for word in argv if word.startswith("--") and reads not in word]
    if not args.out and idle:
        stop(f"got {idle[0]} with {reads}, which measures nothing; leave it out")
    return args


if __name__ == "__main__":
    main()
