"""DMM: distil several denoisers into one that is switched by a style (Song et al., ICCV 2025, arXiv 2504.12364).

    from weightsmith.train import dmm

    student = dmm.Styled(base, styles=3, at="time_embedding")
    distil = dmm.Distillation(student, teachers, blocks=["down_blocks.0", "mid_block", "up_blocks.0"])
    losses = distil.backward(lambda model: model(noisy, t, text).sample)     # all teachers, accumulated
    optimizer.step()
    student.use({0: 0.5, 2: 0.5})                                            # between two styles

Works on any module that has a submodule which embeds the time step as [batch, width], as U-Nets of diffusers do.
The paper's adversarial third loss is in no released code and is left out.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, mse_loss, silu

from weightsmith.core.errors import PlanError, RecipeError, did_you_mean, some

__all__ = ["Distillation", "Style", "Styled", "as_epsilon", "feature_loss", "outputs", "same_latents"]

PLACES = ("time_embedding", "time_embed", "t_embedder", "time_mlp")
"""What modules call their embedding of the time step: diffusers, CompVis, DiT, others."""

Prediction = Literal["epsilon", "v_prediction", "sample"]
Chosen = int | Mapping[int, float] | Tensor | None


class Style(nn.Module):
    """One vector per style: a table [N, width] (normal) and an MLP (linear, SiLU, linear).

    The last layer starts at zero, so that a student starts as its base whatever the style (ours: the released code
    starts it like any layer, which adds noise to the base).
    """

    def __init__(self, styles: int, width: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        if styles < 1 or width < 1:
            raise RecipeError(f"a style module needs at least one style and a width, got {styles} and {width}")
        self.table = nn.Parameter(torch.randn(styles, width, dtype=dtype))
        self.first = nn.Linear(width, width, dtype=dtype)
        self.last = nn.Linear(width, width, dtype=dtype)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def __len__(self) -> int:
        return len(self.table)

    def vectors(self, chosen: Chosen) -> Tensor:
        """MLP(sum_i w_i E_i): [1, width], or [batch, width] for a style per sample.

        chosen  an id; id -> weight; ids [batch]; or weights [batch, N].  Weights sum to 1: other sums are refused
        """
        if isinstance(chosen, Tensor) and not chosen.is_floating_point():
            outside = [int(i) for i in chosen.flatten() if not 0 <= i < len(self)]
            mixed = None if outside or chosen.ndim != 1 else self.table[chosen]
        elif isinstance(chosen, Tensor):
            outside = []
            good = chosen.ndim == 2 and chosen.shape[1] == len(self)
            mixed = self._mixed(chosen.to(self.table)) if good else None
        else:
            given = {chosen: 1.0} if isinstance(chosen, int) else dict(chosen or {})
            outside = [i for i in given if not 0 <= i < len(self)]
            weights = torch.tensor([[given.get(i, 0.0) for i in range(len(self))]])
            mixed = None if outside else self._mixed(weights.to(self.table))
        if mixed is None:
            what = f"style {outside[0]} is not" if outside else f"{type(chosen).__name__} of this shape is not one"
            raise PlanError([f"{what} of the {len(self)} styles 0 .. {len(self) - 1}"])
        found: Tensor = self.last(silu(self.first(mixed)))
        return found

    def _mixed(self, weights: Tensor) -> Tensor:
        sums = weights.sum(1)
        if bool(((sums - 1).abs() > 1e-3).any()):
            raise PlanError([f"weights of styles must sum to 1, got {float(sums[(sums - 1).abs().argmax()]):g}"])
        return weights @ self.table

    @torch.no_grad()
    def add(self) -> int:
        """Append a style, the mean of the others, and return its id; their outputs stay as they are.

        The table is a new parameter then: make the optimizer after it.
        """
        self.table = nn.Parameter(torch.cat([self.table, self.table.mean(0, keepdim=True)]))
        return len(self) - 1


class Styled(nn.Module):
    """A denoiser whose time embedding has a style added: `use` says which, until it says otherwise.

    model   called as it was; its parameters train along
    styles  how many, or a `Style`
    at      the submodule that embeds the time step; it must give [batch, width].  None: found by its usual names
    """

    def __init__(self, model: nn.Module, styles: int | Style, at: str | None = None) -> None:
        super().__init__()
        self.model, self.at = model, at or _place(model)
        try:
            embedding = model.get_submodule(self.at)
        except AttributeError:
            names = [name for name, _ in model.named_modules() if name]
            raise PlanError([f"no submodule {self.at!r}{did_you_mean(self.at, names)}"]) from None
        last = [p for p in embedding.parameters() if p.ndim == 2]
        if not last:
            raise PlanError([f"{self.at} has no linear layer; name the submodule that embeds the time step"])
        style = styles if isinstance(styles, Style) else Style(styles, last[-1].shape[0], last[-1].dtype)
        self.style = style.to(last[-1].device)
        self.chosen: Chosen = None
        embedding.register_forward_hook(self._add)

    def use(self, chosen: Chosen) -> Styled:
        """Use a style from now on: an id, a mixture {id: weight}, one per sample (see `Style.vectors`), or none."""
        if chosen is not None and not isinstance(chosen, Tensor):
            self.style.vectors(chosen)  # refuses what is no style
        self.chosen = chosen
        return self

    def forward(self, *arguments: Any, **options: Any) -> Any:
        """What the model gives, with the chosen style."""
        return self.model(*arguments, **options)

    def _add(self, _: nn.Module, __: Any, output: Tensor) -> Tensor:
        return output if self.chosen is None else output + self.style.vectors(self.chosen).to(output.dtype)


class Distillation:
    """The loss of a styled student against one teacher per style, summed up over all of them before a step.

    teachers        one per style, in their order; frozen and in eval mode
    blocks          names of submodules whose outputs are compared too
    feature_weight  of that comparison; 0.002 in the released code
    feature         l2, or cos: 1 - the cosine over channels
    predicts        what the student predicts: epsilon, v_prediction or sample
    predictions     what each teacher predicts, where that differs: losses are then between noises (`as_epsilon`)

    Teachers are cycled on one device: the gradient is that of one rank per teacher, averaged.
    """

    def __init__(
        self,
        student: Styled,
        teachers: Sequence[nn.Module],
        *,
        blocks: Sequence[str] = (),
        feature_weight: float = 0.002,
        feature: Literal["l2", "cos"] = "l2",
        predictions: Sequence[Prediction] | None = None,
        predicts: Prediction = "epsilon",
    ) -> None:
        if len(teachers) != len(student.style):
            raise PlanError([f"{len(student.style)} styles need as many teachers, got {len(teachers)}"])
        if feature not in ("l2", "cos"):
            raise RecipeError(f"feature must be l2 or cos, got {feature!r}")
        self.student, self.teachers, self.blocks = student, list(teachers), tuple(blocks)
        self.feature_weight, self.feature = feature_weight, feature
        self.predicts, self.predictions = predicts, tuple(predictions or [predicts] * len(teachers))
        if len(self.predictions) != len(teachers):
            raise PlanError([f"{len(teachers)} teachers need as many predictions, got {len(self.predictions)}"])
        problems = [p for i, teacher in enumerate(teachers) for p in _differences(student.model, teacher, i)]
        if student.style.table.dtype.itemsize < 4:
            problems.append(f"the student is {student.style.table.dtype}; train it in float32 (autocast is fine)")
        if problems:
            raise PlanError(problems)
        for teacher in self.teachers:
            teacher.requires_grad_(False).eval()

    def loss(self, teacher: int, call: Callable[[nn.Module], Any], noise_level: NoiseLevel | None = None) -> Tensor:
        """The student's loss against one teacher: a scalar.

        call         runs a model on the batch and returns its prediction, [batch, channels, ...]
        noise_level  (noisy sample, alpha, sigma) of the batch, where predictions are converted
        """
        with torch.no_grad(), outputs(self.teachers[teacher], self.blocks) as theirs:
            wanted = call(self.teachers[teacher])
        with self._style(teacher), outputs(self.student.model, self.blocks) as ours:
            found = call(self.student)
        if {self.predicts, self.predictions[teacher]} != {self.predicts}:
            if noise_level is None:
                raise PlanError([f"teacher {teacher} predicts {self.predictions[teacher]}: noise_level is needed"])
            found = as_epsilon(found, self.predicts, *noise_level)
            wanted = as_epsilon(wanted, self.predictions[teacher], *noise_level)
        loss = mse_loss(found.float(), wanted.float())
        if self.blocks and self.feature_weight:
            loss = loss + self.feature_weight * feature_loss(ours, theirs, self.feature)
        return loss

    def backward(
        self,
        call: Callable[[nn.Module], Any],
        noise_level: NoiseLevel | None = None,
        teachers: Sequence[int] | None = None,
    ) -> list[float]:
        """Add the gradient of the mean loss over teachers (default: all); the loss of each.

        One teacher's graph is alive at a time.
        """
        chosen = range(len(self.teachers)) if teachers is None else teachers
        found = []
        for teacher in chosen:
            loss = self.loss(teacher, call, noise_level)
            torch.autograd.backward(loss / len(chosen))
            found.append(loss.detach().item())
        return found

    def extended(self, teacher: nn.Module) -> Distillation:
        """With one more teacher, for a new last style.

        The old styles are distilled from a frozen copy of the student as it is now, so their teachers are not needed
        any more (the paper's idea, listed as to do in its code).  Give the optimizer the student's parameters anew.
        """
        frozen = copy.deepcopy(self.student)
        before = [_AsStyle(frozen, style) for style in range(len(frozen.style))]
        self.student.style.add()
        return Distillation(
            self.student,
            [*before, teacher],
            blocks=self.blocks,
            feature_weight=self.feature_weight,
            feature=self.feature,
            predicts=self.predicts,
        )

    @contextlib.contextmanager
    def _style(self, teacher: int) -> Iterator[None]:
        before, self.student.chosen = self.student.chosen, teacher
        try:
            yield
        finally:
            self.student.chosen = before


class _AsStyle(nn.Module):
    """A styled denoiser with one style chosen for good, as a teacher."""

    def __init__(self, styled: Styled, style: int) -> None:
        super().__init__()
        self.styled, self.chosen = styled, style

    def forward(self, *arguments: Any, **options: Any) -> Any:
        return self.styled.use(self.chosen)(*arguments, **options)


# --- losses ----------------------------------------------------------------------------------------

NoiseLevel = tuple[Tensor, Tensor, Tensor]


def as_epsilon(prediction: Tensor, kind: Prediction, noisy: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """The noise that a prediction stands for: [batch, ...].

    noisy         alpha sample + sigma noise, with alpha^2 + sigma^2 = 1
    alpha, sigma  [batch]; of a scheduler with alphas_cumprod a: sqrt(a[t]) and sqrt(1 - a[t])
    v_prediction  is alpha noise - sigma sample
    """
    if kind == "epsilon":
        return prediction
    rest = (-1, *(1 for _ in noisy.shape[1:]))
    alpha, sigma = alpha.reshape(rest), sigma.reshape(rest)
    if kind == "v_prediction":
        return alpha * prediction + sigma * noisy
    if kind == "sample":
        return (noisy - alpha * prediction) / sigma
    raise RecipeError(f"a model predicts epsilon, v_prediction or sample, got {kind!r}")


def feature_loss(ours: Sequence[Tensor], theirs: Sequence[Tensor], kind: Literal["l2", "cos"] = "l2") -> Tensor:
    """Mean over blocks of the squared difference of outputs [batch, channels, ...], or of 1 - their cosine."""
    pairs = [(one.float(), other.float()) for one, other in zip(ours, theirs, strict=True)]
    if kind == "l2":
        return torch.stack([mse_loss(one, other) for one, other in pairs]).mean()
    return torch.stack([(1 - cosine_similarity(one, other, dim=1)).mean() for one, other in pairs]).mean()


@contextlib.contextmanager
def outputs(model: nn.Module, blocks: Sequence[str]) -> Iterator[list[Tensor]]:
    """Collects what submodules give while the model runs, in the order of `blocks`; of a tuple the first."""
    model = model.styled.model if isinstance(model, _AsStyle) else model
    found: dict[str, Tensor] = {}
    kept: list[Tensor] = []

    def hook(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def keep(_: nn.Module, __: Any, output: Any) -> None:
            found[name] = output[0] if isinstance(output, tuple) else output
            kept[:] = [found[block] for block in blocks if block in found]

        return keep

    names = dict(model.named_modules())
    if unknown := [block for block in blocks if block not in names]:
        raise PlanError([f"blocks: no submodule {some(unknown)}{did_you_mean(unknown[0], names)}"])
    handles = [names[block].register_forward_hook(hook(block)) for block in blocks]
    try:
        yield kept
    finally:
        for handle in handles:
            handle.remove()


# --- checks ----------------------------------------------------------------------------------------


def same_latents(student: Mapping[str, Any], *teachers: Mapping[str, Any]) -> None:
    """PlanError where the configurations of VAEs give latents that cannot be compared."""
    keys = ("scaling_factor", "shift_factor", "latent_channels", "latents_mean", "latents_std", "block_out_channels")
    problems = [
        f"the VAE of teacher {i} has {key} = {teacher.get(key)!r}, the student's {student.get(key)!r}"
        for i, teacher in enumerate(teachers)
        for key in keys
        if teacher.get(key) != student.get(key)
    ]
    if problems:
        raise PlanError(problems)


def _place(model: nn.Module) -> str:
    """Where a model embeds its time step."""
    names = {name for name, _ in model.named_modules()}
    found = next((place for place in PLACES if place in names), None)
    if found is None:
        raise PlanError([f"no submodule called {', '.join(PLACES)}; name the one that embeds the time step (at=...)"])
    return found


def _differences(student: nn.Module, teacher: nn.Module, number: int) -> list[str]:
    """Why a teacher is not of the student's architecture."""
    teacher = teacher.styled.model if isinstance(teacher, _AsStyle) else teacher
    ours, theirs = ({name: list(p.shape) for name, p in m.named_parameters()} for m in (student, teacher))
    wrong = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
    if not wrong:
        return []
    first = wrong[0]
    return [
        f"teacher {number} is of another architecture: {first} is {theirs.get(first, 'missing')}, the student's "
        f"{ours.get(first, 'missing')} ({len(wrong)} differ)"
    ]
