"""DCT-AdamW, Trion and their projector: closed forms, state files, sizes, refusals."""

from __future__ import annotations

import io
import math

import pytest
import torch

from kit import noise
from weightsmith.core.errors import PlanError, RecipeError
from weightsmith.train.optim import DCTAdamW, Projector, Trion, bases, feedback, state_bytes
from weightsmith.train.optim.trion import newton_schulz

CPU = torch.device("cpu")
DOUBLE = torch.float64


def parameter(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.nn.Parameter:
    return torch.nn.Parameter(noise(*shape, seed=seed).to(dtype))


def descend(optimizer: torch.optim.Optimizer, start: int, stop: int) -> None:
    """Steps with the gradient of a quadratic plus noise of the step's own seed."""
    for step in range(start, stop):
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = p.detach() + noise(*p.shape, seed=step).to(p.dtype)
        optimizer.step()


# --- bases -------------------------------------------------------------------------------------------


def test_a_large_basis_is_orthogonal():
    q, some = bases.basis("dct3", 4096, torch.float32, CPU), [0, 1, 7, 2048, 4094, 4095]
    assert (q.T.double() @ q[:, some].double() - torch.eye(4096)[:, some]).abs().max() < 1e-6


def test_a_basis_is_shared_while_it_is_held():
    held = bases.basis("dct3", 12, DOUBLE, CPU)
    assert bases.basis("dct3", 12, DOUBLE, CPU) is held
    i = torch.arange(12, dtype=DOUBLE)
    column = math.sqrt(2 / 12) * torch.cos(math.pi * i * 7 / 24)  # j = 3
    column[0] *= math.sqrt(0.5)
    assert torch.allclose(held[:, 3], column, rtol=0, atol=1e-15)
    assert torch.equal(bases.basis("dct2", 12, DOUBLE, CPU), held.T)


@pytest.mark.parametrize("kind", bases.BASES)
@pytest.mark.parametrize("size", [1, 2, 3, 8, 31])
def test_transforms_are_products_with_the_basis(kind: bases.Kind, size: int):
    rows = noise(5, size, dtype=DOUBLE)
    q = bases.basis(kind, size, DOUBLE, CPU)
    assert torch.allclose(q.T @ q, torch.eye(size, dtype=DOUBLE), atol=1e-12)
    for fft in (True, False):
        assert torch.allclose(Projector(1, kind, fft=fft).transform(rows), rows @ q, atol=1e-12)


# --- the projector -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["dct3", "dct2"])
@pytest.mark.parametrize("size", [128, 129])
def test_many_columns_go_down_and_up_by_fft(kind: bases.Kind, size: int):
    """As products with the columns would have it, of tall and wide matrices, in any block."""
    rank, projector = 119, Projector(119, kind)
    assert projector._by_fft(CPU, rank, size)
    assert not projector._by_fft(CPU, 112, size)
    rows, q = noise(150, size, dtype=DOUBLE), bases.basis(kind, size, DOUBLE, CPU)
    low, columns = projector.choose(rows)
    assert torch.allclose(low, rows @ q[:, columns], atol=1e-12)
    assert torch.allclose(projector.down(rows, columns), low, atol=1e-12)
    up = low @ q[:, columns].T
    assert torch.allclose(projector.up(low, columns, size), up, atol=1e-12)
    for dtype, error in ((DOUBLE, 1e-12), (torch.float32, 1e-5)):
        for turned in (False, True):
            target = noise(150, size).to(dtype)
            wanted = target - 0.5 * up.to(dtype)
            target = target.T.contiguous() if turned else target
            projector.add(target, low, columns, -0.5)
            assert torch.allclose(target.T if turned else target, wanted, atol=error)


@pytest.mark.parametrize("kind", bases.BASES)
def test_blocks_change_nothing(kind: bases.Kind, monkeypatch: pytest.MonkeyPatch):
    """Norms add up over blocks, and the last one may be shorter; columns of a wide matrix are its rows."""
    rows, projector = noise(50, 24, dtype=DOUBLE), Projector(5, kind)
    whole, columns = projector.choose(rows)
    monkeypatch.setattr("weightsmith.train.optim.projector._BLOCK", 24 * 7)
    for form in (rows, rows.T.contiguous().T):
        low, again = projector.choose(form)
        assert torch.equal(again, columns)
        assert torch.allclose(low, whole, atol=1e-12)
        target = torch.zeros_like(form)
        projector.add(target, low, columns, 1.0)
        assert torch.allclose(target, projector.up(low, columns, 24), atol=1e-12)
    state: dict[str, torch.Tensor] = {}
    feedback.save(state, rows.float(), 8)
    again = feedback.load(state, 24, 8)
    assert torch.allclose(feedback.added(state, rows.float(), 8), again + rows.float())
    assert torch.allclose(again, rows.float(), atol=0.02)


@pytest.mark.parametrize("kind", bases.BASES)
def test_what_lies_in_the_columns_is_kept_whole(kind: bases.Kind):
    q = bases.basis(kind, 16, DOUBLE, CPU)
    rows = noise(20, 4, dtype=DOUBLE) @ q[:, [1, 5, 6, 15]].T
    low, columns = Projector(4, kind).choose(rows)
    assert set(columns.tolist()) == {1, 5, 6, 15}
    assert torch.allclose(Projector(4, kind).up(low, columns, 16), rows, atol=1e-12)
    assert torch.allclose(Projector(4, kind).down(rows, columns), low, atol=1e-12)


def test_norm_2_leaves_the_least_error():
    rows = noise(24, 16, dtype=DOUBLE)
    projector = Projector(5, norm=2)
    low, columns = projector.choose(rows)
    error = (rows - projector.up(low, columns, 16)).square().sum()
    energies = projector.transform(rows).square().sum(0)
    dropped = sum(float(e) for j, e in enumerate(energies) if j not in columns.tolist())
    assert float(error) == pytest.approx(dropped)
    assert error <= (1 - 5 / 16) * rows.square().sum()
    draw = torch.Generator().manual_seed(0)
    for _ in range(100):
        other = torch.randperm(16, generator=draw)[:5]
        assert error <= (rows - projector.up(projector.down(rows, other), other, 16)).square().sum() + 1e-12


def test_norms_rank_differently_and_ties_go_to_the_lower_column():
    q = bases.basis("dct3", 4, DOUBLE, CPU)
    spread, peak = torch.tensor([1.0] * 9), torch.tensor([2.5] + [0.0] * 8)  # norms 9 and 3; 2.5 and 2.5
    rows = torch.stack([spread, peak, 0 * peak, 0 * peak], 1).double() @ q.T
    assert Projector(1, norm=1).choose(rows)[1].tolist() == [0]
    rows = torch.stack([0.8 * spread, peak, 0 * peak, 0 * peak], 1).double() @ q.T
    assert Projector(1, norm=1).choose(rows)[1].tolist() == [0]
    assert Projector(1, norm=2).choose(rows)[1].tolist() == [1]
    widths = torch.linalg.vector_norm(q, 1, 0)  # a negative norm weighs by those of the basis
    flat = torch.diag(1 / widths) @ q.T
    assert Projector(1, norm=-1).choose(torch.diag(1.01 ** torch.arange(4)).double() @ flat)[1].tolist() == [3]
    assert sorted(Projector(2, fft=False).choose(torch.zeros(6, 9))[1].tolist()) == [0, 1]


# --- DCT-AdamW ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(9, 6), (6, 9), (6, 6)])
def test_full_rank_is_adamw_in_rotated_coordinates(shape: tuple[int, int]):
    p = parameter(*shape, dtype=DOUBLE)
    wide = shape[0] < shape[1]
    q = bases.basis("dct3", 6, DOUBLE, CPU)
    turned = torch.nn.Parameter((p.T if wide else p).detach() @ q)
    ours = DCTAdamW([p], 0.05, weight_decay=0.1, rank=6, interval=1000)
    theirs = torch.optim.AdamW([turned], 0.05, weight_decay=0.1)
    target = noise(*shape, seed=9).double()
    for _ in range(20):
        p.grad = p.detach() - target
        turned.grad = turned.detach() - (target.T if wide else target) @ q
        ours.step()
        theirs.step()
    back = turned.detach() @ q.T
    assert torch.allclose(p.detach(), back.T if wide else back, atol=1e-12)


def test_kernels_in_another_memory_format_move_alike():
    found = []
    for form in (torch.contiguous_format, torch.channels_last):
        p = torch.nn.Parameter(noise(6, 4, 3, 3).contiguous(memory_format=form))
        descend(DCTAdamW([p], rank=3), 0, 3)
        assert p.is_contiguous(memory_format=form)
        found.append(p.detach())
    assert torch.allclose(found[0], found[1], atol=1e-6)
    assert not torch.allclose(found[0], noise(6, 4, 3, 3), atol=1e-3)


def test_the_rest_is_adamw():
    shapes, options = [(7,), (40, 3), ()], {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.3}
    mine = [parameter(*shape, seed=i) for i, shape in enumerate(shapes)]
    its = [torch.nn.Parameter(p.detach().clone()) for p in mine]
    descend(DCTAdamW(mine, rank=2, max_size=40, **options), 0, 12)
    descend(torch.optim.AdamW(its, **options), 0, 12)
    for a, b in zip(mine, its, strict=True):
        assert torch.allclose(a, b, atol=1e-6)
    mine, its = [parameter(6, 4)], [parameter(6, 4)]
    descend(DCTAdamW(mine, rank=None, **options), 0, 12)
    descend(torch.optim.AdamW(its, **options), 0, 12)
    assert torch.allclose(mine[0], its[0], atol=1e-6)


def test_error_feedback_loses_nothing():
    p = parameter(10, 6, dtype=DOUBLE)
    optimizer = DCTAdamW([p], 0.0, rank=2, error_feedback=True, betas=(0.0, 0.9))  # m is the projected gradient
    before = torch.zeros(10, 6, dtype=DOUBLE)
    for step in range(4):
        p.grad = noise(10, 6, seed=step, dtype=DOUBLE)
        optimizer.step()
        state = optimizer.state[p]
        kept = Projector(2).up(state["m"], state["columns"].long(), 6)
        assert torch.allclose(state["error"] + kept, p.grad + before, atol=1e-12)
        before = state["error"].clone()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("size", [6, 7])
def test_quantised_errors_are_off_by_half_a_step(bits: feedback.Feedback, size: int):
    error = noise(5, size)
    error[2] = 0.25
    state: dict[str, torch.Tensor] = {}
    feedback.save(state, error, bits)
    found = feedback.load(state, size, bits)
    step = (error.max(1).values - error.min(1).values) / (2**bits - 1)
    assert ((found - error).abs() <= step[:, None] / 2 + 1e-6).all()
    assert torch.equal(found[2], error[2])
    assert sum(t.nbytes for t in state.values()) == feedback.bytes_of(5, size, 4, bits)


def test_moments_follow_their_directions():
    """As multiplying by Q_old^T Q_new would have it; slots of new directions start at 0."""
    turning, staying = (parameter(12, 8, dtype=DOUBLE) for _ in range(2))
    first = DCTAdamW([turning], 0.1, rank=3, rotate=True)
    second = DCTAdamW([staying], 0.1, rank=3)
    for step, optimizer in [(s, o) for s in range(2) for o in (first, second)]:
        p = optimizer.param_groups[0]["params"][0]
        p.grad = noise(12, 8, seed=step, dtype=DOUBLE)
        old = {name: tensor.clone() for name, tensor in optimizer.state[p].items()}
        optimizer.step()
    q, state = bases.basis("dct3", 8, DOUBLE, CPU), first.state[turning]
    was, now = old["columns"].long(), state["columns"].long()
    assert set(was.tolist()) != set(now.tolist())
    assert was.tolist() != now.tolist()
    low = noise(12, 8, seed=1, dtype=DOUBLE) @ q[:, now]
    rotation = q[:, was].T @ q[:, now]
    assert torch.allclose(state["m"], 0.9 * old["m"] @ rotation + 0.1 * low, atol=1e-12)
    assert torch.allclose(state["v"], 0.999 * (old["v"] @ rotation).abs() + 0.001 * low**2, atol=1e-12)
    assert torch.allclose(second.state[staying]["m"], 0.9 * old["m"] + 0.1 * low, atol=1e-12)


def test_directions_change_every_interval():
    p = parameter(12, 8)
    optimizer = DCTAdamW([p], 0.1, rank=2, interval=3)
    seen = []
    for step in range(6):
        p.grad = noise(12, 2, seed=step) @ bases.basis("dct3", 8, torch.float32, CPU)[:, [step, step + 1]].T
        optimizer.step()
        seen.append(sorted(optimizer.state[p]["columns"].tolist()))
    assert seen == [[0, 1], [0, 1], [2, 3], [2, 3], [2, 3], [5, 6]]  # at steps 1, 3 and 6


@pytest.mark.parametrize(
    "options",
    [{}, {"rotate": True, "error_feedback": True}, {"error_feedback": 8, "interval": 2}, {"error_feedback": 4}],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resumed_run_is_the_unbroken_one(options: dict, dtype: torch.dtype):
    shapes = [(9, 5), (5, 9), (4, 3, 2), (5,)]

    def start() -> tuple[list[torch.nn.Parameter], DCTAdamW]:
        params = [parameter(*shape, seed=i, dtype=dtype) for i, shape in enumerate(shapes)]
        groups = [{"params": params[:2], "rank": 3}, {"params": params[2:], "weight_decay": 0.1}]
        return params, DCTAdamW(groups, 0.05, rank=2, **options)

    whole, optimizer = start()
    descend(optimizer, 0, 6)
    half, optimizer = start()
    descend(optimizer, 0, 3)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    again, optimizer = start()
    for p, saved in zip(again, half, strict=True):
        p.data.copy_(saved.data)
    optimizer.load_state_dict(torch.load(file, weights_only=True))
    assert optimizer.state[again[0]]["m"].dtype == torch.float32
    assert optimizer.state[again[0]]["columns"].dtype == torch.int32
    descend(optimizer, 3, 6)
    for a, b in zip(whole, again, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("shape", [(16, 6), (6, 16), (6, 4, 3), (7,), (50, 6)])
@pytest.mark.parametrize("bits", [False, True, 8, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, DOUBLE])
def test_the_state_has_the_size_of_the_formula(shape: tuple[int, ...], bits: feedback.Feedback, dtype: torch.dtype):
    p = parameter(*shape, dtype=dtype)
    optimizer = DCTAdamW([p], 0.1, rank=3, error_feedback=bits, max_size=50)
    descend(optimizer, 0, 2)
    assert sum(t.nbytes for t in optimizer.state[p].values()) == state_bytes(
        shape, 3, error_feedback=bits, dtype=dtype, max_size=50
    )


@pytest.mark.parametrize("make", [DCTAdamW, Trion])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_read_only_and_closures_run_first(make: type, dtype: torch.dtype):
    p, idle = parameter(8, 5, dtype=dtype), parameter(3, 3)
    optimizer = make([p, idle], 0.1, rank=2)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (p.float() ** 2).sum()
        loss.backward()
        return loss

    before = p.detach().clone()
    assert optimizer.step(closure).item() == pytest.approx(float((before.float() ** 2).sum()))
    assert torch.equal(p.grad, 2 * before)
    assert not torch.equal(p, before)
    assert idle.grad is None
    assert torch.equal(idle, parameter(3, 3))


# --- Trion -------------------------------------------------------------------------------------------


def test_newton_schulz_orthogonalises():
    for shape in [(30, 6), (6, 30)]:
        values = torch.linalg.svdvals(newton_schulz(noise(*shape)))
        assert values.min() > 0.6
        assert values.max() < 1.3


@pytest.mark.parametrize("shape", [(40, 12), (12, 40)])
def test_newton_schulz_on_the_gram_matrix_is_the_iteration_itself(shape: tuple[int, int]):
    a, b, c = 3.4445, -4.7750, 2.0315
    matrix = noise(*shape, dtype=DOUBLE) * (10.0 ** -torch.linspace(0, 4, shape[1]))
    x = matrix / matrix.norm()
    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    assert torch.allclose(newton_schulz(matrix), x, atol=1e-5)  # x / (|x| + 1e-7)
    assert torch.allclose(newton_schulz(matrix.float()).double(), x, atol=2e-3)


@pytest.mark.parametrize(
    ("scale", "length"), [("original", math.sqrt(2)), ("match_rms_adamw", 0.8), ("dion", math.sqrt(2)), ("none", 1.0)]
)
def test_trion_moves_along_its_orthogonal_momentum(scale: str, length: float):
    p = parameter(16, 8)
    start = p.detach().clone()
    optimizer = Trion([p], 0.1, momentum=0.75, weight_decay=0.5, rank=3, scale=scale)
    p.grad = noise(16, 8, seed=1)
    optimizer.step()
    low, columns = Projector(3).choose(p.grad)
    along = Projector(3).up(newton_schulz(low), columns, 8)
    assert torch.allclose(p.detach(), start * 0.95 - 0.1 * length * along, atol=1e-6)
    kept = p.grad - 0.25 * Projector(3).up(low, columns, 8)
    assert torch.allclose(optimizer.state[p]["momentum"], kept, atol=1e-6)


def test_trion_resumes_and_treats_wide_as_tall():
    wide, tall = parameter(4, 9), torch.nn.Parameter(noise(4, 9).T.clone())
    pair = [Trion([p], rank=2, scale="none") for p in (wide, tall)]
    for step in range(3):
        wide.grad, tall.grad = noise(4, 9, seed=step), noise(4, 9, seed=step).T.clone()
        for optimizer in pair:
            optimizer.step()
    assert torch.allclose(wide, tall.T, atol=1e-6)
    again = torch.nn.Parameter(wide.detach().clone())
    resumed = Trion([again], rank=2, scale="none")
    resumed.load_state_dict(pair[0].state_dict())
    for p, optimizer in ((wide, pair[0]), (again, resumed)):
        p.grad = noise(4, 9, seed=3)
        optimizer.step()
    assert torch.equal(wide, again)


def test_trion_gives_vectors_their_own_rate():
    p, q = parameter(5), parameter(5)
    descend(Trion([p], rank=2, adam_lr=0.01, betas=(0.9, 0.95)), 0, 3)
    descend(torch.optim.AdamW([q], 0.01, (0.9, 0.95), 1e-10, weight_decay=0), 0, 3)
    assert torch.allclose(p, q, atol=1e-6)


# --- refusals ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"rank": 0}, "rank must be an integer of at least 1, got 0"),
        ({"rank": 2.5}, r"rank must be an integer of at least 1, got 2\.5"),
        ({"rank": 2, "lr": -1.0}, r"lr must be at least 0, got -1\.0"),
        ({"rank": 2, "eps": 0.0}, r"eps must be above 0, got 0\.0"),
        ({"rank": 2, "weight_decay": -1}, "weight_decay must be at least 0, got -1"),
        ({"rank": 2, "betas": (0.9, 1.0)}, r"betas must be two numbers in \[0, 1\)"),
        ({"rank": 2, "norm": 3}, "norm must be 1, 2, -1 or -2, got 3"),
        ({"rank": 2, "basis": "dct"}, "unknown basis 'dct'; did you mean 'dct"),
    ],
)
@pytest.mark.parametrize("make", [DCTAdamW, Trion])
def test_wrong_values_are_refused(make: type, options: dict, text: str):
    with pytest.raises(RecipeError, match=text):
        make([parameter(4, 4)], **options)


@pytest.mark.parametrize("make", [DCTAdamW, Trion])
def test_a_rank_above_the_smaller_side_is_refused(make: type):
    text = r"rank 4 exceeds the smaller side of head.weight \[3, 9\]: lower it, or .* rank=None"
    with pytest.raises(PlanError, match=text):
        make([("body.weight", parameter(8, 4)), ("head.weight", parameter(3, 9))], rank=4)
    make([("body.weight", parameter(8, 4)), ("embedding.weight", parameter(9, 3))], rank=4, max_size=9)


def test_more_values_are_refused():
    for options, text in [
        ({"error_feedback": 2}, "error_feedback must be False, True, 8 or 4, got 2"),
        ({"interval": 0}, "interval must be at least 1, got 0"),
    ]:
        with pytest.raises(RecipeError, match=text):
            DCTAdamW([parameter(4, 4)], rank=2, **options)
    for options, text in [
        ({"scale": "kimi"}, "unknown scale 'kimi'"),
        ({"momentum": 1.0}, r"momentum must be in \[0, 1\), got 1\.0"),
    ]:
        with pytest.raises(RecipeError, match=text):
            Trion([parameter(4, 4)], rank=2, **options)
    p = parameter(4, 4)
    p.grad = torch.zeros(4, 4).to_sparse()
    with pytest.raises(PlanError, match="take no sparse gradients"):
        DCTAdamW([p], rank=2).step()
