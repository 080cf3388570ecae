"""Whole GRPO steps (rollout, score, train, sync): ours beside TRL's GRPOTrainer.

    python benchmarks/step_bench.py                     # the tiny base, one thread
    python benchmarks/step_bench.py --model 40m         # 40M parameters, V = 32768
    python benchmarks/step_bench.py --quick             # seconds: whether it runs

Ours is the project's Trainer with objective grpo and engine hf. TRL's draws with transformers'
`generate`. Both have the same weights, prompts, rewards and lengths of paths, so both generate and
train equally many tokens. Lengths are log-normal, as those of reasoning are; `--sigma 0` makes them
equal. No token but the last ends a path (step_engines.py).

Protocol. TRL is first given the paths that ours drew. Log-probs and gradients of both, of TRL
through its own rewards, advantages and loss, are compared with float64 of transformers' plain
forward. One that is off ends the run with status 1 and no time. Then steps are sampled in rounds,
one of each, every second round backwards, after warm-up rounds. The learning rate is so small that
the same step comes again.

tok/s    generated tokens over the seconds of the whole step
added    what one step adds to what was alive before it, at its highest: gradients, activations,
         keys and values. CUDA: the allocator's; CPU: torch's profiler
held     parameters and states of the optimiser
rest     of a profiled step: what is no operation of torch, so Python and dispatch; on CUDA an idle
         device
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import quiet  # noqa: F401 - before torch
import torch
from kernel_bench import (
    CEILING,
    Failure,
    interleaved,
    peak_bytes,
    quantiles,
    version,
    watched,
    write_json,
)
from op_kinds import profiled, shares
from random_model import model_folder
from step_engines import PARTS, Lengths, Ours, Trl, exact
from train_bench import BUDGET, free_memory, held_bytes, number, parameters, verdict
from train_variants import MODELS
from transformers import Qwen2Config

from vpgea_fast import config
from vpgea_fast.metrics import Console, environment
from vpgea_fast.tiny import make_tiny
from vpgea_fast.trainer import Trainer

ROOT = Path(__file__).parents[1]
SIZES: dict[str, dict[str, Any]] = {
    # The base writes 33 to 63 tokens, and their logarithm has the standard deviation 0.67.
    "tiny": {"questions": 16, "mean": 63, "budget": 4096, "threads": 1},
    "40m": {"questions": 4, "mean": 64, "budget": 4096},
    **{
        name: {"questions": 8, "mean": 512, "budget": 16384, "checkpointing": "full"}
        for name in MODELS
        if name not in ("tiny", "40m")
    },
}
"""model -> what is not given. `tiny` is the base that the package ships, the others random."""
QUICK = {"questions": 2, "group": 2, "mean": 8, "repeats": 1, "warmup": 0}


class Job:
    """Steps of one engine: `prepare` outside the clock, the call inside; phases of all calls."""

    loss = None  # what `interleaved` drops after a sample

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.history: list[dict[str, float]] = []

    def prepare(self) -> None:
        self.engine.clear()

    def __call__(self) -> None:
        self.engine.step()
        self.history.append(self.engine.parts)


# --- correctness ----------------------------------------------------------------------------------


def check(ours: Ours, trl: Trl, args: Any) -> dict[str, dict[str, Any]]:
    """Both on the paths that ours drew: status, reason, errors of log-probs and gradient.

    Against float64. TRL has the ceilings of eager torch; ours may lose twice what TRL loses, or
    what a train phase may (train_bench.py).
    """
    made, rows = ours.gradient()
    if len(rows) != len(trl.inputs):
        raise RuntimeError(f"our step trains {len(rows)} rows, expected {len(trl.inputs)} paths")
    # Rows stand question by question, as TRL's prompts do.
    theirs = trl.gradient([row.token_ids.tolist() for row in rows], rows)
    truth, world = exact(trl.path, rows, ours.trainer.world.device), ours.trainer.world
    ceiling, floor = CEILING[getattr(torch, args.dtype)], BUDGET[args.dtype]
    peer = verdict(theirs, truth, (ceiling[0], ceiling[2]), world)
    lost = (peer["error_logp"], peer["error_gradient"])
    mine = verdict(made, truth, (max(floor[0], 2 * lost[0]), max(floor[1], 2 * lost[1])), world)
    return {"ours": mine, "TRL": peer}


# --- time and memory ------------------------------------------------------------------------------


def measure(engines: dict[str, Any], args: Any) -> dict[str, Any]:
    """Records of both engines, and the ratio of their times by round."""
    jobs = {name: Job(engine) for name, engine in engines.items()}
    with watched(args.device) as clock:
        samples = interleaved(jobs, args)
    lost = {name: spent for name, spent in samples.items() if isinstance(spent, Failure)}
    if lost:
        raise SystemExit(f"step_bench: {', '.join(f'{n}: {f.reason}' for n, f in lost.items())}")
    tokens = {name: engine.tokens for name, engine in engines.items()}
    if len({*tokens.values()}) > 1:
        raise SystemExit(f"step_bench: unequal work, {tokens} generated tokens")
    records = [record(name, jobs[name], samples[name], args) for name in jobs]
    pairs = zip(samples["TRL"], samples["ours"], strict=True)
    rounds = [theirs / mine for theirs, mine in pairs]
    by = {r["engine"]: r for r in records}
    return {
        "records": records,
        "faster": by["TRL"]["p50_s"] / by["ours"]["p50_s"],
        "faster_by_round": rounds,
        "added_of_trl": by["ours"]["added_mib"] / by["TRL"]["added_mib"],
        "peak_of_trl": by["ours"]["peak_mib"] / by["TRL"]["peak_mib"],
        "clock": clock,
    }


def record(name: str, job: Job, spent: Any, args: Any) -> dict[str, Any]:
    p20, p50, p80 = quantiles(spent)
    history = job.history[-args.repeats :]
    added = peak_bytes(job, args.device) / 2**20
    held = held_bytes(job.engine) / 2**20
    job.prepare()
    return {
        "engine": name,
        "tokens": job.engine.tokens,
        "p20_s": p20,
        "p50_s": p50,
        "p80_s": p80,
        "seconds": list(spent),
        "tokens_per_s": job.engine.tokens / p50,
        "added_mib": added,
        "held_mib": held,
        "peak_mib": added + held,
        **{f"{part}_s": statistics.median(h[part] for h in history) for part in PARTS},
        "kinds": profiled(job, args.device) if args.kinds else None,
    }


# --- the run --------------------------------------------------------------------------------------


def closing_words(result: dict[str, Any], model: str) -> list[str]:
    """Who is faster, by how much and at which peak, and where the rest of the time goes."""
    by = {r["engine"]: r for r in result["records"]}
    ours, trl, cuda = by["ours"], by["TRL"], result["environment"]["device"] != "cpu"
    factor, rounds = result["faster"], result["faster_by_round"]
    who, times = ("ours", factor) if factor >= 1 else ("TRL", 1 / factor)
    rates = f"ours {ours['tokens_per_s']:.0f} tok/s, TRL {trl['tokens_per_s']:.0f}"
    spread = f"by round {min(rounds):.2f} to {max(rounds):.2f}"
    alone = f"gradients alone are {4 * result['parameters'] / 2**20:.0f}"
    added = f"{ours['added_mib']:.0f} MiB, {result['added_of_trl']:.2f} of TRL's ({alone})"
    whole = f"{ours['peak_mib']:.0f} beside {trl['peak_mib']:.0f}"
    lines = [
        f"{model}: {who} is {times:.2f}x as fast: {rates} ({spread})",
        f"{model}: our step adds {added}; with parameters and optimiser {whole}",
    ]
    for one in (ours, trl):
        parts = {part: one[f"{part}_s"] / one["p50_s"] for part in PARTS}
        said = ", ".join(f"{p} {share:.0%}" for p, share in parts.items() if share >= 0.005)
        lines.append(f"{one['engine']}: {said} of {one['p50_s']:.3f} s")
        for place, words in (("rollout", "rollout"), ("outside", "beside the rollout")):
            if one["kinds"]:
                lines.append(f"  {words}: {shares(one['kinds'][place], cuda=cuda)}")
    products = sum(place["products"] for place in (ours["kinds"] or {}).values())
    if products:
        bound = trl["p50_s"] / products
        lines.append(
            f"{model}: our matrix products take {products:.3f} s; alone they would be "
            f"{bound:.1f}x as fast as TRL's step"
        )
    return lines


def show(result: dict[str, Any], args: Any, console: Console) -> None:
    keys = ("p50_s", "p20_s", "p80_s", "tokens_per_s", "added_mib", "held_mib")
    keys = (*keys, *(f"{part}_s" for part in PARTS))
    heads = ("step of", "p50 s", "p20", "p80", "tok/s", "added MiB", "held", *PARTS)
    rows = [[r["engine"], *(number(r[key]) for key in keys)] for r in result["records"]]
    paths = args.questions * args.group
    console.table(heads, rows, title=f"one GRPO step of {paths} paths, {args.model}, {args.dtype}")


def config_of(args: Any, model: Path, train: Path, run: Path) -> config.Config:
    """Our run: GRPO as TRL has it by default, without diagnoses, evaluations and exports."""
    keys = {
        "run.dir": run,
        "run.threads": args.threads or torch.get_num_threads(),
        "model.path": model,
        "model.dtype": args.dtype,
        "model.device": args.device.type,
        "model.activation_checkpointing": args.checkpointing,
        "model.compile": str(args.compile).lower(),
        "data.train": train,
        "verify.name": "text",
        "objective.name": "grpo",
        "objective.group_size": args.group,
        "objective.norm": "seq_mean",
        "objective.alpha": 0.0,
        "objective.eps": 1e-4,  # TRL's
        "objective.ddof": 1,
        "rollout.max_new_tokens": Lengths(args.mean, args.sigma).longest,
        "rollout.max_batch": args.questions * args.group,
        "optim.lr": 1e-9,
        "train.questions_per_step": args.questions,
        "train.micro_batch_tokens": args.budget,
        "eval.data": "[]",
        "metrics.diag_every": 0,
        "metrics.compare": "null",
        "checkpoint.export": "false",
    }
    words = [word for key, value in keys.items() for word in (f"--{key}", str(value))]
    return config.load(str(ROOT / "configs/tiny.yaml"), words)


def rows_per_batch(paths: int, widest: int, budget: int) -> int:
    """TRL's rows a micro-batch: as many as fill the budget when padded, in equal parts."""
    fits = [n for n in range(1, paths + 1) if paths % n == 0 and n * widest <= budget]
    return max(fits, default=1)


def run(args: Any, console: Console, words: Sequence[str]) -> int:
    place = environment()
    place["peers"] = {name: version(name) for name in ("trl", "accelerate")}
    console.message(
        f"{place['device']}, torch {place['torch']}, TRL {place['peers']['trl']}, "
        f"commit {place['commit']}"
    )
    if place["peers"]["trl"] is None:
        console.message("step_bench: trl is not installed: there is nothing to compare with")
        return 2
    with tempfile.TemporaryDirectory(prefix="step_bench_") as folder, ExitStack() as stack:
        ours, trl = opened(args, Path(folder), stack)
        place["threads"] = torch.get_num_threads()
        checked = check(ours, trl, args)
        for name, found in checked.items():
            console.message(
                f"{name} on the same paths: {found['status']}, off float64 by "
                f"{found['error_logp']:.1e} nats and {found['error_gradient']:.1e} of the "
                f"gradient  {found['reason']}".rstrip()
            )
        if any(found["status"] != "ok" for found in checked.values()):
            console.message("nothing is timed: both must train the same first")
            return 1
        result = {
            "command": shlex.join(["python", "benchmarks/step_bench.py", *words]),
            "environment": place,
            "settings": settings_of(args),
            "trl_batch": len(trl.inputs) // trl.micro_batches,
            "parameters": sum(p.numel() for _, p in ours.parameters()),
            "correctness": checked,
            **measure({"ours": ours, "TRL": trl}, args),
        }
    show(result, args, console)
    result["words"] = closing_words(result, args.model)
    write_json(args.out, result)
    for line in [*result["words"], f"wrote {args.out}"]:
        console.message(line)
    return 0


def opened(args: Any, folder: Path, stack: ExitStack) -> tuple[Ours, Trl]:
    """Both engines, with the same model, prompts and lengths; files go into `folder`."""
    world = make_tiny(folder / "world")
    model = model_folder(args.model, folder / "model")
    cfg = config_of(args, model, world.train_path, folder / "run")
    lengths = Lengths(args.mean, args.sigma, args.seed)
    trainer = stack.enter_context(Trainer(cfg))
    ours = Ours(trainer, lengths)
    widest = lengths.longest + max(ids.numel() for _, ids in ours.prompts)
    fitting = rows_per_batch(args.questions * args.group, widest, args.budget)
    trl = Trl(
        str(model),
        cfg,
        trainer.world,
        prompts=ours.prompts,
        lengths=lengths,
        group=args.group,
        batch=args.trl_batch or fitting,
    )
    return ours, trl


def settings_of(args: Any) -> dict[str, Any]:
    return {k: v for k, v in vars(args).items() if isinstance(v, (int, float, str, list))}


def arguments(argv: Sequence[str] | None) -> Any:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--model", choices=list(SIZES), default="tiny")
    parser.add_argument("--questions", type=int, help="of a step; tiny: 16")
    parser.add_argument("--group", type=int, help="paths per question; 8")
    parser.add_argument("--mean", type=int, help="tokens of a path; tiny: 63")
    parser.add_argument("--sigma", type=float, default=0.6, help="of the log of a length")
    parser.add_argument("--budget", type=int, help="tokens a forward of training; tiny: 4096")
    parser.add_argument("--trl-batch", type=int, help="TRL's rows a micro-batch; by the budget")
    parser.add_argument("--dtype", choices=list(BUDGET), default="bfloat16" if cuda else "float32")
    parser.add_argument("--checkpointing", choices=["none", "selective", "full"])
    parser.add_argument("--compile", action="store_true", help="ours with model.compile")
    parser.add_argument("--repeats", type=int, help="rounds; 7")
    parser.add_argument("--warmup", type=int, help="rounds that are not counted; 1")
    parser.add_argument("--threads", type=int, help="of a CPU; tiny: 1, else torch's choice")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--kinds",
        action=argparse.BooleanOptionalAction,
        default=not cuda,  # hundreds of thousands of kernels take minutes to sort
        help="profile a step of each: where its time goes; CUDA: not by default",
    )
    parser.add_argument("--quick", action="store_true", help="four short paths, one round")
    parser.add_argument("--out", type=Path, default=Path("runs/step_bench.json"))
    args = parser.parse_args(argv)
    args.device = torch.device("cuda" if cuda else "cpu")
    usual = {"group": 8, "repeats": 7, "warmup": 1, "checkpointing": "none"}
    for key, value in {**usual, **SIZES[args.model], **(QUICK if args.quick else {})}.items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    if min(args.questions, args.repeats) < 1 or args.group < 2 or args.mean < 2:
        parser.error("--questions, --repeats: expected at least 1; --group, --mean: at least 2")
    if args.sigma < 0:
        parser.error(f"--sigma: got {args.sigma}, expected 0 or more")
    if args.trl_batch and args.questions * args.group % args.trl_batch:
        parser.error(f"--trl-batch: got {args.trl_batch}, expected a divisor of the paths")
    memory = torch.cuda.get_device_properties(0).total_memory if cuda else free_memory()
    # Weights, gradients and two moments in float32, of both.
    if 2 * 16 * parameters(Qwen2Config(**MODELS[args.model])) > memory:
        parser.error(f"{args.model} does not fit this machine's memory twice; take a smaller one")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """0; 1 when the two do not train the same, 2 without TRL."""
    args = arguments(argv)
    console = Console()
    try:
        return run(args, console, sys.argv[1:] if argv is None else argv)
    finally:
        console.close()


if __name__ == "__main__":
    sys.exit(main())
