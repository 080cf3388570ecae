"""What every test shares: repeatable, offline, one thread; the tiny world, random tiny models."""

import contextlib
import copy
import functools
import gc
import importlib
import importlib.util
import os
import random
import signal
from pathlib import Path

# Before transformers and tokenizers are imported: both read these at import.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import hypothesis
import pytest
import torch
from runs import words_of

# Until all files are collected: a tenth of what their imports take, and none of it is garbage.
gc.disable()

# One thread: two workers on two cores do not fight, and sums are bitwise repeatable.
torch.set_num_threads(1)

# A first example may import a model library for seconds, so no deadline.
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)
hypothesis.settings.load_profile("repeatable")


# A shell that starts the tests in the background has SIGINT ignored, and they send it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


LONGEST = ("test_kernels_interpret.py", "test_kernels_aot.py")
"""Half a minute and more each: begun first, or one process would end with them alone."""


def pytest_collection(session):
    """Import the files from another place on in each process of several: pytest rewrites them in a
    new clone, which is 3 s of each process, or a third of that if each begins elsewhere."""
    config = session.config
    if not hasattr(config, "workerinput"):
        return
    worker, workers = config.workerinput["workerid"], config.workerinput["workercount"]
    folders = [Path(word) for word in config.args if Path(word).is_dir()]
    left_out = {Path(word).resolve() for word in config.getoption("ignore") or ()}
    files = [file for folder in folders for file in sorted(folder.glob("test_*.py"))]
    names = [file.stem for file in files if file.resolve() not in left_out]
    first = int(worker.removeprefix("gw")) * len(names) // workers
    for name in names[first:] + names[:first]:
        # What fails is told of by the collection, which tries again.
        with contextlib.suppress(Exception, pytest.skip.Exception):
            importlib.import_module(name)


def pytest_collection_modifyitems(items):
    """Skip, with the reason in the report, what this machine has no device or engine for."""
    items.sort(key=lambda item: item.path.name not in LONGEST)
    cuda, vllm = torch.cuda.is_available(), importlib.util.find_spec("vllm") is not None
    for item in items:
        # Not item.keywords, which hold the names of the folders above: a checkout may lie in `gpu`.
        on_gpu, with_vllm = (any(item.iter_markers(name)) for name in ("gpu", "vllm"))
        if on_gpu and not cuda:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        if with_vllm and not vllm:
            reason = "needs vLLM: pip install vpgea_fast[vllm]"
            item.add_marker(pytest.mark.skip(reason=reason))
        for mark in item.iter_markers("hosts"):
            if missing := [name for name in mark.args if importlib.util.find_spec(name) is None]:
                reason = f"needs {', '.join(missing)}: make test-hosts"
                item.add_marker(pytest.mark.skip(reason=reason))
        if with_vllm and vllm and cuda and not on_gpu:
            reason = "for vLLM's CPU build; on a GPU: -m 'vllm and gpu'"
            item.add_marker(pytest.mark.skip(reason=reason))


def pytest_collection_finish():
    """Keep what was imported out of every later garbage collection: 0.3 s each, and one a run."""
    gc.freeze()
    gc.enable()


def pytest_unconfigure():
    gc.unfreeze()  # or nanobind, at exit, takes it for leaks


@pytest.fixture(scope="session", autouse=True)
def _own_verdicts(tmp_path_factory):
    """Kept verdicts of this session and its children: never the user's."""
    os.environ["VPGEA_CACHE"] = str(tmp_path_factory.mktemp("verdicts"))


@pytest.fixture(scope="session", autouse=True)
def _patched_once_a_launch():
    """Triton's interpreter patches triton.language anew for every call of a device function, which
    is half of its time: what a launch has patched holds until that ends."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    from triton import language
    from triton.runtime import interpreter

    launch, patch = interpreter.GridExecutor.__call__, interpreter._patch_lang
    patched = set()

    def launch_anew(self, *args, **kwargs):
        patched.clear()
        return launch(self, *args, **kwargs)

    def patch_once(function):
        known = [*map(id, function.__globals__.values())]
        missing = {id(x) for x in (language, language.core) if id(x) in known} - patched
        patched.update(missing)
        return patch(function) if missing else None

    interpreter.GridExecutor.__call__, interpreter._patch_lang = launch_anew, patch_once


@pytest.fixture(scope="session")
def compiled_dir(pytestconfig, tmp_path_factory):
    """Where Triton keeps what it compiled, by a hash of source, options, device and compiler: all
    that a kernel's code hangs on. Kept between sessions until `make clean`; compiling takes 25 s.
    """
    cache = getattr(pytestconfig, "cache", None)
    return tmp_path_factory.mktemp("triton") if cache is None else cache.mkdir("triton")


@pytest.fixture(autouse=True)
def _seeded():
    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def errors_in():
    """Lines that a command wrote on stderr, but for the notices of keys that it was given twice."""

    def read(text):
        return [line for line in text.splitlines() if " stands twice: " not in line]

    return read


@pytest.fixture(scope="session")
def running():
    """Living processes of a session, or children of a process: `running(session=1)[pid]` is its
    line in /proc. Not by its environment: vLLM's processes write their title over that."""

    def find(**wanted):
        found = {}
        for entry in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                stat = entry.read_text()
                state, parent, _, session, *_ = stat.rpartition(")")[2].split()
                facts = {"parent": int(parent), "session": int(session)}
                if state != "Z" and wanted.items() <= facts.items():
                    found[int(entry.parent.name)] = stat
        return found

    return find


@pytest.fixture(scope="session")
def tiny_world(tmp_path_factory):
    """The shipped tiny base with the first of its questions: `.base_dir`, `.train_path`,
    `.test_path`. Every run reads and tokenizes the whole file: of 4,096 that is a CPU second."""
    from vpgea_fast.tiny import make_tiny

    world = make_tiny(tmp_path_factory.mktemp("tiny") / "world")
    for path, count in ((world.train_path, 200), (world.test_path, 100)):
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:count]))
    return world


@pytest.fixture
def tiny_words(tiny_world, tmp_path):
    """Command-line words of small runs of the tiny task, without an evaluation unless asked for:
    `words = tiny_words({"train.steps": 4}); words("name of the run", "--optim.lr", "1e-3")`."""

    def settle(settings):
        return lambda name, *more: [*words_of(settings, tiny_world, tmp_path / name), *more]

    return settle


@pytest.fixture(scope="session")
def tiny_tokenizer(tiny_world):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_world.base_dir)


@pytest.fixture(scope="session")
def _tiny_model_loaded(tiny_world):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_world.base_dir, dtype=torch.float32).eval()


@pytest.fixture
def tiny_model(_tiny_model_loaded):
    """The tiny base in float32, a copy of its own for each test: train it at will."""
    return copy.deepcopy(_tiny_model_loaded)


@pytest.fixture(scope="session")
def random_qwen2():
    """Makes Qwen2 models with random weights: `random_qwen2(layers=1, dtype=torch.float64)`."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    def make(*, layers=2, hidden=32, heads=2, vocab=53, dtype=torch.float32, seed=0, **config):
        settings = {
            "num_hidden_layers": layers,
            "hidden_size": hidden,
            "intermediate_size": 2 * hidden,
            "num_attention_heads": heads,
            "num_key_value_heads": heads,
            "vocab_size": vocab,
            "max_position_embeddings": 512,
            "tie_word_embeddings": True,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "pad_token_id": 2,
            # Ten times the usual scale: logits that differ, so a wrong mask or shift shows.
            "initializer_range": 0.2,
        }
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = Qwen2ForCausalLM(Qwen2Config(**(settings | config)))
        return model.to(dtype).eval()

    return make


@pytest.fixture(scope="session")
def model_dirs(random_qwen2, tmp_path_factory):
    """Directories of a random Qwen2 for several processes: `model_dirs["tied"]`, and "untied"."""
    from ranks import SHAPE

    made = {}
    for name, tied in (("tied", True), ("untied", False)):
        made[name] = str(tmp_path_factory.mktemp("models") / name)
        random_qwen2(**SHAPE, tie_word_embeddings=tied).save_pretrained(made[name])
    return made


@pytest.fixture(scope="session")
def r1_tokenizer():
    """R1-Distill-Qwen's shape: `<｜User｜>`, `<｜Assistant｜>`, the think tags are not special."""
    import chat_models

    return chat_models.r1_tokenizer()


@pytest.fixture(scope="session")
def qwen3_tokenizer():
    """Qwen3's shape: the chat template reads `enable_thinking`."""
    import chat_models

    return chat_models.qwen3_tokenizer()


@pytest.fixture
def r1_model_dir(r1_tokenizer, random_qwen2, tmp_path):
    """A Qwen2 directory with random weights and the R1-shaped tokenizer, a new one each test."""
    import chat_models

    ends = {"bos_token_id": r1_tokenizer.bos_token_id, "eos_token_id": r1_tokenizer.eos_token_id}
    model = random_qwen2(
        vocab=len(r1_tokenizer),
        pad_token_id=ends["eos_token_id"],
        max_position_embeddings=2048,
        **ends,
    )
    return chat_models.save_model(tmp_path / "r1", r1_tokenizer, model)


@pytest.fixture(scope="session")
def large_r1_model(r1_tokenizer, tmp_path_factory):
    """`large_r1_model("7b")`: Qwen2.5's shape around the R1-shaped tokenizer, without weights."""
    import chat_models

    return functools.cache(
        lambda name: chat_models.save_hollow(
            tmp_path_factory.mktemp("large") / name, r1_tokenizer, name
        )
    )


@pytest.fixture(scope="session")
def large_model(tiny_tokenizer, tmp_path_factory):
    """The same around the tiny tokenizer."""
    import chat_models

    return functools.cache(
        lambda name: chat_models.save_hollow(
            tmp_path_factory.mktemp("large") / name, tiny_tokenizer, name
        )
    )
