"""`vpgea doctor` says of each choice what a run would say."""

import importlib.util
import re

import pytest
import torch

from vpgea_fast import attention, losses
from vpgea_fast.cli import main
from vpgea_fast.doctor import examine

CPU = torch.device("cpu")


def test_every_choice_stands_there_with_its_reason(capsys):
    assert main(["doctor", "--device", "cpu"]) == 0
    shown = capsys.readouterr().out
    for name in ("auto", "triton", "cublas", "torch", "reference"):
        assert re.search(rf"^loss backend +{name} +\S+", shown, re.MULTILINE), name
    for name in ("auto", *attention.NAMES):
        assert re.search(rf"^attention +{name} +\S+", shown, re.MULTILINE), name
    assert re.search(rf"^version +torch +{re.escape(torch.__version__)}$", shown, re.MULTILINE)
    assert re.search(r"^attention +flash +no: .*no CUDA device", shown, re.MULTILINE)


def test_what_it_says_is_what_a_run_meets():
    found = {(f.part, f.name): f for f in examine("cpu")}
    for (part, name), finding in found.items():
        if part == "loss backend" and finding.runs:
            losses.choose_backend(name, device=CPU, dtype=torch.float32)
        elif part == "loss backend":
            with pytest.raises(ValueError, match=re.escape(finding.detail)):
                losses.choose_backend(name, device=CPU, dtype=torch.float32)
        elif part == "attention" and not finding.runs:
            with pytest.raises(ValueError, match=re.escape(finding.detail)):
                attention.choose(name, CPU, torch.bfloat16, 128)
    assert found["loss backend", "auto"].detail.startswith("takes 'torch'")
    vllm = found["rollout engine", "vllm"]
    assert vllm.runs == (importlib.util.find_spec("vllm") is not None)
    assert not any(f.runs for f in found.values() if "not installed" in f.detail)


@pytest.mark.skipif(torch.cuda.is_available(), reason="for a machine without CUDA")
def test_a_device_that_is_not_here(capsys):
    assert main(["doctor", "--device", "cuda"]) == 2
    assert "torch sees no CUDA device" in capsys.readouterr().err
