"""The optimisers and the guarded update: exact where they claim it, unbiased where they round, and
the same on any number of ranks."""

import dataclasses
import importlib.util
import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

from vpgea_fast.config import OptimConfig, ParallelConfig
from vpgea_fast.distributed import open_world
from vpgea_fast.optim import (
    TORCHAO,
    RoundedAdamW,
    apply_update,
    build_optimizer,
    check_torchao,
    gradient_norm,
    learning_rate,
    random_bits,
    round_stochastically,
)

CPU = torch.device("cpu")
BF16 = torch.bfloat16
HALF = OptimConfig(name="adamw_bf16", stochastic_rounding=True, lr=1e-3)
COMBINATIONS = [
    (OptimConfig(lr=1e-3), torch.float32),
    (OptimConfig(lr=1e-3, stochastic_rounding=True), BF16),
    (OptimConfig(lr=1e-3, name="adamw_bf16"), torch.float32),
    (HALF, BF16),
]


def parameters(dtype, *shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = shapes or ((7, 5), (5,), (40, 3))
    return [torch.nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in shapes]


def give_gradients(params, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


# --- stochastic rounding --------------------------------------------------------------------------


def test_random_bits_are_a_function_of_the_place_alone():
    whole = random_bits(0, 5000, 1 << 40 | 77, CPU)
    parts = [random_bits(a, b - a, 1 << 40 | 77, CPU) for a, b in ((0, 1), (1, 1234), (1234, 5000))]
    assert torch.equal(whole, torch.cat(parts))
    edge = random_bits(2**31 - 3, 6, 77, CPU)
    assert torch.equal(edge[3:], random_bits(2**31, 3, 77, CPU))
    places = [random_bits(first, 4, 77, CPU) for first in (0, 2**31, 2**32, 2**33)]
    assert torch.stack(places).unique().numel() == 16


def test_random_bits_are_uniform_and_independent():
    """2^20 draws: every bit, both halves in 4096 cells, neighbours, halves and keys."""
    n, keys = 2**20, (3, 4, 3 << 32)
    drawn = [random_bits(0, n, key, CPU) for key in keys]
    halves = []
    for bits_N in drawn:
        ones_32 = torch.stack([(bits_N >> i & 1).double().mean() for i in range(32)])
        assert (ones_32 - 0.5).abs().max() < 5 * 0.5 / n**0.5
        for half_N in (bits_N & 0xFFFF, bits_N >> 16 & 0xFFFF):
            count = torch.bincount(half_N >> 4, minlength=4096).double()
            chi2 = ((count - n / 4096).square() / (n / 4096)).sum()
            assert abs(chi2 - 4095) < 5 * (2 * 4095) ** 0.5
            halves.append((half_N.double() + 0.5) / 65536 - 0.5)
    pairs = [(a, b) for i, a in enumerate(halves) for b in halves[:i]]
    pairs += [(a[:-lag], a[lag:]) for a in halves for lag in (1, 2, 64, 1024)]
    for a, b in pairs:
        assert abs(12 * (a * b).mean()) < 5 / n**0.5


def test_rounding_is_up_or_down_and_right_on_average():
    n, ulp = 2**18, 2.0**-7
    for share in (0.0, 1 / 16, 0.37, 0.999):
        x_N = torch.full((n,), 1 + share * ulp)
        exact = x_N[0].double().item()
        share = (exact - 1) / ulp
        got_N = round_stochastically(x_N, random_bits(0, n, 9, CPU))
        assert got_N.dtype == BF16
        assert set(got_N.unique().tolist()) <= {1.0, 1 + ulp}
        error = abs(got_N.double().mean().item() - exact)
        assert error <= 5 * ulp * (share * (1 - share) / n) ** 0.5
    special = torch.tensor([0.0, -0.0, 1.5, -3.0, math.inf, -math.inf])
    bits = torch.full((6,), -1, dtype=torch.int32)
    assert torch.equal(round_stochastically(special.clone(), bits).float(), special)
    assert round_stochastically(torch.tensor([-1.0 - ulp / 2]), bits[:1]).item() == -1 - ulp


def test_bfloat16_weights_move_at_1e6_as_float32_weights_do():
    """2000 updates of about lr = 1e-6, a quarter of a unit in the last place of 1 in all.

    The rounding noise of a weight has a variance of at most displacement x ulp, since a step p of
    an ulp has variance p (1 - p) ulp^2; the mean over n weights is held to 5 standard deviations.
    float32 itself rounds each update of a weight in [1, 2) to 2^-23: to 8 of its 8.39 units.
    """
    n, steps, lr, ulp = 2**15, 2000, 1e-6, 2.0**-7
    start_N = (1 + torch.rand(n)).to(BF16)
    gradient_N = torch.full((n,), 0.5)
    moved = {}
    for name, dtype in (("rounded", BF16), ("exact", torch.float32), ("nearest", BF16)):
        p = torch.nn.Parameter(start_N.to(dtype, copy=True))
        if name == "rounded":
            optimizer = build_optimizer([p], dataclasses.replace(HALF, lr=lr))
        else:
            optimizer = torch.optim.AdamW([p], lr=lr, weight_decay=0.0)
        for _ in range(steps):
            p.grad = gradient_N.to(dtype)
            optimizer.step()
        moved[name] = (start_N.double() - p.detach().double()).mean().item()
    assert moved["nearest"] == 0.0
    assert abs(moved["exact"] - steps * lr) < steps * 2.0**-24
    assert abs(moved["rounded"] - moved["exact"]) < 5 * (steps * lr * ulp / n) ** 0.5


def test_the_second_moment_decays_in_bfloat16():
    """Gradients of 1, then of 0.01: v must fall by 0.999^1500, which rounding to nearest never
    begins. A store adds a variance of at most (2^-7)^2 / 4 of v^2: after 1500 of them a standard
    deviation of 15 %, over 4096 weights 0.25 %."""
    n, beta2, steps = 4096, 0.999, 1500
    p = torch.nn.Parameter(torch.zeros(n))
    optimizer = RoundedAdamW([p], lr=0.0, betas=(0.9, beta2))
    nearest, exact = torch.tensor(0.0, dtype=BF16), 0.0
    for step in range(steps + 20):
        g = 1.0 if step < 20 else 0.01
        p.grad = torch.full((n,), g)
        optimizer.step()
        exact = beta2 * exact + (1 - beta2) * g * g
        nearest = (beta2 * nearest.float() + (1 - beta2) * g * g).to(BF16)
        if step == 19:
            stuck = nearest
    assert nearest == stuck
    assert nearest.item() > 3 * exact
    assert optimizer.state[p]["exp_avg_sq"].dtype == BF16
    mean = optimizer.state[p]["exp_avg_sq"].double().mean().item()
    assert abs(mean / exact - 1) < 5 * (steps * 2**-14 / 4 / n) ** 0.5


def test_float32_moments_and_weights_are_torchs_adamw():
    """The same formula: without bfloat16 anywhere the two differ by float32 rounding alone."""
    ours, torchs = parameters(torch.float32), parameters(torch.float32)
    settings = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    a = RoundedAdamW(ours, **settings, moments=torch.float32)
    b = torch.optim.AdamW(torchs, **settings)
    for step in range(20):
        for params in (ours, torchs):
            give_gradients(params, step)
        a.step()
        b.step()
    for p, q in zip(ours, torchs, strict=True):
        assert torch.allclose(p, q, rtol=0, atol=20 * 4 * 2**-24)


@pytest.mark.parametrize(("cfg", "dtype"), COMBINATIONS[1:])
def test_a_regression_ends_where_float32_ends(cfg, dtype):
    """Least squares of 64 unknowns, 300 steps, rate falling to zero.

    A stored v has a relative variance of at most (2^-14 / 4) / (2 (1 - b2)) = (8.7 %)^2, so a step
    an error of 4.4 %; the way travelled may differ by that and, for bfloat16 weights, by the noise
    of their own rounding, at most sqrt(way of a weight x 2^-7 x its size).
    """
    generator = torch.Generator().manual_seed(0)
    x_NK = torch.randn(256, 64, generator=generator)
    y_N = x_NK @ torch.randn(64, generator=generator)
    ends = []
    for case, kind in (
        (dataclasses.replace(cfg, lr=0.05), dtype),
        (OptimConfig(lr=0.05), torch.float32),
    ):
        p = torch.nn.Parameter(torch.zeros(64, dtype=kind))
        optimizer = build_optimizer([p], case)
        for step in range(300):
            ((x_NK @ p.float() - y_N) ** 2).mean().backward()
            apply_update(optimizer, lr=0.05 * (1 - step / 300), max_grad_norm=1e9)
        ends.append(p.detach().double())
    got, exact = ends
    noise = 2**-3.5 * exact.norm() if dtype == BF16 else 0.0
    assert (got - exact).norm() <= 0.044 * exact.norm() + noise * (300 / 64) ** -0.5
    loss = [((x_NK.double() @ w - y_N) ** 2).mean() / (y_N**2).mean() for w in ends]
    assert loss[1] < 1e-4
    assert loss[0] < 5e-3


@pytest.mark.gpu
def test_a_gpu_draws_the_same_bits_and_rounds_as_a_cpu():
    """Before rounding the devices may differ by a float32 ulp: 2^-16 of an ulp of bfloat16, so
    about one weight in 2^14 may end at its other neighbour."""
    for first in (0, 2**31 - 7, 2**33 + 5):
        here, there = (
            random_bits(first, 4096, 1 << 40 | 77, d) for d in (CPU, torch.device("cuda"))
        )
        assert torch.equal(here, there.cpu())
    ends = []
    for device in ("cpu", "cuda"):
        p = torch.nn.Parameter(parameters(BF16, (1 << 16,))[0].detach().to(device))
        optimizer = build_optimizer([p], dataclasses.replace(HALF, lr=1e-3))
        for step in range(3):
            p.grad = parameters(BF16, (1 << 16,), seed=step + 1)[0].detach().to(device)
            apply_update(optimizer, lr=1e-3, max_grad_norm=1e9)
        ends.append(p.detach().cpu())
    assert (ends[0] != ends[1]).double().mean() < 2**-10


# --- state ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cfg", "dtype"), COMBINATIONS)
def test_a_resumed_optimiser_is_bitwise_the_same(cfg, dtype, tmp_path):
    def run(params, optimizer, steps):
        for step in steps:
            give_gradients(params, step)
            apply_update(optimizer, lr=1e-3, max_grad_norm=1.0)

    straight = parameters(dtype)
    run(straight, whole := build_optimizer(straight, cfg, seed=5), range(8))
    first = parameters(dtype)
    run(first, optimizer := build_optimizer(first, cfg, seed=5), range(4))
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    second = [torch.nn.Parameter(p.detach().clone()) for p in first]
    optimizer = build_optimizer(second, cfg, seed=99)  # the saved seed counts
    optimizer.load_state_dict(torch.load(tmp_path / "state.pt"))
    run(second, optimizer, range(4, 8))
    for p, q in zip(straight, second, strict=True):
        assert torch.equal(p, q)
        for name, value in whole.state[p].items():
            assert torch.equal(value, optimizer.state[q][name])
            assert value.dtype == optimizer.state[q][name].dtype


def test_seeds_and_parameters_round_differently():
    def moved(seed, count=2):
        params = [torch.nn.Parameter(torch.ones(4096, dtype=BF16)) for _ in range(count)]
        optimizer = build_optimizer(params, dataclasses.replace(HALF, lr=1e-3), seed=seed)
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
        return [p.detach() for p in params]

    (a, b), (c, _) = moved(0), moved(1)
    assert torch.equal(a, moved(0)[0])
    assert not torch.equal(a, b)
    assert not torch.equal(a, c)


@pytest.mark.parametrize(
    ("cfg", "dtype", "message"),
    [
        (OptimConfig(), BF16, "got False with bfloat16 weights"),
        (OptimConfig(stochastic_rounding=True), torch.float32, "got True with no bfloat16 weights"),
    ],
)
def test_bfloat16_weights_and_stochastic_rounding_go_together(cfg, dtype, message):
    with pytest.raises(ValueError, match=message):
        build_optimizer(parameters(dtype), cfg)


def test_eight_bits_without_torchao_name_the_extra():
    if importlib.util.find_spec("torchao") is not None:
        pytest.skip("torchao is installed here")
    with pytest.raises(ValueError, match=r"optim.name.*not installed.*vpgea_fast\[torchao\]"):
        build_optimizer(parameters(torch.float32), OptimConfig(name="adamw_8bit"))


def test_an_old_torchao_is_refused_by_its_version(monkeypatch, tmp_path):
    (tmp_path / "torchao").mkdir()
    (tmp_path / "torchao/__init__.py").touch()
    (tmp_path / "torchao-0.3.0.dist-info").mkdir()
    (tmp_path / "torchao-0.3.0.dist-info/METADATA").write_text("Name: torchao\nVersion: 0.3.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    wanted = ".".join(map(str, TORCHAO))
    with pytest.raises(ValueError, match=f"needs torchao {wanted} or newer, found 0.3.0"):
        check_torchao()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_eight_bits_by_torchao(dtype):
    pytest.importorskip("torchao")
    params = parameters(dtype, (64, 128), (7,))
    cfg = OptimConfig(name="adamw_8bit", lr=1e-3, stochastic_rounding=dtype == BF16)
    optimizer = build_optimizer(params, cfg)
    exact = parameters(torch.float32, (64, 128), (7,))
    other = build_optimizer(exact, OptimConfig(lr=1e-3))
    start = [p.detach().float().clone() for p in params]
    for step in range(5):
        for group, o in ((params, optimizer), (exact, other)):
            give_gradients(group, step)
            apply_update(o, lr=2e-3, max_grad_norm=1e9)
    assert optimizer.state[params[0]]["exp_avg"].codes.dtype == torch.uint8
    for p, q, s in zip(params, exact, start, strict=True):
        noise = 0.0 if dtype != BF16 else ((q - s).abs() * s.abs() * 2**-7).sum().sqrt()
        assert (p.float() - q).norm() < 0.2 * (q - s).norm() + 2 * noise


# --- the guarded update ---------------------------------------------------------------------------


def test_schedules_by_hand():
    cfg = lambda **kw: OptimConfig(lr=1.0, warmup_steps=4, **kw)  # noqa: E731
    assert [learning_rate(cfg(), s, 12) for s in (0, 1, 3, 4, 11)] == [0.25, 0.5, 1.0, 1.0, 1.0]
    assert [learning_rate(cfg(schedule="linear"), s, 12) for s in (4, 8, 12)] == [1.0, 0.5, 0.0]
    cosine = [learning_rate(cfg(schedule="cosine"), s, 12) for s in (4, 8, 12)]
    assert cosine == pytest.approx([1.0, 0.5, 0.0])
    assert learning_rate(OptimConfig(lr=0.5, warmup_steps=0), 0, 1) == 0.5


@pytest.mark.parametrize(("cfg", "dtype"), COMBINATIONS)
def test_clipping_and_a_non_finite_gradient(cfg, dtype):
    params = parameters(dtype)
    optimizer = build_optimizer(params, cfg)
    give_gradients(params, 0)
    norm = math.sqrt(sum(p.grad.double().square().sum() for p in params))
    clipped = parameters(dtype)
    other = build_optimizer(clipped, cfg)
    for p, q in zip(params, clipped, strict=True):
        q.grad = (p.grad.double() * 0.1 / norm).to(dtype)
    assert gradient_norm(optimizer) == pytest.approx(norm, rel=1e-6)
    assert apply_update(optimizer, lr=1e-3, max_grad_norm=0.1) == pytest.approx(norm, rel=1e-6)
    assert gradient_norm(other) == pytest.approx(0.1, rel=1e-5 if dtype != BF16 else 2**-8)
    apply_update(other, lr=1e-3, max_grad_norm=1.0)
    for p, q in zip(params, clipped, strict=True):
        assert torch.allclose(p.float(), q.float(), atol=1e-6 if dtype != BF16 else 2**-7 * 4)

    weights = [p.detach().clone() for p in params]
    states = [{k: v.clone() for k, v in optimizer.state[p].items()} for p in params]
    for bad in (math.nan, math.inf, -math.inf):
        give_gradients(params, 1)
        params[1].grad[0] = bad
        assert not math.isfinite(apply_update(optimizer, lr=1e-3, max_grad_norm=0.1))
        for p, weight, state in zip(params, weights, states, strict=True):
            assert torch.equal(p, weight)
            assert p.grad is None
            assert all(torch.equal(optimizer.state[p][k], v) for k, v in state.items())


def test_a_norm_of_bfloat16_gradients_is_not_rounded_to_bfloat16():
    p = torch.nn.Parameter(torch.zeros(3, dtype=BF16))
    p.grad = torch.tensor([1.0, 1.0, 1.0], dtype=BF16)
    optimizer = build_optimizer([p], HALF)
    assert gradient_norm(optimizer) == pytest.approx(3**0.5, rel=1e-6)


# --- ranks ----------------------------------------------------------------------------------------

SHAPES = ((7, 5), (5,), (40, 3), (1, 4))  # 7 and 5 rows leave ranks with fewer, 1 row with none


def sharded(dtype, mesh, placements):
    from torch.distributed.tensor import distribute_tensor

    return [
        torch.nn.Parameter(distribute_tensor(p.detach(), mesh, placements))
        for p in parameters(dtype, *SHAPES)
    ]


def give_sharded_gradients(params, seed):
    from torch.distributed.tensor import distribute_tensor

    whole = parameters(torch.float32, *SHAPES)
    give_gradients(whole, seed)
    for p, q in zip(params, whole, strict=True):
        p.grad = distribute_tensor(q.grad.to(p.dtype), p.device_mesh, p.placements)


def check_shards_round_as_the_whole():
    """Every optimiser, on shards and on replicated shards: the update of one process, bitwise."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard

    world = open_world(ParallelConfig(), "cpu")
    rank, size = world.rank, world.size
    meshes = [(init_device_mesh("cpu", (size,)), (Shard(0),))]
    if size == 4:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
        meshes.append((mesh, (Replicate(), Shard(0))))
    for cfg, dtype in COMBINATIONS:
        alone = parameters(dtype, *SHAPES)
        one = build_optimizer(alone, cfg, seed=3)
        for step in range(4):
            give_gradients(alone, step)
            apply_update(one, lr=1e-3, max_grad_norm=1e9)
        for mesh, placements in meshes:
            params = sharded(dtype, mesh, placements)
            optimizer = build_optimizer(params, cfg, seed=3)
            for step in range(4):
                give_sharded_gradients(params, step)
                whole = parameters(dtype, *SHAPES)
                give_gradients(whole, step)
                norm = math.sqrt(sum(p.grad.double().square().sum() for p in whole))
                assert gradient_norm(optimizer) == pytest.approx(norm, rel=1e-6)
                got = apply_update(optimizer, lr=1e-3, max_grad_norm=1e9)
                assert got == pytest.approx(norm, rel=1e-6)
            for p, q in zip(params, alone, strict=True):
                assert torch.equal(p.full_tensor(), q), (cfg.name, dtype, placements)

            before = [p.full_tensor().clone() for p in params]
            states = [{k: v.clone() for k, v in optimizer.state[p].items()} for p in params]
            give_sharded_gradients(params, 9)
            if rank == size - 1:
                params[2].grad.to_local()[0] = math.nan
            assert math.isnan(apply_update(optimizer, lr=1e-3, max_grad_norm=1.0))
            for p, weight, state in zip(params, before, states, strict=True):
                assert torch.equal(p.full_tensor(), weight)
                for key, value in state.items():
                    ours = optimizer.state[p][key]
                    both = (ours, value) if key == "step" else (ours.to_local(), value.to_local())
                    assert torch.equal(*both)


def check_checkpoint_round_trip(folder):
    """torch.distributed.checkpoint's helpers with FSDP2, and one rank going on with the state."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import (
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )
    from torch.distributed.fsdp import fully_shard

    def model(dtype):
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(6, 7), torch.nn.Linear(7, 3)).to(dtype)

    def run(net, optimizer, steps):
        for step in steps:
            torch.manual_seed(step)
            net(torch.randn(5, 6, dtype=next(net.parameters()).dtype)).square().sum().backward()
            apply_update(optimizer, lr=1e-3, max_grad_norm=1.0)

    for number, (cfg, dtype) in enumerate(COMBINATIONS):
        net = fully_shard(model(dtype))
        optimizer = build_optimizer(net.parameters(), cfg, seed=1)
        run(net, optimizer, range(3))
        state = get_optimizer_state_dict(net, optimizer)
        dcp.save({"model": net.state_dict(), "optim": state}, checkpoint_id=folder / f"{number}")

        again = fully_shard(model(dtype))
        other = build_optimizer(again.parameters(), cfg, seed=8)
        into = {"model": again.state_dict(), "optim": get_optimizer_state_dict(again, other)}
        dcp.load(into, checkpoint_id=folder / f"{number}")
        again.load_state_dict(into["model"])
        set_optimizer_state_dict(again, other, into["optim"])
        assert other.param_groups[0].get("seed", 1) == 1
        run(net, optimizer, range(3, 6))
        run(again, other, range(3, 6))
        for p, q in zip(net.parameters(), again.parameters(), strict=True):
            assert torch.equal(p.to_local(), q.to_local()), (cfg.name, dtype)
            for key in ("exp_avg", "exp_avg_sq"):
                a, b = optimizer.state[p][key], other.state[q][key]
                assert a.dtype == b.dtype
                assert torch.equal(a.to_local(), b.to_local())
    torch.save(  # what one process must reach from the same checkpoint
        [p.full_tensor() for p in net.parameters()], folder / f"end-{dist.get_rank()}.pt"
    )


def check_offload():
    """Clip and step where FSDP keeps weights, gradients and states on the host."""
    from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

    ends = []
    for policy in (CPUOffloadPolicy(pin_memory=False), None):
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(6, 7), torch.nn.Linear(7, 3))
        net = fully_shard(net, **({"offload_policy": policy} if policy else {}))
        optimizer = build_optimizer(net.parameters(), OptimConfig(name="adamw_bf16"))
        for step in range(3):
            torch.manual_seed(step)
            net(torch.randn(5, 6)).square().sum().backward()
            assert apply_update(optimizer, lr=1e-2, max_grad_norm=0.1) > 0.1
        ends.append([p.full_tensor() for p in net.parameters()])
        if policy is not None:
            assert all(p.device.type == "cpu" for p in net.parameters())
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def check_two_ranks(folder):
    check_shards_round_as_the_whole()
    check_checkpoint_round_trip(Path(folder))
    check_offload()


def test_two_ranks_are_one(tmp_path):
    """And one process, without a group, goes on from what the two have saved."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import (
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    run_ranks(check_two_ranks, str(tmp_path))
    cfg, dtype = COMBINATIONS[-1]
    net = torch.nn.Sequential(torch.nn.Linear(6, 7), torch.nn.Linear(7, 3)).to(dtype)
    optimizer = build_optimizer(net.parameters(), cfg, seed=8)
    into = {"model": net.state_dict(), "optim": get_optimizer_state_dict(net, optimizer)}
    with pytest.warns(UserWarning, match="single process"):
        dcp.load(into, checkpoint_id=tmp_path / f"{len(COMBINATIONS) - 1}", no_dist=True)
    net.load_state_dict(into["model"])
    set_optimizer_state_dict(net, optimizer, into["optim"])
    for step in range(3, 6):
        torch.manual_seed(step)
        net(torch.randn(5, 6, dtype=dtype)).square().sum().backward()
        apply_update(optimizer, lr=1e-3, max_grad_norm=1.0)
    # Both ranks saw the same rows, so their mean is this gradient up to its rounding; where that
    # differs a weight may round to the other neighbour.
    for p, q in zip(net.parameters(), torch.load(tmp_path / "end-0.pt"), strict=True):
        assert torch.allclose(p.float(), q.float(), rtol=2**-7, atol=1e-4)


@pytest.mark.slow
def test_replicas_of_shards_are_one():
    run_ranks(check_shards_round_as_the_whole, size=4)
