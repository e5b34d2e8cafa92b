"""DMM: styles, distillation from several teachers, conversions."""

from __future__ import annotations

import copy

import pytest
import torch
from denoisers import Denoiser, batch

from kit import noise
from weightsmith.core.errors import PlanError, RecipeError
from weightsmith.train import dmm

X, T = batch(0)


def student(styles: int = 2, seed: int = 0) -> dmm.Styled:
    torch.manual_seed(seed)
    return dmm.Styled(Denoiser(0), styles)


def stirred(styles: int = 2) -> dmm.Styled:
    """A student whose styles do something."""
    made = student(styles)
    made.style.last.weight.data = noise(8, 8, seed=5)
    return made


def test_every_style_starts_as_the_base():
    made = student(3)
    for style in (None, 0, 1, 2, {0: 0.5, 2: 0.5}):
        assert torch.equal(made.use(style)(X, T), Denoiser(0)(X, T))


def test_styles_mix():
    made = stirred(3)
    one = made.use(1)(X, T)
    assert not torch.allclose(one, made.use(2)(X, T), atol=1e-3)
    assert torch.equal(made.use({1: 1.0})(X, T), one)
    assert torch.allclose(made.use({1: 1 - 1e-4, 2: 1e-4})(X, T), one, atol=1e-3)
    ids = torch.tensor([0, 1, 2, 1, 0, 0, 2, 1])
    each = made.use(ids)(X, T)
    assert torch.allclose(each[1:2], made.use(1)(X[1:2], T[1:2]), atol=1e-6)
    assert torch.allclose(made.use(torch.eye(3)[ids])(X, T), each, atol=1e-6)
    mixed = made.style.vectors({0: 0.25, 2: 0.75})
    by_hand = 0.25 * made.style.table[0] + 0.75 * made.style.table[2]
    assert torch.allclose(mixed[0], made.style.last(torch.nn.functional.silu(made.style.first(by_hand))))


def test_a_new_style_leaves_the_old_ones():
    made = stirred()
    before = [made.use(i)(X, T) for i in range(2)]
    assert made.style.add() == 2
    assert all(torch.equal(made.use(i)(X, T), before[i]) for i in range(2))
    assert torch.equal(made.style.table[2], made.style.table[:2].mean(0))


@pytest.mark.parametrize("feature", ["l2", "cos"])
def test_a_teacher_like_the_base_costs_nothing(feature):
    distil = dmm.Distillation(student(1), [Denoiser(0)], blocks=["down", "up"], feature=feature)
    assert distil.backward(lambda model: model(X, T)) == [pytest.approx(0, abs=1e-8)]


def test_cycling_has_the_gradient_of_one_rank_per_teacher():
    teachers = [Denoiser(1), Denoiser(2), Denoiser(3)]
    made = stirred(3)
    distil = dmm.Distillation(made, teachers, blocks=["down"], feature_weight=0.5)
    losses = distil.backward(lambda model: model(X, T))
    cycled = {name: p.grad.clone() for name, p in made.named_parameters()}
    want = {name: torch.zeros_like(p) for name, p in made.named_parameters()}
    for i, teacher in enumerate(teachers):
        made.zero_grad()
        made.use(i)
        down = made.model.down(X)
        squares = (made(X, T) - teacher(X, T)).square().mean() + 0.5 * (down - teacher.down(X)).square().mean()
        squares.backward()
        assert losses[i] == pytest.approx(squares.item(), rel=1e-5)
        for name, p in made.named_parameters():
            want[name] += (0 if p.grad is None else p.grad) / 3
    assert all(torch.allclose(cycled[name], want[name], atol=1e-6) for name in want)
    assert all(p.grad is None for teacher in teachers for p in teacher.parameters())


def test_styles_come_nearer_to_their_teachers_than_any_average_of_them():
    teachers = [Denoiser(1), Denoiser(2)]
    made = student()
    distil = dmm.Distillation(made, teachers)
    optimizer = torch.optim.Adam(made.parameters(), 0.01)
    for step in range(400):
        optimizer.zero_grad()
        x, t = batch(step)
        distil.backward(lambda model, x=x, t=t: model(x, t))
        optimizer.step()

    x, t = batch(1000, 64)
    wanted = [teacher(x, t) for teacher in teachers]

    def errors(outputs: list[torch.Tensor]) -> list[float]:
        return [(a - b).square().mean().item() for a, b in zip(outputs, wanted, strict=True)]

    found = errors([made.use(i)(x, t) for i in range(2)])
    merged = Denoiser(0)
    for weight in torch.linspace(0, 1, 11):
        states = [teacher.state_dict() for teacher in teachers]
        merged.load_state_dict({n: torch.lerp(states[0][n], states[1][n], weight) for n in states[0]})
        average = errors([merged(x, t)] * 2)
        assert sum(found) < 0.5 * sum(average)
    crossed = errors([made.use(1 - i)(x, t) for i in range(2)])
    assert max(found) < min(crossed)  # the diagonal


def test_one_more_teacher_keeps_the_old_styles():
    made = stirred()
    frozen = [made.use(i)(X, T).detach() for i in range(2)]
    distil = dmm.Distillation(made, [Denoiser(1), Denoiser(2)], blocks=["down"]).extended(Denoiser(3))
    assert len(made.style) == 3
    assert distil.backward(lambda model: model(X, T), teachers=[0, 1]) == [pytest.approx(0, abs=1e-9)] * 2
    made.zero_grad()
    made.model.up.bias.data += 1  # the teachers of old styles are a copy
    losses = distil.backward(lambda model: model(X, T))
    assert losses[0] == pytest.approx(1, rel=1e-4)
    want = (made.use(2)(X, T) - Denoiser(3)(X, T)).square().mean().item()
    assert losses[2] == pytest.approx(want + 0.002 * (made.model.down(X) - Denoiser(3).down(X)).square().mean().item())
    assert torch.equal(copy.deepcopy(distil.teachers[1])(X, T), frozen[1])


def test_predictions_are_converted():
    sample, eps = noise(6, 1, 4, 4, seed=1), noise(6, 1, 4, 4, seed=2)
    alpha = torch.linspace(0.1, 0.9, 6)
    sigma = (1 - alpha**2).sqrt()
    a, s = alpha[:, None, None, None], sigma[:, None, None, None]
    noisy = a * sample + s * eps
    for kind, prediction in {"epsilon": eps, "sample": sample, "v_prediction": a * eps - s * sample}.items():
        assert torch.allclose(dmm.as_epsilon(prediction, kind, noisy, alpha, sigma), eps, atol=1e-4)

    class Says(Denoiser):
        """The exact answer in its own words."""

        def __init__(self, answer: torch.Tensor) -> None:
            super().__init__(0)
            self.answer = answer

        def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return self.answer + 0 * super().forward(x, t)

    styled = dmm.Styled(Says(eps), 1)
    distil = dmm.Distillation(styled, [Says(a * eps - s * sample)], predictions=["v_prediction"])
    assert distil.loss(0, lambda m: m(noisy, alpha), (noisy, alpha, sigma)).item() == pytest.approx(0, abs=1e-8)
    with pytest.raises(PlanError, match="teacher 0 predicts v_prediction: noise_level is needed"):
        distil.loss(0, lambda m: m(noisy, alpha))
    with pytest.raises(RecipeError, match="a model predicts epsilon, v_prediction or sample, got 'noise'"):
        dmm.as_epsilon(eps, "noise", noisy, alpha, sigma)


@pytest.mark.parametrize(
    ("chosen", "text"),
    [
        (2, r"style 2 is not of the 2 styles 0 \.\. 1"),
        (-1, r"style -1 is not of the 2 styles"),
        ({0: 0.5, 3: 0.5}, r"style 3 is not of the 2 styles"),
        ({0: 0.5, 1: 0.6}, r"weights of styles must sum to 1, got 1\.1"),
        (torch.tensor([0, 2]), r"style 2 is not of the 2 styles"),
        (torch.ones(3), r"Tensor of this shape is not one of the 2 styles"),
    ],
)
def test_wrong_styles_are_refused(chosen, text: str):
    with pytest.raises(PlanError, match=text):
        student().use(chosen)(X[:2], T[:2])


def test_what_does_not_fit_is_refused():
    with pytest.raises(PlanError, match="2 styles need as many teachers, got 1"):
        dmm.Distillation(student(), [Denoiser(1)])
    with pytest.raises(PlanError, match=r"0 is of another architecture: down\.weight is \[8, 2, 3, 3\], .*\[8, 1"):
        dmm.Distillation(student(1), [Denoiser(1, channels=2)])
    with pytest.raises(PlanError, match=r"the student is torch\.bfloat16; train it in float32"):
        dmm.Distillation(dmm.Styled(Denoiser(0).bfloat16(), 1), [Denoiser(1)])
    with pytest.raises(RecipeError, match="feature must be l2 or cos, got 'l1'"):
        dmm.Distillation(student(1), [Denoiser(1)], feature="l1")
    with pytest.raises(PlanError, match="blocks: no submodule donw; did you mean 'down'"):
        dmm.Distillation(student(1), [Denoiser(1)], blocks=["donw"]).backward(lambda m: m(X, T))
    with pytest.raises(PlanError, match=r"no submodule called time_embedding, .* name the one that embeds"):
        dmm.Styled(torch.nn.Linear(2, 2), 1)
    with pytest.raises(PlanError, match="no submodule 'time_embeding'; did you mean 'time_embedding'"):
        dmm.Styled(Denoiser(0), 1, at="time_embeding")
    same = {"scaling_factor": 0.18215, "latent_channels": 4}
    dmm.same_latents(same, same)
    with pytest.raises(PlanError, match=r"VAE of teacher 1 has scaling_factor = 0\.13, the student's 0\.18215"):
        dmm.same_latents(same, same, {**same, "scaling_factor": 0.13})


def test_a_unet_of_diffusers_is_taken_as_it_is():
    diffusers = pytest.importorskip("diffusers")

    def unet(seed: int, **more) -> torch.nn.Module:
        torch.manual_seed(seed)
        sizes = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4, "cross_attention_dim": 8}
        kinds = {
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        }
        return diffusers.UNet2DConditionModel(sample_size=8, attention_head_dim=4, **sizes, **kinds, **more).eval()

    x, t, text = noise(2, 4, 8, 8), torch.tensor([3, 700]), noise(2, 5, 8)
    made = dmm.Styled(unet(0), styles=2)
    assert torch.equal(made.use(1)(x, t, text).sample, unet(0)(x, t, text).sample)
    distil = dmm.Distillation(made, [unet(0), unet(1)], blocks=["down_blocks.0", "mid_block", "up_blocks.1"])
    losses = distil.backward(lambda model: model(x, t, text).sample)
    assert losses[0] == pytest.approx(0, abs=1e-10)
    assert losses[1] > 1e-3
    assert all(p.grad is not None for p in (made.style.last.weight, made.model.conv_in.weight))
    with pytest.raises(PlanError, match=r"teacher 0 is of another architecture: conv_in\.weight"):
        dmm.Distillation(dmm.Styled(unet(0), 1), [unet(1, in_channels=9)])
