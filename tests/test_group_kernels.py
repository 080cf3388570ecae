"""The group kernels against float64, in Triton's interpreter or on a GPU, and compiled for sm_90.

The interpreter is chosen when triton is imported, so a process either interprets or compiles:
test_kernels_interpret.py runs this file again, in a process that interprets.
Every output buffer starts as a number that no result is, so an unwritten element shows.
"""

import importlib
import math
import os
import re
import struct
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import stream_coefficients
from torch import Tensor

from vpgea_fast.advantage import cross_view_utility
from vpgea_fast.kernels import reference
from vpgea_fast.kernels.options import GroupOptions
from vpgea_fast.kernels.reference import segment_sum

triton = pytest.importorskip("triton", reason="needs triton")
tl = triton.language
kernels = importlib.import_module("vpgea_fast.kernels.group_advantage")
device = importlib.import_module("vpgea_fast.kernels.group_kernels")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
NAN, INF = math.nan, math.inf
POISON = 12345.0
ROBUST = GroupOptions(
    baseline="lme", reward="likelihood_mix", clamp_u=True, eta_clip=(0.25, 4), eps=1e-3,
    std_gate=0.05,
)  # fmt: skip
UTILITY_FIELDS = "reward eta utility advantage gate".split()

# The interpreter is numpy: it reports infinities, and Triton 3.6 uses a deprecated conversion.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.* encountered in :RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning"),
]
runs_kernels = pytest.mark.skipif(
    not INTERPRETED and DEVICE == "cpu",
    reason="run by test_kernels_interpret.py, in a process of its own",
)


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch):
    empty = torch.empty

    def poisoned(*size, **options):
        out = empty(*size, **options)
        return out.fill_(True if out.dtype == torch.bool else POISON)

    monkeypatch.setattr(torch, "empty", poisoned)
    monkeypatch.setattr(
        torch, "empty_like", lambda x: poisoned(x.shape, dtype=x.dtype).to(x.device)
    )


# --- compiled ----------------------------------------------------------------------------------


EXACT = "ALPHA R_MARGIN U_MIN ETA_LOW ETA_HIGH EPS STD_GATE BETA".split()
BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.skipif(INTERPRETED, reason="an interpreter compiles nothing")
@pytest.mark.parametrize(
    "case",
    [
        "group_advantage, 32 + 16",
        "group_advantage, 8 + 8",
        "group_advantage, 8 + 1, paper, U given",
        "path_sums",
        "path_sums, some prior rows",
        "loss_parts",
    ],
)
def test_compiles_for_sm90_without_spills(case, compiled_dir, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(compiled_dir))
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    static_report = importlib.import_module("static_report")
    compiled = static_report.build_group(case, 90)
    found = static_report.read(case, compiled, 90, "fp64")
    assert (found.stack, found.spills) == (0, 0)
    _, _, constants = static_report.GROUPS[case]
    ptx = compiled.asm["ptx"]
    assert ".target sm_90a" in ptx
    assert not re.search(r"\b(atom|red)\.", ptx)
    assert not re.search(r"\b(add|sub|mul|div|fma|sqrt)\.\S*f32", ptx)
    if case.startswith("group_advantage"):
        values = [reference.NOISE_NATS, *(constants[x] for x in EXACT if constants[x] is not None)]
        if constants["REWARD"] != "paper":
            values.append(reference.LOG_HALF)
        for value in values:  # the exact double, not the nearest float32
            doubles = ["0d" + struct.pack(">d", x).hex().upper() for x in (value, -value)]
            assert any(x in ptx for x in doubles), value
    offsets = re.findall(
        r"tt\.addptr .* : (?:tensor<.*?>|!tt\.ptr<\w+>), (.*)", compiled.asm["ttir"]
    )
    assert len(offsets) > 2
    # int64 wherever a token, a path or a sequence is addressed: N V > 2^31 is ordinary.
    assert all("i64" in o for o in offsets if not o.startswith("i32"))


# --- groups -----------------------------------------------------------------------------------


def packed(values: list[list[float]], dtype=torch.float32) -> tuple[Tensor, Tensor]:
    """Rows of any length, back to back, and their boundaries."""
    flat = torch.tensor([x for row in values for x in row], dtype=dtype)
    lengths = torch.tensor([0] + [len(row) for row in values])
    return flat, lengths.cumsum(0)


def to_device(arguments: dict[str, Any]) -> dict[str, Any]:
    return {k: v.to(DEVICE) if isinstance(v, Tensor) else v for k, v in arguments.items()}


def run_group(**arguments: Any) -> Any:
    """The kernel, its results on the CPU."""
    out = kernels.group_advantage(**to_device(arguments))
    fields = type(out).__dataclass_fields__ | reference.GroupAdvantage.__dataclass_fields__
    values = {name: getattr(out, name) for name in fields}
    return kernels.GroupScores(**{k: v if v is None else v.cpu() for k, v in values.items()})


def assert_group_equals_reference(arguments: dict[str, Any], out: Any, case: Any = None) -> None:
    paths = {k: arguments.get(k) for k in ("weight_BG", "cu_paths")}
    beta = arguments.get("beta", 0.5)
    score = {k: v for k, v in arguments.items() if k not in (*paths, "tokens", "beta")}
    expected = reference.group_advantage(**score)
    for name in reference.GroupAdvantage.__dataclass_fields__:
        torch.testing.assert_close(
            getattr(out, name),
            getattr(expected, name).to(getattr(out, name).dtype),
            rtol=1e-12, atol=1e-12, equal_nan=True,
            msg=lambda m, name=name: f"{case} {name}: {m}",
        )  # fmt: skip
    if paths["cu_paths"] is None:
        assert (out.coef_post_T, out.coef_prior_T) == (None, None)
        return
    coefs = stream_coefficients(
        expected.advantage_BG, paths["weight_BG"].double(), paths["cu_paths"], beta=beta
    )
    for name, coef in zip(("coef_post_T", "coef_prior_T"), coefs, strict=True):
        assert getattr(out, name).dtype == torch.float32
        torch.testing.assert_close(getattr(out, name), coef.float(), rtol=3e-7, atol=0)


class Draw:
    """Random cases from one seed."""

    def __init__(self, seed: int):
        self.generator = torch.Generator().manual_seed(seed)

    def below(self, n: int) -> int:
        return int(torch.randint(n, (), generator=self.generator))

    def choose(self, *choices: Any) -> Any:
        return choices[self.below(len(choices))]

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=self.generator)

    def options(self) -> GroupOptions:
        reward = self.choose("paper", "likelihood_gate", "likelihood_mix")
        return GroupOptions(
            alpha=self.choose(0, 0.25, 0.5, 1, 2),
            baseline=self.choose("mean", "lme"),
            reward=reward,
            r_margin=self.choose(0.0, 0.3, -0.2) if reward == "paper" else 0.0,
            u_min=self.choose(-20, -5),
            clamp_u=self.choose(False, True),
            eta_clip=self.choose(None, (0.25, 4), (0.5, 1)),
            eps=self.choose(0, 1e-6, 1e-3),
            ddof=self.choose(0, 1),
            std_gate=self.choose(0, 0.05, 0.4),
        )

    def group(self, questions: int, group: int, n_prior: int) -> dict[str, Any]:
        paths = questions * (group + n_prior)
        likely = self.choose(-0.1, -1.0, -3.0)
        answers = [
            self.uniform(self.choose(1, 2, 3, 5, 8, 40), low=likely, high=0).tolist()
            for _ in range(paths)
        ]
        for _ in range(self.below(4) if paths else 0):
            answers[self.below(paths)] = self.choose([], [-0.1, NAN], [-INF], [INF, -INF], [-40.0])
        flat, cu_answers = packed(answers, dtype=self.choose(torch.float32, torch.float64))
        lengths = [
            self.uniform(questions, n, high=self.choose(5, 400)).round() for n in (group, n_prior)
        ]
        length_dtype = self.choose(torch.int32, torch.int64, torch.float32, torch.float64)
        arguments: dict[str, Any] = {
            "answer_logp_A": flat,
            "cu_answers": cu_answers.to(self.choose(torch.int32, torch.int64)),
            "len_post_BG": lengths[0].to(length_dtype),
            "len_prior_BN": lengths[1].to(length_dtype),
            "accept_BG": self.choose(None, self.uniform(questions, group) > 0.2),
            "options": self.options(),
        }
        if self.choose(False, True):
            tokens = (lengths[0].flatten() * 0.2).long()
            cu_paths = torch.cat((tokens.new_zeros(1), tokens.cumsum(0)))
            arguments |= {
                "weight_BG": self.uniform(questions, group, low=1e-6, high=1e-3),
                "cu_paths": cu_paths.to(self.choose(torch.int32, torch.int64)),
                "tokens": int(cu_paths[-1]),
                "beta": self.choose(0.5, 0, 0.1),
            }
        return arguments


@runs_kernels
@pytest.mark.parametrize("seed", range(6))
def test_every_option_and_shape_matches_float64(seed):
    draw = Draw(seed)
    for case in range(20):
        group, n_prior = 2 + draw.below(draw.choose(4, 31)), 1 + draw.below(16)
        arguments = draw.group(draw.choose(0, 1, 1, 2, 3), group, n_prior)
        assert_group_equals_reference(arguments, run_group(**arguments), (seed, case))


@runs_kernels
def test_equals_cross_view_utility_with_u_given():
    draw = Draw(100)
    for _ in range(15):
        arguments = draw.group(2, 2 + draw.below(7), 1 + draw.below(5))
        options, cu = arguments["options"], arguments["cu_answers"]
        u = segment_sum(arguments["answer_logp_A"].double(), cu)
        shared = {k: arguments[k] for k in ("len_post_BG", "len_prior_BN", "accept_BG")}
        out = run_group(answer_logp_A=u, options=options, **shared)
        n_post = shared["len_post_BG"].numel()
        expected = cross_view_utility(
            u[:n_post].view_as(shared["len_post_BG"]),
            u[n_post:].view_as(shared["len_prior_BN"]),
            **shared,
            options=options,
        )
        assert out.replaced_B.sum() == expected.n_replaced
        for name in UTILITY_FIELDS:
            torch.testing.assert_close(
                getattr(out, f"{name}_BG"), getattr(expected, name), rtol=1e-12, atol=1e-12
            )
        for name in ("u_base", "len_base"):
            torch.testing.assert_close(getattr(out, f"{name}_B"), getattr(expected, name))


def constant_groups(size: int, count: int) -> Tensor:
    """Constants of every magnitude, each path moved by at most one float32 ulp: (count, size)."""
    generator = torch.Generator().manual_seed(size)
    exponent_B1 = torch.empty(count, 1).uniform_(-12, 12, generator=generator)
    u_BG = -(10**exponent_B1).expand(-1, size).contiguous()
    direction_BG = torch.randint(-1, 2, u_BG.shape, generator=generator)
    return torch.nextafter(u_BG, u_BG + direction_BG * u_BG.abs())


@triton.jit
def zscore_kernel(s_ptr, a_ptr, rows, G: tl.constexpr, G_PAD: tl.constexpr, DDOF: tl.constexpr):
    g = tl.arange(0, G_PAD)
    for row in range(rows):
        s = tl.load(s_ptr + row * G + g, mask=g < G, other=0.0).to(tl.float64)
        tl.store(a_ptr + row * G + g, device._zscore(s, g < G, G, 0.0, DDOF, 0.0), mask=g < G)


@runs_kernels
@pytest.mark.parametrize("size", [2, 5, 8, 16, 32])
def test_thousands_of_constant_groups_are_exactly_silent(size):
    s_BG = constant_groups(size, 200).double().to(DEVICE)
    assert (s_BG.amax(1) > s_BG.amin(1)).float().mean() > 0.4
    a_BG = torch.full_like(s_BG, POISON)
    zscore_kernel[(1,)](s_BG, a_BG, 200, size, 1 << (size - 1).bit_length(), size % 2)
    assert not a_BG.any()


@runs_kernels
@pytest.mark.parametrize("size", [2, 7, 8, 17, 32])
def test_constant_groups_stay_silent_from_the_answers_on(size):
    u_BG = constant_groups(size, 60)
    u_prior_B1 = 2 * u_BG[:, :1]  # R is about |U|: noise as large as it can be beside the score
    out = run_group(
        answer_logp_A=torch.cat((u_BG.flatten(), u_prior_B1.flatten())),
        len_post_BG=torch.full((60, size), 31),
        len_prior_BN=torch.full((60, 1), 31),
        options=GroupOptions(eps=0, ddof=size % 2),
    )
    assert (out.reward_BG > 0).all()
    assert torch.equal(out.advantage_BG, torch.zeros(60, size).double())
    assert not out.gate_BG.any()
    assert not out.replaced_B.any()


@runs_kernels
def test_groups_just_above_the_noise_are_awake():
    constant_B1 = torch.logspace(-1, 6, 40, dtype=torch.float64)[:, None]
    u_BG = constant_B1 * (1 + torch.tensor([0, 0, 0, 2e-6]))
    u_BG = torch.cat((u_BG, torch.tensor([[0, 0, 0, 0.9e-7], [0, 0, 0, 1.1e-7]])))
    lengths = torch.full(u_BG.shape, 9)
    out = run_group(
        answer_logp_A=torch.cat((u_BG.flatten(), torch.zeros(42))),
        len_post_BG=lengths,
        len_prior_BN=lengths[:, :1],
        options=GroupOptions(eps=0),
    )
    awake_B = out.advantage_BG[:, 3]
    expected = [math.sqrt(3)] * 40 + [0, math.sqrt(3)]
    assert awake_B.tolist() == pytest.approx(expected, rel=1e-6)


@runs_kernels
@pytest.mark.parametrize("options", [GroupOptions(), ROBUST], ids=["paper", "robust"])
@pytest.mark.parametrize("size", [2, 5, 32])
def test_degenerate_groups(size, options):
    """All below the baseline; all refused; exactly one passes; every U NaN; all answers empty."""
    rows = [[-9.0] * size, [-0.1] * size, [-0.1] + [-9.0] * (size - 1), [NAN] * size, [0.0] * size]
    accept_BG = torch.ones(5, size, dtype=torch.bool)
    accept_BG[1] = False
    arguments = {
        "answer_logp_A": torch.tensor([u for row in rows for u in row] + [-1.0, -2.0] * 5),
        "len_post_BG": torch.tensor([list(range(1, size + 1))] * 2 + [[7] * size] * 3),
        "len_prior_BN": torch.full((5, 2), 7),
        "accept_BG": accept_BG,
        "options": options,
        "weight_BG": torch.full((5, size), 1e-3),
        "cu_paths": torch.arange(5 * size + 1),
        "tokens": 5 * size,
    }
    out = run_group(**arguments)
    assert_group_equals_reference(arguments, out)
    for question in (0, 1, 3, 4):
        assert not out.advantage_BG[question].any()
        assert not out.gate_BG[question].any()
        for coef_T in (out.coef_post_T, out.coef_prior_T):
            silent = coef_T.view(5, size)[question]
            assert torch.equal(silent, torch.zeros(size))
    one = out.advantage_BG[2]
    std = out.utility_BG[2].std(correction=0).item()
    scale = std / (std + options.eps)
    assert one.tolist() == pytest.approx(
        [scale * math.sqrt(size - 1)] + [-scale / math.sqrt(size - 1)] * (size - 1), rel=1e-12
    )
    assert out.replaced_B.tolist() == [0, 0, 0, size, 0]
    assert out.coef_prior_T.view(5, size)[2].tolist() == pytest.approx([-0.5e-3] + [0] * (size - 1))


BAD = {
    "negative length": {"len_post_BG": (4, -1.0)},
    "NaN length": {"len_prior_BN": (2, NAN)},
    "infinite S": {"len_post_BG": (4, 1e-300)},  # with alpha = 2 below
    "answers fall": {"cu_answers": (5, 1)},
    "answers leave the tensor": {"cu_answers": (5, 1 << 40)},
    "paths fall": {"cu_paths": (5, 7)},
    "paths leave the stream": {"cu_paths": (5, 1 << 40)},
}


@runs_kernels
@pytest.mark.parametrize("case", BAD)
def test_a_bad_question_is_nan_and_leaves_its_neighbours_alone(case):
    """Three questions, G = 3, N = 2; something is wrong in question 1."""
    arguments: dict[str, Any] = {
        "answer_logp_A": Draw(7).uniform(15, low=-2, high=0),
        "cu_answers": torch.arange(16),
        "len_post_BG": torch.full((3, 3), 8.0, dtype=torch.float64),
        "len_prior_BN": torch.full((3, 2), 8.0, dtype=torch.float64),
        "weight_BG": torch.full((3, 3), 0.5),
        "cu_paths": torch.arange(0, 20, 2),
        "tokens": 18,
    }
    good = run_group(**arguments)
    ((name, (index, value)),) = BAD[case].items()
    arguments[name] = arguments[name].clone()
    arguments[name].view(-1)[index] = value
    if case == "infinite S":
        arguments["len_prior_BN"] = arguments["len_prior_BN"] * 1e300
        arguments["len_post_BG"] = torch.full((3, 3), 8e300, dtype=torch.float64)
        arguments["len_post_BG"][1] = 1.0
        arguments["options"] = GroupOptions(alpha=2, r_margin=9.0)
    out = run_group(**arguments)
    assert out.replaced_B.tolist() == [0, -1, 0]
    assert out.advantage_BG[1].isnan().all()
    assert not out.gate_BG[1].any()
    for coef_T in (out.coef_post_T, out.coef_prior_T):
        assert coef_T[6:12].isnan().all()
    if case == "infinite S":
        assert out.advantage_BG[[0, 2]].isfinite().all()
        return
    for question in (0, 2):
        assert torch.equal(out.advantage_BG[question], good.advantage_BG[question])
        tokens = slice(6 * question, 6 * question + 6)
        assert torch.equal(out.coef_post_T[tokens], good.coef_post_T[tokens])


@runs_kernels
def test_tokens_that_no_path_claims_are_nan():
    arguments: dict[str, Any] = {
        "answer_logp_A": torch.tensor([-0.1, -2, -1, -0.1, -2, -1]),
        "len_post_BG": torch.full((2, 2), 8),
        "len_prior_BN": torch.full((2, 1), 8),
        "weight_BG": torch.ones(2, 2),
        "tokens": 9,
    }
    out = run_group(**arguments, cu_paths=torch.tensor([1, 2, 3, 6, 8]))
    for coef_T in (out.coef_post_T, out.coef_prior_T):
        assert coef_T.isnan().tolist() == [True] + [False] * 7 + [True]


@runs_kernels
def test_a_question_does_not_see_its_neighbours_and_reruns_are_bitwise_equal():
    draw = Draw(11)
    arguments = draw.group(3, 6, 4) | {"options": ROBUST, "accept_BG": None}
    first, second = (run_group(**arguments) for _ in range(2))
    assert torch.equal(first.advantage_BG, second.advantage_BG)
    u = segment_sum(arguments["answer_logp_A"].double(), arguments["cu_answers"])
    u_BG, u_BN = u[:18].view(3, 6), u[18:].view(3, 4)
    together = run_group(
        answer_logp_A=u,
        len_post_BG=arguments["len_post_BG"],
        len_prior_BN=arguments["len_prior_BN"],
        options=ROBUST,
    )
    for question in range(3):
        alone = run_group(
            answer_logp_A=torch.cat((u_BG[question], u_BN[question])),
            len_post_BG=arguments["len_post_BG"][question, None],
            len_prior_BN=arguments["len_prior_BN"][question, None],
            options=ROBUST,
        )
        assert torch.equal(alone.advantage_BG[0], together.advantage_BG[question])


# --- sums after the loss ----------------------------------------------------------------------


def sequences(draw: Draw, count: int, longest: int, *, partial: bool, dtype: torch.dtype):
    """Arguments of gated_kl; partial: the prior stream lacks most closed sequences."""
    lengths_S = (draw.uniform(count) * longest).long()
    cu_seqlens = torch.cat((lengths_S.new_zeros(1), lengths_S.cumsum(0)))
    advantage_S = draw.uniform(count, low=-1, high=1) * (draw.uniform(count) > 0.3)
    prior_index = None
    prior_rows = int(cu_seqlens[-1])
    if partial:
        kept = ((advantage_S > 0) | (draw.uniform(count) > 0.8)).nonzero().squeeze(1)
        prior_index = kept[torch.randperm(len(kept), generator=draw.generator)]
        prior_rows = int(lengths_S[prior_index].sum())
    return {
        "logq_T": draw.uniform(int(cu_seqlens[-1]), low=-3, high=0).to(dtype),
        "logp_U": draw.uniform(prior_rows, low=-5, high=0).to(dtype),
        "cu_seqlens": cu_seqlens.to(draw.choose(torch.int32, torch.int64)),
        "advantage_S": advantage_S.to(draw.choose(torch.float32, torch.float64)),
        "weight_S": draw.uniform(count, low=1e-3, high=1).to(dtype),
        "prior_index": prior_index,
    }


def run_kl(**arguments: Any) -> dict[str, Tensor]:
    out = kernels.gated_kl(**to_device(arguments))
    return {k: getattr(out, k).cpu() for k in reference.GatedKl.__dataclass_fields__}


def assert_kl_equals_reference(arguments: dict[str, Any], case: Any = None) -> dict[str, Tensor]:
    out = run_kl(**arguments)
    dtype = arguments["logq_T"].dtype
    doubled = {
        k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v
        for k, v in arguments.items()
    }
    expected = reference.gated_kl(**doubled)
    tolerance = 1e-12 if dtype == torch.float64 else 5e-7
    for name, actual in out.items():
        value = getattr(expected, name)
        assert actual.dtype == (torch.bool if name == "gate_S" else dtype)
        scale = float(value.double().nan_to_num().abs().max()) if value.numel() else 1.0
        torch.testing.assert_close(
            actual.to(value.dtype), value, rtol=tolerance, atol=tolerance * max(scale, 1.0),
            equal_nan=True, msg=lambda m, name=name: f"{case} {name}: {m}",
        )  # fmt: skip
    return out


@runs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("partial", [False, True])
def test_gated_kl_matches_float64(partial, dtype):
    draw = Draw(3)
    for case in range(12):
        arguments = sequences(
            draw, draw.choose(0, 1, 2, 7), draw.choose(3, 40, 2500), partial=partial, dtype=dtype
        )
        if draw.choose(False, True):
            arguments["gate_S"] = arguments["advantage_S"] > 0.2
        assert_kl_equals_reference(arguments, case)


@runs_kernels
def test_gated_kl_across_many_tiles(monkeypatch):
    monkeypatch.setattr(kernels, "TILE", 16)
    draw = Draw(5)
    arguments = sequences(draw, 80, 50, partial=True, dtype=torch.float64)
    assert len(arguments["prior_index"]) > 30
    first = assert_kl_equals_reference(arguments)
    second = run_kl(**arguments)
    assert all(torch.equal(first[k], second[k]) for k in first)


@runs_kernels
def test_rows_without_a_coefficient_may_be_nan():
    arguments = {
        "logq_T": torch.tensor([-1.0, NAN, NAN]),
        "logp_U": torch.tensor([-3.0, -INF]),
        "cu_seqlens": torch.tensor([0, 1, 2, 3]),
        "advantage_S": torch.tensor([2.0, 0.0, 1.0]),
        "weight_S": torch.tensor([0.5, 0.5, 0.0]),
        "prior_index": torch.tensor([0, 2]),
    }
    out = assert_kl_equals_reference(arguments)
    assert (out["pg_loss"].item(), out["distill_loss"].item()) == (1.0, 1.0)
    assert out["logp_S"].tolist() == [-3, 0, -INF]


@runs_kernels
@pytest.mark.parametrize(
    ("change", "nan"),
    [
        ({"prior_index": [1], "rows": 2}, [True, False, False]),  # a gated sequence is missing
        ({"prior_index": [0, 1, 0], "rows": 6}, [True, False, False]),  # held twice
        ({"prior_index": [7, 0], "rows": 4}, [True, False, False]),  # no such sequence
        ({"prior_index": [2, 1, 0], "rows": 5}, [True, True, True]),  # too few rows
        ({"prior_index": [2, 1, 0], "rows": 7}, [True, True, True]),  # too many
        ({"cu_seqlens": [0, 2, 1, 6]}, [False, True, False]),
        ({"cu_seqlens": [0, 2, 4, 99]}, [False, False, True]),
        ({"cu_seqlens": [1, 2, 4, 6]}, [True, False, False]),
        ({"cu_seqlens": [0, 2, 4, 5]}, [False, False, True]),
    ],
)
def test_gated_kl_shows_bad_indices_as_nan(change, nan):
    """Three sequences of two tokens, the first one gated."""
    index = change.get("prior_index")
    out = run_kl(
        logq_T=torch.full((6,), -1.0),
        logp_U=torch.full((change.get("rows", 6),), -2.0),
        cu_seqlens=torch.tensor(change.get("cu_seqlens", [0, 2, 4, 6])),
        advantage_S=torch.tensor([1.0, -1.0, 0.0]),
        weight_S=torch.ones(3),
        prior_index=None if index is None else torch.tensor(index),
    )
    assert out["logp_S"].isnan().tolist() == nan
    assert out["kl_S"].isnan().tolist() == [nan[0], False, False]


# --- errors and the device --------------------------------------------------------------------

GROUP: dict[str, Any] = {
    "answer_logp_A": torch.full((6,), -1.0),
    "len_post_BG": torch.ones(1, 4),
    "len_prior_BN": torch.ones(1, 2),
}
KL: dict[str, Any] = {
    "logq_T": torch.zeros(3),
    "logp_U": torch.zeros(3),
    "cu_seqlens": torch.tensor([0, 3]),
    "advantage_S": torch.ones(1),
    "weight_S": torch.ones(1),
}
ERRORS = [
    (GROUP, {"answer_logp_A": torch.zeros(5)}, r"answer_logp_A: got .*\(5,\).*\(6,\)"),
    (GROUP, {"answer_logp_A": torch.zeros(6).half()}, r"answer_logp_A: got torch.float16.*float32"),
    (GROUP, {"len_post_BG": torch.ones(1, 1)}, r"G = 1 .*expected G >= 2.*sample more"),
    (GROUP, {"len_prior_BN": torch.ones(1, 0)}, r"N = 0 .*N >= 1"),
    (GROUP, {"len_prior_BN": torch.ones(2, 2)}, r"len_post \(1, 4\), len_prior \(2, 2\).*one B"),
    (GROUP, {"cu_answers": torch.arange(6)}, r"cu_answers: got torch.int64 \(6,\).*\(7,\)"),
    (GROUP, {"cu_answers": torch.zeros(7)}, r"cu_answers: got torch.float32.*int32 or torch.int64"),
    (GROUP, {"accept_BG": torch.ones(1, 4)}, r"accept_BG: got torch.float32.*torch.bool"),
    (GROUP, {"weight_BG": torch.ones(1, 4)}, r"cu_paths is missing.*weight_BG, cu_paths"),
    (GROUP, {"tokens": 3}, r"tokens: got 3.*0 without it"),
    (GROUP, {"beta": -1.0}, r"beta: got -1.0"),
    (GROUP, {"options": GroupOptions(ddof=4)}, r"ddof: got 4, expected 0 <= ddof < G = 4"),
    (KL, {"logp_U": torch.zeros(2)}, r"logp_U: got 2 rows, expected 3.*prior_index"),
    (KL, {"logp_U": torch.zeros(3).double()}, r"logp_U: got torch.float64.*torch.float32"),
    (KL, {"logq_T": torch.zeros(1, 3)}, r"logq_T: got torch.float32 \(1, 3\).*\(3,\)"),
    (KL, {"weight_S": torch.ones(2)}, r"weight_S: got .*\(2,\).*\(1,\)"),
    (KL, {"cu_seqlens": torch.tensor([0, 1, 3])}, r"cu_seqlens: got .*\(3,\).*\(2,\)"),
    (KL, {"prior_index": torch.zeros(1)}, r"prior_index: got torch.float32.*torch.int64"),
    (KL, {"gate_S": torch.ones(1)}, r"gate_S: got torch.float32.*torch.bool"),
]


@runs_kernels
@pytest.mark.parametrize(("base", "change", "message"), ERRORS, ids=[e[2] for e in ERRORS])
def test_bad_input_names_what_it_got_and_the_remedy(base, change, message):
    function = kernels.group_advantage if base is GROUP else kernels.gated_kl
    with pytest.raises(ValueError, match=message):
        function(**to_device({**base, **change}))


@pytest.mark.skipif(INTERPRETED, reason="the interpreter reads CPU tensors")
def test_a_cpu_tensor_is_refused_with_the_remedy():
    with pytest.raises(ValueError, match=r"on cpu, expected CUDA: use vpgea_fast.kernels.referenc"):
        kernels.group_advantage(**GROUP)
    with pytest.raises(ValueError, match=r"on cpu, expected CUDA"):
        kernels.gated_kl(**KL)


@pytest.mark.gpu
def test_no_host_synchronisation_on_cuda():
    arguments = to_device(Draw(1).group(4, 8, 8) | {"options": ROBUST})
    others = to_device(sequences(Draw(2), 9, 50, partial=True, dtype=torch.float32))
    for _ in range(2):  # the first call compiles
        kernels.group_advantage(**arguments)
        kernels.gated_kl(**others)
        torch.cuda.synchronize()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the mode announces itself as a prototype
            torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_cross_view_utility_on_cuda_equals_the_cpu():
    draw = Draw(21)
    for _ in range(10):
        u_post, u_prior = draw.uniform(5, 8, low=-4, high=0), draw.uniform(5, 4, low=-4, high=0)
        lengths = [(draw.uniform(*u.shape) * 99).long() for u in (u_post, u_prior)]
        cpu = cross_view_utility(u_post, u_prior, *lengths, baseline="lme")
        cuda = cross_view_utility(*(x.cuda() for x in (u_post, u_prior, *lengths)), baseline="lme")
        for name in UTILITY_FIELDS:
            torch.testing.assert_close(getattr(cuda, name).cpu(), getattr(cpu, name))
    with pytest.raises(ValueError, match=r"len_post: got -1.0"):
        cross_view_utility(
            u_post.cuda(), u_prior.cuda(), -torch.ones(5, 8).cuda(), lengths[1].cuda()
        )
