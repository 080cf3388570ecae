"""What a machine without vLLM, or with another one than this project knows, is told."""

import pytest
import torch

from vpgea_fast.cli import main
from vpgea_fast.config import ConfigError
from vpgea_fast.rollout import vllm


@pytest.fixture(params=["run", "dry run"])
def refused(request, tiny_words, tmp_path, capsys):
    """What a run with vLLM, or its dry run, ends with: `refused("--vllm.tensor_parallel", "2")`."""

    def say(*more):
        words = tiny_words({"rollout.engine": "vllm"})("run", *more)
        dry = ["--dry-run"] * (request.param == "dry run")
        assert main(["train", "configs/tiny.yaml", *words, *dry]) == 2
        assert not list(tmp_path.iterdir())
        return capsys.readouterr().err

    return say


def test_without_vllm_the_error_names_the_extra_and_the_other_engine(refused, monkeypatch):
    monkeypatch.setattr(vllm, "find_spec", lambda _: None)
    said = refused()
    assert "vpgea_fast[vllm]" in said
    assert "set rollout.engine 'hf'" in said


def test_another_vllm_is_refused_with_the_table(refused, monkeypatch):
    monkeypatch.setattr(vllm, "find_spec", lambda _: True)
    monkeypatch.setattr(vllm, "FITS", {"0.1": ("1.0", "4.0", "4.1")})
    assert "expected vllm 0.1.x with torch 1.0.x and transformers 4.0 to below 4.1" in refused()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["--vllm.tensor_parallel", "2"],
            "vllm.tensor_parallel: got 2, expected a divisor of the 1 processes",
        ),
        (
            ["--vllm.tensor_parallel", "2", "--vllm.process", "own"],
            "vllm.tensor_parallel: got 2 with vllm.process 'own'",
        ),
        (["--model.dtype", "float64"], "float32, bfloat16 or float16, got torch.float64"),
    ],
)
def test_what_no_vllm_can_do_is_refused_with_or_without_it(words, said, refused):
    assert said in refused(*words)


FITTING = {"vllm": "0.32.0", "torch": "2.13.0+cpu", "transformers": "5.19.0"}


@pytest.mark.parametrize(
    "found",
    [
        FITTING,
        {**FITTING, "transformers": "5.16.1"},
        {**FITTING, "vllm": "0.32.1+cu130", "torch": "2.13.1"},
    ],
)
def test_versions_that_fit(found):
    vllm.check_versions(found)


@pytest.mark.parametrize(
    "change",
    [
        {"vllm": "0.33.0"},
        {"torch": "2.11.0"},
        {"torch": "2.130.0"},
        {"transformers": "5.20.0"},
        {"transformers": "5.16.0"},
    ],
)
def test_versions_that_do_not_fit_are_shown_beside_those_that_do(change):
    with pytest.raises(ConfigError, match=r"fit together: .*expected vllm 0\.32\.x with torch"):
        vllm.check_versions({**FITTING, **change})


def test_a_build_without_metadata_does_not_pass_as_any_version():
    with pytest.raises(ConfigError, match="do not fit together"):
        vllm.check_versions({"torch": "2.13.0", "transformers": "5.19.0"})


def test_a_server_beyond_this_machine_needs_a_key(monkeypatch, capsys):
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    assert main(["serve", "some/model", "--host", "0.0.0.0", "--print"]) == 2
    assert "set VLLM_API_KEY to a secret" in capsys.readouterr().err
    assert main(["serve", "some/model", "--print"]) == 0
    command = capsys.readouterr().out
    assert "--host 127.0.0.1" in command
    assert "--middleware vpgea_fast.rollout.server.require_key" in command
    assert "trust-remote-code" not in command


def test_words_behind_two_dashes_go_to_vllm_alone(capsys):
    assert main(["serve", "some/model", "--print", "--", "--data-parallel-size", "8"]) == 0
    assert capsys.readouterr().out.rstrip().endswith("--data-parallel-size 8")
    assert main(["report", "runs/a", "--", "--optim.lr", "1"]) == 2
    assert "got '--optim.lr' after --; only serve" in capsys.readouterr().err


def test_a_cut_distribution_is_refused_for_training(capsys):
    words = ["--rollout.engine", "vllm", "--rollout.top_p", "0.9", "--print-config"]
    assert main(["train", "configs/tiny.yaml", *words]) == 2
    assert "log-probs of the cut distribution" in capsys.readouterr().err


class Recorder:
    """Stands for vLLM's engine where there is no GPU: what it is told, in order."""

    def __init__(self):
        self.told = []

    def sleep(self, level):
        self.told.append(f"sleep {level}")

    def wake_up(self, tags):
        self.told.append(f"wake {' '.join(tags)}")

    def collective_rpc(self, method, kwargs):
        named = [name for name, _ in kwargs["weights_iterator"]]
        self.told.append(f"{method} {len(named)}")

    def reset_prefix_cache(self):
        self.told.append("reset")
        return True


class OnCuda(vllm.VllmEngine):
    def _start(self, *_):
        return Recorder()


def test_a_sleeping_engine_wakes_weights_then_loads_then_wakes_the_cache(
    random_qwen2, tmp_path, monkeypatch
):
    free = iter([3 * 2**30, 5 * 2**30])
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (next(free), 8 * 2**30))
    model = random_qwen2()
    model.config.save_pretrained(tmp_path)
    cuda = torch.device("cuda", 0)
    engine = OnCuda(str(tmp_path), max_batch=4, dtype=torch.bfloat16, device=cuda)
    weights = len(list(model.named_parameters()))
    engine.load_weights(model.named_parameters())
    engine.rest()
    engine.rest()
    assert not engine.complete
    assert engine.usage().freed_bytes == 2 * 2**30
    assert engine.usage().freed_bytes == 0
    engine.load_weights(model.named_parameters())
    load = f"reload_weights {weights}"
    assert engine.llm.told == [
        *(load, "reset"),
        "sleep 2",
        *("wake weights", load, "wake kv_cache", "reset"),
    ]
    assert engine.complete
    with pytest.raises(ConfigError, match=r"float32, bfloat16 or float16, got torch\.float64"):
        OnCuda(str(tmp_path), max_batch=4, dtype=torch.float64, device=cuda)
