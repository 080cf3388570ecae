"""The reference policy: what it scores and draws, where it lies, and what cannot be one."""

import gc
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from runs import words_of

from vpgea_fast import config
from vpgea_fast.dry_run import dry_run
from vpgea_fast.model import Policy
from vpgea_fast.model_dir import ModelError
from vpgea_fast.objectives import Grpo, Term, Terms
from vpgea_fast.objectives.surrogate import Surrogate
from vpgea_fast.trainer import Trainer

TINY = Path(__file__).parents[1] / "configs/tiny.yaml"


@pytest.fixture(scope="module")
def words(tiny_world, tmp_path_factory):
    """Command-line words of a run of held.py, with a rate at which two steps move the policy."""
    root = tmp_path_factory.mktemp("reference")

    def make(name, *more):
        settings = {
            "objective.name": "custom",
            "objective.target": "held:Held",
            "train.questions_per_step": 2,
            "train.steps": 2,
            "optim.lr": 0.003,
            "optim.warmup_steps": 0,
            "rollout.max_new_tokens": 24,
            "checkpoint.export": "false",
        }
        return [*words_of(settings, tiny_world, root / name), *more]

    return make


@pytest.fixture(scope="module")
def alone(words):
    """What a run of one process drew, and its directory."""
    return moves(run := words("device")), Path(run[1])


def drawn(groups):
    return [path.response_ids.tolist() for group in groups for path in group]


def policies():
    # By type: isinstance would ask deprecated objects of torch for their class.
    return sum(issubclass(type(found), Policy) for found in gc.get_objects())


def moves(words):
    """Two steps; what policy and reference draw before and after, of the same seeds; what is
    written. With ranks, of each."""
    with Trainer(config.load(TINY, words)) as trainer:
        collector = trainer.stages.collector
        questions = collector.questions[:2]
        before = drawn(collector.sample_reference(questions, 9))
        own = drawn(collector.sample(questions, 9)[1])
        for _ in range(2):
            trainer.finish_step(trainer.train_step())
        moved = drawn(collector.sample(questions, 9)[1])
        models = policies()
        after = drawn(collector.sample_reference(questions, 9))
        # What was read from disk is gone, though FSDP's units refer to each other.
        assert policies() <= models
        # The engine has the policy's weights again.
        again = drawn(collector.sample(questions, 9)[1])
    return {"before": before, "after": after, "own": own, "moved": moved, "again": again}


def lines(run_dir, name="metrics.jsonl"):
    text = (Path(run_dir) / name).read_text()
    return [json.loads(line) for line in text.splitlines()]


EXACT = ("loss", "grad_norm", "kl_reference", "utility", "len_prior", "len_reference")


def test_the_reference_stays_while_the_policy_moves(words, alone):
    """It draws the same paths, scores before the weights are known, and lies where it may."""
    found, run = alone
    assert found["before"] == found["after"]
    assert found["moved"] != found["own"]
    assert found["again"] == found["moved"]
    first, second = lines(run)
    assert first["kl_reference"] == 0.0 < second["kl_reference"]
    # U is the policy's, and at the first step the reference is the policy.
    assert first["std_s"] <= 1e-5 < second["std_s"]
    assert first["len_reference"] > 0.0
    assert first["utility"] < 0.0
    assert 0.0 <= first["acc_reference"] <= 1.0
    assert {path["stream"] for path in lines(run, "paths.jsonl")} == {"prior", "reference"}
    disk = words("disk", "--model.reference", "disk")
    assert moves(disk) == found
    for ours, want in zip(lines(disk[1]), (first, second), strict=True):
        assert {key: ours[key] for key in EXACT} == {key: want[key] for key in EXACT}


def test_two_ranks_hand_its_weights_to_the_engine_and_take_them_back(words, alone):
    """Sharded it has no module that could draw; the numbers are those of one process."""
    _, run = alone
    shards = words("two", "--model.reference", "disk")
    first, second = run_ranks(moves, shards)
    assert first == second
    assert first["before"] == first["after"]
    assert first["moved"] == first["again"] != first["own"]
    for ours, want in zip(lines(shards[1]), lines(run), strict=True):
        for key in EXACT:
            assert ours[key] == pytest.approx(want[key], rel=1e-4, abs=1e-6), key
    assert lines(shards[1])[0]["kl_reference"] == 0.0


def test_a_resumed_run_and_another_model_as_the_reference(words, tmp_path, tiny_model, tiny_world):
    """A resume reads the model that the run began with, not its checkpoint."""
    other = tmp_path / "other"
    with torch.no_grad():
        for parameter in tiny_model.parameters():
            parameter.mul_(1.01)
    tiny_model.save_pretrained(other)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (other / name).write_bytes((Path(tiny_world.base_dir) / name).read_bytes())
    run = words("cut")
    with Trainer(config.load(TINY, run)) as trainer:
        collector = trainer.stages.collector
        before = drawn(collector.sample_reference(collector.questions[:1], 9))
        for _ in range(2):
            trainer.finish_step(trainer.train_step())
    cfg = config.load(Path(run[1]) / "config.yaml", ["--train.steps", "3"])
    with Trainer(cfg, resume=True) as trainer:
        collector = trainer.stages.collector
        assert drawn(collector.sample_reference(collector.questions[:1], 9)) == before
        assert trainer.train_step().metrics["kl_reference"] > 0.0
    with Trainer(config.load(TINY, words("held", "--model.reference_path", str(other)))) as trainer:
        assert trainer.train_step().metrics["kl_reference"] > 0.0


def test_what_cannot_be_a_reference_is_refused_before_anything_is_loaded(
    words, tmp_path, random_qwen2, tiny_world
):
    """By a run and a dry run, in one line; a run without a reference does not look."""
    small = tmp_path / "small"
    random_qwen2(vocab=97).save_pretrained(small)
    spelled = tmp_path / "spelled"
    spelled.mkdir()
    for file in Path(tiny_world.base_dir).iterdir():
        (spelled / file.name).write_bytes(file.read_bytes())
    text = (spelled / "tokenizer.json").read_text()
    vocabulary = json.loads(text)["model"]["vocab"]
    one, two = sorted(vocabulary, key=vocabulary.get)[-2:]
    tree = json.loads(text)
    tree["model"]["vocab"][one], tree["model"]["vocab"][two] = vocabulary[two], vocabulary[one]
    (spelled / "tokenizer.json").write_text(json.dumps(tree))
    for path, said in {
        tmp_path / "gone": "no model directory at",
        small: "but that of model.path is",
        spelled: "numbers 2 tokens otherwise",
    }.items():
        cfg = config.load(TINY, words("run", "--model.reference_path", str(path)))
        for start in (lambda cfg: Trainer(cfg), lambda cfg: dry_run(cfg, lambda _: None)):
            with pytest.raises(ModelError, match=said) as error:
                start(cfg)
            assert "\n" not in str(error.value)
            assert str(path) in str(error.value)
        assert not Path(cfg.run.dir).exists()
    cfg = config.load(TINY, words("run", "--model.reference_path", str(small)))
    dry_run(replace(cfg, objective=Grpo()), lambda _: None)


def test_a_live_term_whose_needs_do_not_name_the_reference_is_refused(words):
    with (
        Trainer(config.load(TINY, words("silent", "--objective.asks", "false"))) as trainer,
        pytest.raises(ValueError, match=r"its live loss reads .* which needs\(\) does not ask for"),
    ):
        trainer.train_step()


def test_a_lost_question_is_not_held_to_the_reference_either():
    """Its weights are zero, and so would be those of a group of equal rewards, which has rows."""
    weight_BP = torch.tensor([[1.0, -1.0], [0.0, 0.0], [0.5, -0.5]], dtype=torch.float64)
    terms = hand_made(weight_BP, kl_coef=0.1).without(torch.tensor([False, False, True]))
    (part,) = terms.parts
    assert part.acting.tolist() == [[True, True], [True, True], [False, False]]
    assert not part.weight_BP[2].any()
    (free,) = hand_made(weight_BP).without(torch.tensor([False, False, True])).parts
    assert free.counted_BP is None
    assert free.acting.tolist() == [[True, True], [False, False], [False, False]]


def hand_made(weight_BP, **keys):
    """A part that holds every path to the reference where there is a KL, those of weight zero
    too."""
    of = {"name": "pg", "stream": "prior", "view": "student", "live": Surrogate(**keys)}
    held_BP = torch.ones_like(weight_BP, dtype=torch.bool) if "kl_coef" in keys else None
    part = Term(**of, weight_BP=weight_BP, held_BP=held_BP)
    return Terms(parts=(part,))
