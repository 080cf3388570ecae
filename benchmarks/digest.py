"""Whether a change of the code moved a number: digests of small tiny runs, before and after.

    python benchmarks/digest.py --out before.json          # on the old code
    python benchmarks/digest.py --against before.json      # on the new; status 1 if anything moved

Each run is `vpgea train configs/tiny.yaml` for a few steps in processes of its own, and together
they pass every branch of the loop: both presets, GRPO, two ranks, importance weights, resampling,
answers drawn behind a thought, verified answers, evaluations. What is compared, bit for bit: every
tensor of the exported model, every record of paths.jsonl, every line of metrics.jsonl without what
a clock or the allocator says. `--renamed old=new` maps a key whose name has changed. The run with
vLLM, where that is installed, is not repeatable bit for bit: of it the largest difference of
log-probs, engine against trainer, must stay below VLLM_TOLERANCE.

Digests hold for one machine and one stack: other processors sum in another order.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open

from vpgea_fast.metrics import environment
from vpgea_fast.tiny import make_tiny

ROOT = Path(__file__).parents[1]
TIMED = (
    "time_",
    "tokens_per_s",
    "train_tokens_per_s",
    "samples_per_s",
    "peak_memory",
    "mfu",
    "guard_time_",
)
"""Keys that a clock or the allocator fills begin so."""
VLLM_TOLERANCE = 1.4e-5
SMALL = {
    "train.steps": 6,
    "train.questions_per_step": 4,
    "objective.group_size": 4,
    "rollout.max_new_tokens": 160,
    "metrics.diag_every": 2,
    "metrics.paths_per_step": 48,
    "metrics.compare": "null",
    "checkpoint.save_every": 3,
    "eval.every": 3,
    "eval.limit": 8,
    "eval.max_new_tokens": 160,
}
UNGUARDED = {"objective.leak_guard": "none"}
RUNS: dict[str, dict[str, Any]] = {
    "robust": UNGUARDED,
    "robust, guarded": {},
    "paper, importance weights": {
        "objective.preset": "paper",
        "rollout.importance_cap": 2.0,
        "objective.norm": "token_mean",
    },
    "robust, resampled and verified": {
        **UNGUARDED,
        "train.resample_rounds": 2,
        "objective.verify": "gate",
        "objective.norm": "const",
    },
    "robust, drawn answers": {
        **UNGUARDED,
        "scoring.u_source": "accuracy",
        "scoring.answer_samples": 3,
    },
    "grpo": {
        "objective.name": "grpo",
        "objective.alpha": 0.5,
        "objective.norm": "seq_mean",
        "objective.trains": "thought",
    },
    "robust, two ranks": {**UNGUARDED, "parallel.shard": "always"},
    "vllm": {**UNGUARDED, "engine.name": "vllm", "engine.kv_cache_gib": 0.125},
}


def main(argv: Sequence[str] | None = None) -> int:
    args = _arguments(argv)
    renamed = dict(pair.split("=", 1) for pair in args.renamed)
    old = json.loads(args.against.read_text(encoding="utf-8")) if args.against else None
    names = [name for name in RUNS if name != "vllm" or importlib.util.find_spec("vllm")]
    with tempfile.TemporaryDirectory(prefix="digest_") as scratch:
        world = make_tiny(Path(scratch) / "tiny")
        runs = {}
        for name in names:
            runs[name] = digest(run(name, world, Path(scratch)))
            print(f"{name:<32}{runs[name]['digest'][:16]}", flush=True)
    if args.out:
        facts = {"environment": environment(), "runs": runs}
        args.out.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    moved = [] if old is None else differences(old["runs"], runs, renamed)
    moved += [
        f"vllm: log-probs differ by {worst:.2g}, expected at most {VLLM_TOLERANCE}"
        for worst in [runs.get("vllm", {}).get("mismatch_max", 0.0)]
        if worst > VLLM_TOLERANCE
    ]
    for line in moved:
        print(line)
    if old is not None and not moved:
        print(f"nothing moved: {len(runs)} runs as in {args.against}")
    return int(bool(moved))


def run(name: str, world: Any, scratch: Path) -> Path:
    """Train in processes of its own; the run directory."""
    folder = scratch / name.replace(" ", "_").replace(",", "")
    settings = {
        "run.dir": folder,
        "model.path": world.base_dir,
        "data.train": world.train_path,
        "eval.data": f"[{world.test_path}]",
        **SMALL,
        **RUNS[name],
    }
    words = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    ranks = 2 if "two ranks" in name else 1
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command = [sys.executable, *(launch if ranks > 1 else []), "-m", "vpgea_fast.cli"]
    done = subprocess.run(
        [*command, "train", str(ROOT / "configs/tiny.yaml"), *words],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )
    if done.returncode:
        raise SystemExit(f"digest: {name} ended with {done.returncode}: {done.stderr[-3000:]}")
    return folder


def digest(folder: Path) -> dict[str, Any]:
    """Of a run directory: a digest of every tensor, of every step's paths, and the metrics."""
    weights = {}
    with safe_open(folder / "export/model.safetensors", framework="pt") as file:
        for key in sorted(file.keys()):
            weights[key] = _hash(file.get_tensor(key).contiguous().numpy().tobytes())
    metrics = [
        {k: v for k, v in json.loads(line).items() if not k.startswith(TIMED)}
        for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    paths = [
        json.loads(line)
        for line in (folder / "paths.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    evaluations = json.loads((folder / "eval.json").read_text(encoding="utf-8"))
    content = {"weights": weights, "metrics": metrics, "paths": paths, "eval": evaluations}
    worst = max((line.get("mismatch_max", 0.0) for line in metrics), default=0.0)
    text = json.dumps(content, sort_keys=True).encode()
    return {"digest": _hash(text), "mismatch_max": worst, **content}


def differences(
    old: Mapping[str, Any], new: Mapping[str, Any], renamed: Mapping[str, str]
) -> list[str]:
    """What is not the same, by name; runs that only one side has are named, too."""
    found = [f"{name}: only on one side" for name in sorted(old.keys() ^ new.keys())]
    for name in sorted((old.keys() & new.keys()) - {"vllm"}):
        pairs = [(part, old[name][part], new[name][part]) for part in ("weights", "eval")]
        for part in ("metrics", "paths"):
            before, after = old[name][part], new[name][part]
            if len(before) != len(after):
                found.append(f"{name}: {part}: {len(before)} records before, {len(after)} now")
            both = zip(before, after, strict=False)  # the lengths were compared
            pairs += [(f"{part}[{i}]", a, b) for i, (a, b) in enumerate(both)]
        for part, before, after in pairs:
            before = {
                renamed.get(key, key): value
                for key, value in before.items()
                if not key.startswith(TIMED)  # of a file that an older list of them wrote
            }
            for key in sorted(before.keys() | after.keys()):
                values = [json.dumps(side.get(key), sort_keys=True) for side in (before, after)]
                if values[0] != values[1]:
                    found.append(f"{name}: {part}: {key}: {values[0][:60]} -> {values[1][:60]}")
    return found


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="write digests and records there, as JSON")
    parser.add_argument("--against", type=Path, metavar="FILE", help="what --out wrote before")
    parser.add_argument(
        "--renamed", nargs="*", default=[], metavar="OLD=NEW", help="keys with another name now"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    raise SystemExit(main())
