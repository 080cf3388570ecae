"""One step of TRL's GRPO or SFT with its own head and with ours, on the same rows: memory and time.

    python benchmarks/hosts_bench.py                                     # V = 32768, on a CPU
    python benchmarks/hosts_bench.py --out benchmarks/results/hosts_trl.json
    python benchmarks/hosts_bench.py --method sft --prompt 128 --completion 128

A random Qwen2 of --layers layers and rows of --prompt + --completion tokens; nothing is downloaded.
The step is the trainer's `training_step`, which makes log-probs, entropies, loss, metrics and
gradients; only sampling is left out. In SFT prompts have no labels.

Protocol. First both steps run once: the loss and the gradient, as one vector, must agree within
1e-5, or the run ends with status 1 and no time. Then the peak of what one step adds, by torch's
profiler (CUDA: its allocator). Then seconds, sampled in rounds of all variants, every second round
backwards, after warm-up rounds.

    trl      TRL's head: on a CPU it scores every position, on CUDA those of the completions
    ours     the same trainer inside `trl.enable(trainer)`
    decoder  the same trainer with a head that costs nothing: what a step takes besides
    head     the step less `decoder`, of medians
"""

from __future__ import annotations

import argparse
import contextlib
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from kernel_bench import Job, interleaved, peak_bytes, quantiles, version, write_json
from torch import Tensor

from vpgea_fast.integrations import trl as integration
from vpgea_fast.metrics import environment

BUDGET = 1e-5
"""Relative: of the loss, and of the gradient as one vector."""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    for name, default in {
        "vocabulary": 32768,
        "hidden": 512,
        "layers": 2,
        "rows": 8,
        "prompt": 64,
        "completion": 192,
        "repeats": 5,
        "warmup": 1,
    }.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--method", choices=("grpo", "sft"), default="grpo")
    parser.add_argument("--device", type=torch.device, default=None)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    args.device = args.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return args


# --- a trainer and its rows -----------------------------------------------------------------------


def made_trainer(args: argparse.Namespace, folder: str) -> Any:
    """A GRPOTrainer that takes rows as they are, or an SFTTrainer."""
    import trl
    from datasets import Dataset
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>"))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>"
    )
    alike: dict[str, Any] = {
        "output_dir": folder,
        "per_device_train_batch_size": args.rows,
        "gradient_accumulation_steps": 1,
        "use_cpu": args.device.type == "cpu",
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": [],
        "disable_tqdm": True,
    }
    if args.method == "sft":
        return trl.SFTTrainer(
            model=made_model(args),
            args=trl.SFTConfig(**alike),
            train_dataset=Dataset.from_dict({"input_ids": [[2, 3]], "labels": [[2, 3]]}),
            processing_class=tokenizer,
        )
    ready = {"_prepare_inputs": lambda _, inputs: inputs}
    settings = {"num_generations": args.rows, "max_completion_length": args.completion}
    return type("ReadyRows", (trl.GRPOTrainer,), ready)(
        model=made_model(args),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=trl.GRPOConfig(**alike, **settings),
        train_dataset=Dataset.from_dict({"prompt": ["?"]}),
        processing_class=tokenizer,
    )


def made_model(args: argparse.Namespace) -> Any:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=args.vocabulary,
        hidden_size=args.hidden,
        intermediate_size=2 * args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        tie_word_embeddings=False,
    )
    return Qwen2ForCausalLM(config).to(args.device)


def made_rows(args: argparse.Namespace) -> dict[str, Tensor]:
    """Prompts and completions of one length each, advantages of both signs."""
    drawn = torch.Generator().manual_seed(1)
    if args.method == "sft":
        shape = (args.rows, args.prompt + args.completion)
        ids = torch.randint(2, args.vocabulary, shape, generator=drawn).to(args.device)
        labels = ids.clone()
        labels[:, : args.prompt] = -100
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    found: dict[str, Tensor] = {}
    for name, tokens in (("prompt", args.prompt), ("completion", args.completion)):
        shape = (args.rows, tokens)
        found[f"{name}_ids"] = torch.randint(2, args.vocabulary, shape, generator=drawn)
        found[f"{name}_mask"] = torch.ones(shape, dtype=torch.int64)
    found["advantages"] = torch.randn(args.rows, generator=drawn)
    found["num_items_in_batch"] = torch.tensor(args.rows * args.completion)
    return {name: x.to(args.device) for name, x in found.items()}


# --- variants -------------------------------------------------------------------------------------


@contextlib.contextmanager
def free_head() -> Iterator[None]:
    """A head that costs nothing: one number a row, with a gradient to each hidden state."""
    from trl.trainer import utils

    class Free:
        @staticmethod
        def apply(hidden: Tensor, *more: Any) -> tuple[Tensor | None, ...]:
            logp, asked = hidden.float().mean(1), more[-1]
            free: dict[str, Tensor] = {name: logp.detach() for name in integration.OUTPUTS}
            free |= {"log_probs": logp, "is_top1": logp.detach() > 0}
            return tuple(free[x] if x in ("log_probs", *asked) else None for x in free)

    own = getattr(utils, integration.HOOK)
    setattr(utils, integration.HOOK, Free)
    try:
        yield
    finally:
        setattr(utils, integration.HOOK, own)


class StepJob(Job):
    """`training_step` in one variant's context."""

    def __init__(self, trainer: Any, rows: dict[str, Tensor], context: Callable[[], Any]) -> None:
        super().__init__(lambda _: None, None, "step")
        self.trainer, self.rows, self.context, self.value = trainer, rows, context, 0.0

    def prepare(self) -> None:
        self.trainer.model.zero_grad()

    def __call__(self) -> None:
        with self.context():
            # SFT divides by the labels of the step; GRPO has a count of its own in its rows.
            items = (self.rows["labels"] != -100).sum() if "labels" in self.rows else None
            loss = self.trainer.training_step(self.trainer.model, dict(self.rows), items)
        self.value = float(loss)


def variants(trainer: Any, rows: dict[str, Tensor]) -> dict[str, StepJob]:
    contexts = {
        "trl": contextlib.nullcontext,
        "ours": lambda: integration.enable(trainer),
        "decoder": free_head,
    }
    return {name: StepJob(trainer, rows, context) for name, context in contexts.items()}


def gaps(jobs: dict[str, StepJob]) -> tuple[float, float]:
    """(of the loss, of the gradient): ours to TRL's, relative."""
    found = []
    for name in ("trl", "ours"):
        job = jobs[name]
        job.prepare()
        job()
        grads = [p.grad.flatten() for p in job.trainer.model.parameters() if p.grad is not None]
        found.append((job.value, torch.cat(grads).clone()))
    (loss, gradient), (our_loss, our_gradient) = found
    scale = max(abs(loss), 1e-3)
    return abs(our_loss - loss) / scale, float((our_gradient - gradient).norm() / gradient.norm())


# --- the run --------------------------------------------------------------------------------------


def measured(jobs: dict[str, StepJob], args: argparse.Namespace) -> dict[str, Any]:
    peaks = {name: peak_bytes(job, args.device) for name, job in jobs.items()}
    samples: Any = interleaved(dict(jobs), args)
    times = {name: quantiles(values) for name, values in samples.items()}
    found: dict[str, Any] = {
        name: {"peak_mib": peaks[name] / 2**20, "seconds": times[name]} for name in jobs
    }
    median = {name: times[name][1] for name in jobs}
    for name in ("trl", "ours"):
        found[name]["head_seconds"] = median[name] - median["decoder"]
    found["peak_ratio"] = peaks["trl"] / peaks["ours"]
    found["step_ratio"] = median["trl"] / median["ours"]
    found["head_ratio"] = found["trl"]["head_seconds"] / found["ours"]["head_seconds"]
    return found


def table(found: dict[str, Any]) -> str:
    lines = [f"{'':8} {'peak MiB':>9} {'step s':>8} {'head s':>8}"]
    for name in ("trl", "ours", "decoder"):
        row = found[name]
        head = f"{row['head_seconds']:8.3f}" if "head_seconds" in row else ""
        lines.append(f"{name:8} {row['peak_mib']:9.0f} {row['seconds'][1]:8.3f} {head}".rstrip())
    ratios = " ".join(f"{k} {found[f'{k}_ratio']:.2f}x" for k in ("peak", "step", "head"))
    return "\n".join([*lines, f"TRL / ours: {ratios}"])


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    with tempfile.TemporaryDirectory(prefix="hosts_bench_") as folder:
        trainer = made_trainer(args, folder)
        trainer.current_gradient_accumulation_steps = 1
        jobs = variants(trainer, made_rows(args))
        loss, gradient = gaps(jobs)
        print(f"ours to TRL's: loss {loss:.1e}, gradient {gradient:.1e}, budget {BUDGET:.0e}")
        if not max(loss, gradient) <= BUDGET:  # `not`: NaN is refused
            print("no time: the numbers are not TRL's", file=sys.stderr)
            return 1
        found = measured(jobs, args)
    print(table(found))
    if args.out is not None:
        words = ["python", "benchmarks/hosts_bench.py", *(sys.argv[1:] if argv is None else argv)]
        protocol = {n: x for n, x in vars(args).items() if n not in ("out", "device")}
        result = {
            "command": shlex.join(words),
            "environment": {**environment(), "trl": version("trl")},
            "protocol": {**protocol, "threads": torch.get_num_threads()},
            "gaps": {"loss": loss, "gradient": gradient},
        }
        write_json(args.out, {**result, **found})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
