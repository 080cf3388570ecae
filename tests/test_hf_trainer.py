"""VPG-EA in Hugging Face's Trainer against this project's own trainer, on the tiny world.

Budgets: in float64 the gradient of a step is that of the own trainer within 1e-9 as one vector, and
that of two processes is that of one within 1e-9; a resumed run is the whole one bit for bit.
"""

import copy
import importlib
import importlib.util
import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset, IterableDataset
from ranks import run_ranks
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from vpgea_fast import config
from vpgea_fast.diagnostics import row_metrics
from vpgea_fast.hf_trainer import VPGEAConfig, VPGEATrainer
from vpgea_fast.trainer import Trainer

pytestmark = pytest.mark.hosts

TINY = Path(__file__).parents[1] / "configs/tiny.yaml"
PROMPT = {
    "student": "{question}",
    "teacher": "{question} hint {answer}",
    "think_prefix": "<think>",
    "answer_cue": "\\boxed",
    "answer_target": "{{answer} }",
    "answer_words": False,
}
SECTIONS = {
    "prompt": PROMPT,
    "objective": {"preset": "robust", "norm": "seq_sum"},
    "rollout": {"full_answer": True},
    "verify": {"name": "number"},
}
SMALL = {
    "use_cpu": True,
    "bf16": False,
    "report_to": [],
    "disable_tqdm": True,
    "save_strategy": "no",
    "logging_steps": 1,
    "max_steps": 1,
    "per_device_train_batch_size": 3,
    "num_generations": 4,
    "num_prior_generations": 2,
    "max_completion_length": 40,
    "max_answer_length": 6,
    "learning_rate": 1e-3,
    "max_grad_norm": 0.0,
    "beta": 1.0,
    "train_sampling_strategy": "sequential",
}


def rows_of(world, count=3):
    lines = world.train_path.read_text().splitlines()[:count]
    found = [json.loads(line) for line in lines]
    return [{"id": r["id"], "prompt": r["question"], "answer": r["answer"]} for r in found]


@pytest.fixture(scope="session")
def rows(tiny_world):
    return rows_of(tiny_world)


class Ears(TrainerCallback):
    """Keeps the gradient of each step, and what was called."""

    def __init__(self):
        self.gradients, self.heard = [], []

    def on_pre_optimizer_step(self, *_, model=None, **__):
        grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        self.gradients.append({n: grad.clone() for n, grad in grads.items()})

    def on_log(self, *_, logs=None, **__):
        self.heard.append({**logs})


@pytest.fixture
def make(tiny_model, tiny_tokenizer, rows, tmp_path):
    """`make(max_steps=3)` -> (a trainer, its `Ears`); each with a model of its own."""

    def made(*, dtype=torch.float32, data=None, sections=SECTIONS, out="out", **more):
        own = {
            key: more.pop(key)
            for key in ("eval_dataset", "reward_func", "peft_config")
            if key in more
        }
        model = more.pop("model", None)
        ears = Ears()
        trainer = VPGEATrainer(
            model=copy.deepcopy(tiny_model).to(dtype) if model is None else model,
            args=VPGEAConfig(str(tmp_path / out), **{**SMALL, "sections": sections, **more}),
            train_dataset=Dataset.from_list(rows) if data is None else data,
            processing_class=tiny_tokenizer,
            callbacks=[ears],
            **own,
        )
        return trainer, ears

    return made


def flat(named):
    return torch.cat([x.detach().flatten() for x in named.values()])


def error(got, expected):
    return float((flat(got) - flat(expected)).norm() / flat(expected).norm())


def weights(trainer):
    return dict(trainer.model.named_parameters())


# --- a step ---------------------------------------------------------------------------------------


def test_a_step_is_that_of_the_own_trainer(make, rows, tiny_words, tmp_path):
    """The same seeds draw the same paths; loss and gradient are those of `vpgea train`."""
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "data.train": json.dumps({"path": str(data), "question_key": "prompt"}),
        "model.dtype": "float64",
        "run.seed": 42,  # the Trainer's default
        "train.questions_per_step": 3,
        "train.steps": 1,
        "objective.group_size": 4,
        "objective.prior_samples": 2,
        "rollout.max_new_tokens": 40,
        "train.micro_batch_tokens": 200,
        "metrics.compare": "null",
    }
    with Trainer(config.load(TINY, tiny_words(settings)("own"))) as own:
        rollout = own.draw()
        logps = own.stages.gradients.accumulate(rollout.rows)
        policy = own.stages.policy.causal_lm
        expected = {name: p.grad.clone() for name, p in policy.named_parameters()}
        loss = row_metrics(rollout.rows, logps)["loss"]
        paths = {p.key: p.z_ids.tolist() for p in rollout.batch.posterior.flat}

    trainer, ears = make(dtype=torch.float64, micro_batch_tokens=300)
    drawn = trainer.method.draw([*trainer.train_dataset.prompted.values()], 0)
    assert {p.key: p.z_ids.tolist() for p in drawn.batch.posterior.flat} == paths
    assert len(drawn.rows) == len(rollout.rows) > 4
    trainer.train()
    assert ears.heard[0]["loss"] == pytest.approx(loss, rel=1e-6)
    assert error(ears.gradients[0], expected) < 1e-9


@pytest.mark.parametrize(
    "shape",
    [
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 3},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
        {"micro_batch_tokens": 30},
        {"gradient_checkpointing": False, "generation_batch_size": 5},
    ],
)
def test_no_gradient_hangs_on_how_a_step_is_cut(make, shape):
    """However many micro-batches, tokens of a forward, or paths decoded side by side."""
    expected = make(dtype=torch.float64)
    expected[0].train()
    trainer, ears = make(dtype=torch.float64, out="other", **shape)
    trainer.train()
    assert trainer.state.global_step == 1
    assert error(ears.gradients[0], expected[1].gradients[0]) < 1e-9


def on_two_ranks(base, out, rows):
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    args = VPGEAConfig(
        out, **{**SMALL, "sections": SECTIONS, "max_steps": 2, "per_device_train_batch_size": 2}
    )
    args_of = {"args": args, "processing_class": AutoTokenizer.from_pretrained(base)}
    data = Dataset.from_list(rows)
    trainer = VPGEATrainer(model=model, train_dataset=data, eval_dataset=data, **args_of)
    trainer.train()
    found = trainer.evaluate()
    torch.save(model.state_dict(), Path(out) / f"rank{args.process_index}.pt")
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    return {"losses": losses, "tokens": found["eval_sampled_tokens"]}


def test_two_processes_are_one(make, tiny_world, tmp_path):
    rows = rows_of(tiny_world, 8)
    data = Dataset.from_list(rows)
    alone, _ = make(
        dtype=torch.float64,
        data=data,
        eval_dataset=data,
        max_steps=2,
        per_device_train_batch_size=4,
    )
    alone.train()
    tokens = alone.evaluate()["eval_sampled_tokens"]
    losses = [line["loss"] for line in alone.state.log_history if "loss" in line]
    out = tmp_path / "ranks"
    out.mkdir()
    for rank, found in enumerate(run_ranks(on_two_ranks, str(tiny_world.base_dir), str(out), rows)):
        assert found["losses"] == pytest.approx(losses, rel=1e-6)
        assert found["tokens"] == tokens
        got = torch.load(out / f"rank{rank}.pt")
        assert error(got, alone.model.state_dict()) < 1e-9


def test_a_step_without_a_gradient_changes_nothing(make):
    """Every thought is cut after one token: none is accepted."""
    trainer, _ = make(max_completion_length=1, weight_decay=0.1, max_grad_norm=1.0)
    trainer.remove_callback(Ears)  # it looks for gradients, and there are none
    before = copy.deepcopy(weights(trainer))
    trainer.train()
    assert trainer.state.log_history[0]["gate_rate"] == 0.0
    assert trainer.state.global_step == 1
    assert error(weights(trainer), before) == 0.0


# Of the tied base: PEFT's own advice.
TIED = pytest.mark.filterwarnings(
    "ignore:Model has `tie_word_embeddings:UserWarning",
    "ignore:Setting `save_embedding_layers`:UserWarning",
)


@TIED
@pytest.mark.hosts("peft")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_an_adapter_is_trained_instead_of_the_model(make, checkpointing, tmp_path):
    """One of them on the head, its dropout off. Each gradient is that of the model's logits."""
    peft = importlib.import_module("peft")
    how = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "target_modules": ["q_proj", "lm_head"]}
    config = peft.LoraConfig(**how, task_type="CAUSAL_LM")
    keys = {"gradient_checkpointing": checkpointing, "save_strategy": "steps", "save_steps": 1}
    trainer, ears = make(dtype=torch.float64, peft_config=config, **keys)
    adapters = {n: p for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in adapters)
    with torch.no_grad():
        for p in adapters.values():  # off their start, where half of them have no gradient
            p.add_(torch.randn_like(p), alpha=0.1)
    drawn = trainer.method.draw([*trainer.train_dataset.prompted.values()], 0)
    loss = torch.zeros((), dtype=torch.float64)
    for row in drawn.rows:
        ids = torch.cat([row.context_ids, row.token_ids])
        logits_TV = trainer.model(ids[None]).logits[0, len(row.context_ids) - 1 : -1]
        logp_T = logits_TV.log_softmax(-1).gather(-1, row.token_ids[:, None])[:, 0]
        loss = loss + (row.coef * logp_T).sum()
    expected = torch.autograd.grad(loss, [*adapters.values()])
    trainer.train()
    got = {n: g for n, g in ears.gradients[0].items() if g is not None}
    assert got.keys() == adapters.keys()
    assert error(got, dict(zip(adapters, expected, strict=True))) < 1e-9
    saved = {path.name for path in (tmp_path / "out/checkpoint-1").iterdir()}
    assert "adapter_model.safetensors" in saved
    assert not saved & {"model.safetensors"}


@TIED
@pytest.mark.hosts("peft")
def test_adapters_that_cannot_be_trained_are_refused(make, tiny_model):
    peft = importlib.import_module("peft")
    plain = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    twice = peft.get_peft_model(copy.deepcopy(tiny_model), copy.copy(plain))
    for words, more in (
        ("peft_config: got one beside a PeftModelForCausalLM", {"model": twice}),
        ("no plain LoRA", {"use_dora": True}),
    ):
        model = more.pop("model", None)
        config = peft.LoraConfig(r=2, target_modules=["lm_head"], task_type="CAUSAL_LM", **more)
        with pytest.raises(ValueError, match=words) as caught:
            make(peft_config=config, model=model)
        assert "\n" not in str(caught.value)


def test_without_peft_it_says_what_to_install(make):
    if importlib.util.find_spec("peft") is not None:
        pytest.skip("PEFT is there")
    with pytest.raises(ImportError, match=r"peft is not there .*: pip install 'peft>=0\.21'"):
        make(peft_config=object())


# --- a run ----------------------------------------------------------------------------------------


def test_three_steps_train_log_and_resume_bit_for_bit(make, tmp_path):
    keys = {"max_steps": 3, "per_device_train_batch_size": 2, "weight_decay": 0.01}
    whole, ears = make(save_strategy="steps", save_steps=2, **keys)
    before = copy.deepcopy(weights(whole))
    whole.train()
    assert error(weights(whole), before) > 1e-4
    steps = [line for line in ears.heard if "loss" in line]
    assert len(steps) == 3
    for line in steps:
        assert line["loss"] == pytest.approx(line["loss_pg"] + line["loss_distill"], rel=1e-5)
        assert line["mismatch_mean"] == pytest.approx(1.0, abs=1e-4)
        assert 1 <= line["completions/min_length"] <= line["completions/mean_length"] <= 46
        assert {"reward", "reward_std", "len_post", "gate_rate", "time_rollout_s"} <= line.keys()

    saved = tmp_path / "out/checkpoint-2"
    again, ears = make(out="again", **keys)
    again.train(resume_from_checkpoint=str(saved))
    assert [line["loss"] for line in ears.heard if "loss" in line] == [steps[2]["loss"]]
    assert error(weights(again), weights(whole)) == 0.0
    kept = AutoModelForCausalLM.from_pretrained(saved)
    assert 0 < error(dict(kept.named_parameters()), weights(whole)) < 0.1


def test_a_log_of_several_steps_has_their_means(make):
    one, every = make(max_steps=2)
    two, ears = make(max_steps=2, logging_steps=2)
    one.train()
    two.train()
    (line,) = [line for line in ears.heard if "loss" in line]
    lines = [line for line in every.heard if "loss" in line]
    for key in ("loss", "len_post", "completions/mean_length"):
        assert line[key] == pytest.approx((lines[0][key] + lines[1][key]) / 2, rel=1e-5)


def test_autocast_draws_and_scores_alike(make):
    """In bfloat16 too the sampler's log-probs are the trainer's, to its rounding."""
    trainer, ears = make(bf16=True)
    trainer.train()
    line = ears.heard[0]
    assert 1e-5 < line["mismatch_max"] < 0.2
    assert line["mismatch_mean"] == pytest.approx(1.0, abs=0.02)
    assert {p.dtype for p in weights(trainer).values()} == {torch.float32}


def test_an_evaluation_says_accuracy_and_tokens(make, rows):
    data = Dataset.from_list(rows)
    keys = {"eval_strategy": "steps", "eval_steps": 1, "max_completion_length": 100}
    trainer, ears = make(eval_dataset={"one": data.select([0]), "all": data}, **keys)
    trainer.train()
    heard = {key: value for line in ears.heard for key, value in line.items() if "eval" in key}
    for name in ("one", "all"):
        for mode in ("sampled", "greedy"):
            assert 0 <= heard[f"eval_{name}_{mode}_acc"] <= 1
            assert 1 < heard[f"eval_{name}_{mode}_tokens"] <= 106
    found = trainer.evaluate(Dataset.from_list(rows[:1]))
    assert found["eval_greedy_tokens"] == trainer.evaluate(data.select([0]))["eval_greedy_tokens"]
    # The greedy answer by hand: token by token, judged by its text.
    prompter, decode = trainer.method.text.prompter, trainer.method.text.decode
    ids = prompter.student_ids([rows[0]["prompt"]])[0].tolist()
    drawn = []
    while len(drawn) < 100 and trainer.processing_class.eos_token_id not in drawn:
        logits = trainer.model(torch.tensor([ids + drawn])).logits[0, -1]
        drawn.append(int(logits.argmax()))
    assert found["eval_greedy_tokens"] == len(drawn)
    close = prompter.think_close_ids[0]
    answer = decode(torch.tensor(drawn[drawn.index(close) + 1 :])) if close in drawn else ""
    right = answer == f"\\boxed{{{rows[0]['answer']} }}"
    assert found["eval_greedy_acc"] == float(right)


def test_a_conversation_is_its_text(make, rows):
    turns = [{**row, "prompt": [{"role": "user", "content": row["prompt"]}]} for row in rows]
    plain, ears = make()
    chat, other = make(data=Dataset.from_list(turns), out="chat")
    for trainer in (plain, chat):
        trainer.train()
    assert ears.heard[0]["loss"] == other.heard[0]["loss"]
    assert error(ears.gradients[0], other.gradients[0]) == 0.0


def test_a_reward_function_judges(make, rows):
    """By TRL's signature: in training where answers are sampled, and in an evaluation."""
    calls = []

    def first_is_right(prompts, completions, completion_ids, answer, topic, **more):
        assert more == {"id": [row["id"] for row in rows_in(prompts)]}
        assert answer == [row["answer"] for row in rows_in(prompts)]
        assert set(topic) == {"sum"}
        assert all(len(ids) > 1 for ids in completion_ids)
        assert all(c[0]["role"] == "assistant" for c in completions)
        calls.append(len(prompts))
        return [float(p[0]["content"] == rows[0]["prompt"]) for p in prompts]

    def rows_in(prompts):
        known = {row["prompt"]: row for row in rows}
        return [known[p[0]["content"]] for p in prompts]

    data = Dataset.from_list(
        [
            {**row, "topic": "sum", "prompt": [{"role": "user", "content": row["prompt"]}]}
            for row in rows
        ]
    )
    keys = {"max_completion_length": 240, "data": data, "eval_dataset": data}
    trainer, ears = make(reward_func=first_is_right, **keys)
    trainer.train()
    line = ears.heard[0]
    paths = 3 * (4 + 2)
    assert line["rewards/first_is_right/mean"] == pytest.approx(
        (line["acc_teacher"] * 12 + line["acc_student"] * 6) / paths
    )
    assert 0 < line["rewards/first_is_right/mean"] <= 1 / 3
    assert trainer.evaluate()["eval_sampled_acc"] in (0.0, pytest.approx(1 / 3))
    assert len(calls) == 4  # both streams, both modes

    graded, _ = make(reward_func=lambda prompts, **_: [0.5] * len(prompts), **keys)
    with pytest.raises(ValueError, match=r"reward_func <lambda>: got 0.5, expected 1 for each"):
        graded.train()


# --- arguments ------------------------------------------------------------------------------------


def test_trls_parser_reads_the_arguments(tmp_path):
    trl = pytest.importorskip("trl", reason="needs TRL: pip install 'trl>=1.16,<1.17'")
    words = ["--output_dir", str(tmp_path), "--num_generations", "4", "--beta", "0.2"]
    words += ["--sections", '{"objective": {"preset": "robust"}}', "--use_cpu", "true"]
    (args,) = trl.TrlParser((VPGEAConfig,)).parse_args_into_dataclasses(words)
    assert (args.num_generations, args.beta) == (4, 0.2)
    assert args.sections == {"objective": {"preset": "robust"}}
    assert (args.learning_rate, args.bf16) == (1e-6, True)
    theirs = trl.GRPOConfig(str(tmp_path), use_cpu=True)
    for name in ("learning_rate", "logging_steps", "gradient_checkpointing", "bf16"):
        assert getattr(args, name) == getattr(theirs, name)
    shared = ("num_generations", "max_completion_length", "temperature", "top_p", "beta")
    assert all(hasattr(theirs, name) for name in shared)


ARGUMENTS = [
    ({"use_vllm": True}, "use_vllm: got True, expected False; the model that is trained samples"),
    ({"label_smoothing_factor": 0.1}, "label_smoothing_factor: got 0.1, expected 0.0"),
    ({"torch_compile": True}, "torch_compile: got True"),
    ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha: got 5.0"),
    ({"auto_find_batch_size": True}, "auto_find_batch_size: got True"),
    ({"train_sampling_strategy": "group_by_length"}, "expected 'random' or 'sequential'"),
    ({"num_generations": 1}, "num_generations: got 1, expected 2 or more"),
    ({"sections": {"optim": {}}}, "sections: got 'optim', expected some of rollout, objective"),
    ({"sections": {"objective": {"beta": 1.0}}}, "objective.beta, which is an argument; set beta"),
    ({"sections": {"objective": {"name": "grpo"}}}, "got objective.name 'grpo', expected 'vpgea'"),
    ({"sections": {"rollout": {"importance_cap": 2.0}}}, "rollout.importance_cap, which a Trainer"),
    ({"sections": {"objective": {"bata": 1.0}}}, "objective.bata: unknown key; did you mean"),
    ({"sections": [1]}, "sections: got [1], expected sections of keys"),
]


@pytest.mark.parametrize(("given", "words"), ARGUMENTS, ids=[w[:30] for _, w in ARGUMENTS])
def test_an_argument_that_is_not_served_is_named(given, words, tmp_path):
    with pytest.raises(ValueError) as caught:
        VPGEAConfig(str(tmp_path / "out"), **{**SMALL, **given})
    assert words in str(caught.value)
    assert not (tmp_path / "out").exists()


def stream():
    return IterableDataset.from_generator(lambda: iter([{"prompt": "1", "answer": "1"}]))


DATA = [
    (
        lambda: Dataset.from_dict({"prompt": ["1"]}),
        "train_dataset: no column 'answer' among prompt",
    ),
    (lambda: Dataset.from_dict({"question": ["1"], "answer": ["1"]}), "no column 'prompt' among"),
    (lambda: Dataset.from_dict({"prompt": [], "answer": []}), "train_dataset is empty"),
    (
        lambda: Dataset.from_dict({"prompt": ["1", " "], "answer": ["1", "1"]}),
        "train_dataset, row 2: expected the text of a question under 'prompt', got",
    ),
    (
        lambda: Dataset.from_dict(
            {"prompt": [[{"role": "system", "content": "Be brief."}]], "answer": ["1"]}
        ),
        "the turns ['system'], expected one user turn",
    ),
    (lambda: Dataset.from_dict({"prompt": ["1"], "answer": [""]}), "have an unusable answer"),
    (stream, "train_dataset: got IterableDataset, expected a Dataset with rows"),
]


@pytest.mark.parametrize(("data", "words"), DATA, ids=[w[:30] for _, w in DATA])
def test_rows_that_cannot_be_used_are_refused(make, data, words, tmp_path):
    with pytest.raises(ValueError, match=r"\A[^\n]*\Z") as caught:
        make(data=data())
    assert words in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_trained_is_refused(tiny_model, tiny_tokenizer, rows, tmp_path):
    data, args = Dataset.from_list(rows), VPGEAConfig(str(tmp_path), **SMALL, sections=SECTIONS)
    long = VPGEAConfig(str(tmp_path), **{**SMALL, "max_answer_length": 500}, sections=SECTIONS)
    bare = copy.deepcopy(tiny_tokenizer)
    bare.chat_template = None
    given = {"model": tiny_model, "args": args, "train_dataset": data}
    for changed, words in (
        ({"processing_class": bare}, "has no chat template"),
        ({"args": None, "train_dataset": None}, "train_dataset: got none, and no eval_dataset"),
        ({"eval_dataset": data, "args": long}, "positions, but the model has 512"),
        ({"args": object()}, "args: got object, expected a VPGEAConfig"),
        ({"reward_func": [len]}, "reward_func: got list, expected one function"),
        ({"model": tiny_model.model}, "has no head"),
    ):
        with pytest.raises(ValueError, match=r"\A[^\n]*\Z") as caught:
            VPGEATrainer(**{"processing_class": tiny_tokenizer, **given, **changed})
        assert words in str(caught.value)
