"""Small checkpoints of which every number tells its step, and faults in the making of one.

transformers is imported where it is used: the process that forks imports this file, and 4 s less.
"""

import errno
import os
import warnings

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from vpgea_fast.checkpoint import CheckpointError, Saver, load_checkpoint, perform
from vpgea_fast.distributed import World

ALONE = World(torch.device("cpu"))


def numbers(step, size=8, world=ALONE):
    """A model and an optimiser of which every number is `step`; of two shards, the second has fewer
    rows of the one weight and nothing of the other."""
    model = nn.Linear(size, 3, bias=False)
    model.one = nn.Parameter(torch.empty(1))
    if world.mesh is not None:
        fully_shard(model, mesh=world.mesh)
    optimizer = torch.optim.AdamW(model.parameters())
    for weight in model.parameters():
        nn.init.constant_(weight, step)
        moment = torch.full_like(weight.detach(), step)
        optimizer.state[weight] = {"exp_avg": moment, "step": torch.tensor(float(step))}
    return {"model": model, "optimizer": optimizer}


def save(run_dir, step, *, keep_last=3, do=perform, size=8, world=ALONE, worth=None, updates=0):
    """Every number of checkpoint N is N, in each of its files. `updates` of the next step leave a
    rollout of that number."""
    made = numbers(step, size, world)
    rollout = {"paths": torch.full((5,), step)} if updates and world.main else None
    with Saver(run_dir, world=world, keep_last=keep_last, do=do, **made) as saver:
        return saver.save(step, {"paths": step}, worth, updates=updates, rollout=rollout)


def loaded_step(run_dir, size=8, world=ALONE):
    into = numbers(-1, size, world)
    found = load_checkpoint(run_dir, world=world, **into)
    if found is None:
        return None
    tensors = [*into["model"].parameters()]
    tensors += [tensor for state in into["optimizer"].state.values() for tensor in state.values()]
    assert len(tensors) == 6
    for tensor in tensors:
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        assert (local == found.step).all()
    assert found.trainer_state["paths"] == found.step
    return found.step


def steps_on_disk(run_dir):
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


class FailAt:
    """Performs file operations; the n-th raises: before it, or after it with its file cut."""

    def __init__(self, index=-1, *, torn=False):
        self.index, self.torn, self.count = index, torn, 0

    def __call__(self, operation, *args):
        self.count += 1
        if self.count - 1 != self.index:
            return operation(*args)
        if self.torn:
            operation(*args)
            if args[0].is_file():
                os.truncate(args[0], args[0].stat().st_size // 2)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def operations_of_a_save(run_dir, step=2, updates=0):
    counting = FailAt()
    save(run_dir, 1, keep_last=1)
    save(run_dir, step, updates=updates, keep_last=1, do=counting)
    return counting.count


def save_with_fault(run_dir, do, world=ALONE, step=2, updates=0):
    """(saved, message) of a save that met a fault."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            save(run_dir, step, updates=updates, keep_last=1, do=do, world=world)
        except CheckpointError as error:
            return False, str(error)
    return True, str(caught[0].message) if caught else ""


def tiny_tokenizer():
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({"<unk>": 0, "2": 1, "+": 2}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    return tokenizer


def tiny_model(*, tied, seed=0):
    """An odd vocabulary: two shards of it are unequal."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=53,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=tied,
        initializer_range=0.2,
    )
    return Qwen2ForCausalLM(config)
