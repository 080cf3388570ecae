"""Scale on paper: memory and traffic of one GPU for 1.5B, 7B and 32B models on 1, 8, 64, 512 GPUs.

    python benchmarks/scale_table.py --out benchmarks/results/scale_table.json

The estimator is that of `vpgea train --dry-run`, whose shards and collectives are checked to the
byte, and whose peaks within 10 % on a CPU, by tests/test_estimate.py. Nothing is measured here.

Every GPU runs `--micro-batches` full micro-batches a step and `--scoring` scoring passes. float32
weights, gradients and AdamW, bfloat16 forward, full activation checkpointing, nodes of 8. Beyond a
node each model is shown in one copy over all GPUs and in one copy a node (HSDP).

train         peak while training, GiB, the Hugging Face engine's whole bfloat16 replica included
no replica    the same with rollouts drawn elsewhere (a sharded or a remote engine)
paths         paths of up to --context tokens that can be sampled side by side in what is left
inside, between   GiB that one GPU receives in a step, from its node and from other nodes
network       time of that traffic at --inside-gbs and --between-gbs (GB/s a GPU), added up without
              any overlap, as a share of the compute of the step at --mfu of --tflops
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from vpgea_fast import config
from vpgea_fast.estimate import RESERVE, ModelShape, communication, estimate_memory, model_shape
from vpgea_fast.metrics import Console, environment

# Qwen2.5 as published, heads untied: what the R1 distillations of 1.5B, 7B and 32B have.
MODELS = {
    "1.5B": {
        "num_hidden_layers": 28,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
    },
    "7B": {
        "num_hidden_layers": 28,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
    },
    "32B": {
        "num_hidden_layers": 64,
        "hidden_size": 5120,
        "intermediate_size": 27648,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "vocab_size": 152064,
    },
}
GPUS = (1, 8, 64, 512)
NODE = 8
GIB = 2**30


def shape_of(name: str) -> ModelShape:
    settings = {"tie_word_embeddings": False, "max_position_embeddings": 131072}
    return model_shape(AutoConfig.for_model("qwen2", **MODELS[name], **settings))


def row(name: str, shape: ModelShape, gpus: int, copies: int, args: Any) -> dict[str, Any]:
    """One line of the table, sizes in GiB."""
    cfg = config.resolve(
        {
            "model": {"dtype": "bfloat16", "activation_checkpointing": "full"},
            "parallel": {"shard": "always", "replicas": copies},
            "train": {"micro_batch_tokens": args.tokens},
            "rollout": {"max_batch": 1},
        }
    )
    found = estimate_memory(shape, cfg, world=gpus, context=args.context, prompt=1024)
    peaks = {phase: sum(parts.values()) for phase, parts in found.phases.items()}
    train = max(size for phase, size in peaks.items() if phase != "sampling")
    sampling = found.phases["sampling"]
    each = sampling["kv cache"] + sampling["logits"]
    room = args.device_gib * GIB * (1 - RESERVE) - (peaks["sampling"] - each)
    moved = communication(
        shape,
        cfg,
        world=gpus,
        node=NODE,
        micro_batches=args.micro_batches,
        scoring_batches=args.scoring,
    )
    inside = sum(traffic.inside for traffic in moved.values())
    between = sum(traffic.between for traffic in moved.values())
    matmul = shape.parameters - shape.vocabulary * shape.hidden
    passes = 8 * args.micro_batches + 2 * args.scoring  # forward, its repetition, backward; forward
    compute = passes * matmul * args.tokens / (args.mfu * args.tflops * 1e12)
    network = inside / (args.inside_gbs * 1e9) + between / (args.between_gbs * 1e9)
    return {
        "model": name,
        "parameters": shape.parameters,
        "gpus": gpus,
        "copies": copies,
        "train_gib": train / GIB,
        "no_replica_gib": (train - sampling["sampling replica"]) / GIB,
        "fits": train <= args.device_gib * GIB * (1 - RESERVE),
        "paths": max(0, int(room // each)),
        "inside_gib": inside / GIB,
        "between_gib": between / GIB,
        "network_share": network / compute,
        "phases_gib": {
            phase: {part: size / GIB for part, size in parts.items()}
            for phase, parts in found.phases.items()
        },
        "traffic": {kind: vars(traffic) for kind, traffic in moved.items()},
    }


def table(args: Any) -> list[dict[str, Any]]:
    rows = []
    for name in MODELS:
        shape = shape_of(name)
        for gpus in GPUS:
            nodes = max(1, gpus // NODE)
            rows += [row(name, shape, gpus, copies, args) for copies in sorted({1, nodes})]
    return rows


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=16384, help="packed tokens a micro-batch")
    parser.add_argument("--micro-batches", type=int, default=8)
    parser.add_argument("--scoring", type=int, default=8)
    parser.add_argument("--context", type=int, default=9216)
    parser.add_argument("--device-gib", type=float, default=79.6, help="an H100 of 80 GB")
    parser.add_argument("--tflops", type=float, default=989.5)
    parser.add_argument("--mfu", type=float, default=0.4)
    parser.add_argument("--inside-gbs", type=float, default=450.0)
    parser.add_argument("--between-gbs", type=float, default=50.0)
    parser.add_argument("--out", type=Path, help="also write everything as JSON")
    args = parser.parse_args(words)
    rows = table(args)
    headers = ["model", "GPUs", "copies", "train", "no replica", "fits", "paths"]
    headers += ["inside", "between", "network"]
    cells = [
        [
            r["model"],
            str(r["gpus"]),
            str(r["copies"]),
            f"{r['train_gib']:.1f}",
            f"{r['no_replica_gib']:.1f}",
            "yes" if r["fits"] else "no",
            str(r["paths"]),
            f"{r['inside_gib']:.1f}",
            f"{r['between_gib']:.1f}",
            f"{r['network_share']:.0%}",
        ]
        for r in rows
    ]
    console = Console()
    console.close()
    console.table(headers, cells, notes=[f"GiB a GPU of {args.device_gib} GiB; see --help"])
    if args.out is not None:
        settings = {k: v for k, v in vars(args).items() if k != "out"}
        command = shlex.join(["python", "benchmarks/scale_table.py", *(words or sys.argv[1:])])
        done = {"command": command, "environment": environment(), "settings": settings}
        done["rows"] = rows
        args.out.write_text(json.dumps(done, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
