"""Layers with a shared weight and what each expert adds to it, weighted per sample.

y = x W_s^T + sum_t w_t (x V_t) (U_t S_t)^T: no weight is built, and samples of a batch may want different experts.
Samples lie one after the other in the leading dimension; beams and tokens of a sample may follow each other there.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import layer_norm

from weightsmith.core.errors import PlanError

__all__ = ["Branch", "Mix", "RoutedEmbedding", "RoutedLinear", "RoutedNorm"]


@dataclass(eq=False)
class Mix:
    """The weights of the experts, for all layers of a model together.

    index, weights  [samples, k]: which experts, and how much of each; None: the shared model alone
    """

    index: Tensor | None = None
    weights: Tensor | None = None

    def set(self, weights: Tensor | None) -> None:
        """Weights [samples, experts]; experts that no sample wants are left out of the sums."""
        if weights is None or not bool(weights.any()):
            self.index = self.weights = None
            return
        most = int((weights != 0).sum(1).max())
        self.weights, self.index = weights.abs().topk(most, 1)
        self.weights = weights.gather(1, self.index)


class Branch(nn.Module):
    """What the experts add to one matrix: sum_t w_t left_t^T right_t, left [T, r, out], right [T, r, in]."""

    left: Tensor
    right: Tensor

    def __init__(self, left: Tensor, right: Tensor) -> None:
        super().__init__()
        self.register_buffer("left", left.contiguous())
        self.register_buffer("right", right.contiguous())
        self._kept: tuple[Tensor, Tensor, Tensor] | None = None  # index, and the factors of its experts

    def _gathered(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """right [samples, k r, in] and left [samples, k r, out] of a choice; kept for the steps that follow."""
        if self._kept is None or self._kept[0] is not index:
            self._kept = (index, self.right[index].flatten(1, 2), self.left[index].flatten(1, 2))
        return self._kept[1:]

    def drop(self) -> None:
        """Forget the factors of the last choice."""
        self._kept = None

    def forward(self, x: Tensor, mix: Mix) -> Tensor:
        """x [samples * n, ..., in] -> [the same, out]."""
        assert mix.index is not None
        assert mix.weights is not None
        samples, k = mix.index.shape
        rows = _by_sample(x, samples)
        rank, out = self.left.shape[1:]
        if k == self.left.shape[0] and samples > 1:
            # Everybody wants everything: one product for all.
            order = mix.weights.new_zeros(samples, k).scatter(1, mix.index, mix.weights)
            inner = rows @ self.right.flatten(0, 1).T
            inner = inner * order.repeat_interleave(rank, 1)[:, None].to(inner.dtype)
            found = inner @ self.left.flatten(0, 1)
        else:
            right, left = self._gathered(mix.index)
            inner = rows @ right.mT
            inner = inner * mix.weights.repeat_interleave(rank, 1)[:, None].to(inner.dtype)
            found = inner @ left
        return found.view(*x.shape[:-1], out)

    def rows(self, ids: Tensor, mix: Mix) -> Tensor:
        """The rows of the matrix that `ids` [samples * n, ...] name, for embeddings: [the same, in]."""
        assert mix.index is not None
        assert mix.weights is not None
        samples = mix.index.shape[0]
        if ids.shape[0] == 1:  # positions, the same for all samples
            ids = ids.expand(samples, *ids.shape[1:])
        chosen = _by_sample(ids[..., None], samples)[..., 0]  # [samples, n]
        # [samples, k, r, n]: the columns of the wanted tokens, and of no others.
        places = torch.arange(self.left.shape[1], device=ids.device)[:, None]
        left = self.left[mix.index[:, :, None, None], places, chosen[:, None, None]]
        left = left * mix.weights[:, :, None, None].to(left.dtype)
        found = left.flatten(1, 2).mT @ self.right[mix.index].flatten(1, 2)
        return found.view(*ids.shape, self.right.shape[2])

    def matrix(self, weights: Tensor) -> Tensor:
        """The sum for one sample's weights [T]: [out, in]."""
        wanted = weights.nonzero()[:, 0]
        left = self.left[wanted] * weights[wanted, None, None].to(self.left.dtype)
        return left.flatten(0, 1).T @ self.right[wanted].flatten(0, 1)


class RoutedLinear(nn.Module):
    """A linear layer (or GPT-2's Conv1D, `turned`) whose weight and bias the experts change."""

    def __init__(self, inner: nn.Module, mix: Mix, branch: Branch | None, bias: Tensor | None, turned: bool) -> None:
        """`branch`: of the weight as [out, in]; bias: [T, out], what each expert adds."""
        super().__init__()
        self.inner, self.branch, self._mix, self._turned = inner, branch, mix, turned
        self.register_buffer("more", bias)
        self.more: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x)
        if self._mix.index is None:
            return y
        if self.branch is not None:
            y = y + self.branch(x, self._mix)
        return y if self.more is None else y + _per_row(_mixed(self.more, self._mix), y)

    @property
    def weight(self) -> Tensor:
        """The shared weight: models look at its dtype and device."""
        found: Tensor = self.inner.weight  # type: ignore[assignment]
        return found

    def explicit(self, weights: Tensor) -> dict[str, Tensor]:
        """Parameter -> its value for one sample's weights [T]."""
        found = {}
        if self.branch is not None:
            change = self.branch.matrix(weights)
            found["weight"] = self.weight + (change.T if self._turned else change)
        if self.more is not None:
            found["bias"] = self.inner.bias + weights.to(self.more.dtype) @ self.more  # type: ignore[operator]
        return found


class RoutedEmbedding(nn.Module):
    """An embedding whose rows the experts change."""

    def __init__(self, inner: nn.Embedding, mix: Mix, branch: Branch) -> None:
        """`branch`: of the table [tokens, width]."""
        super().__init__()
        self.inner, self.branch, self._mix = inner, branch, mix

    def forward(self, ids: Tensor) -> Tensor:
        y: Tensor = self.inner(ids)
        return y if self._mix.index is None else y + self.branch.rows(ids, self._mix)

    @property
    def weight(self) -> Tensor:
        """The shared table."""
        return self.inner.weight

    def explicit(self, weights: Tensor) -> dict[str, Tensor]:
        """Parameter -> its value for one sample's weights [T]."""
        return {"weight": self.weight + self.branch.matrix(weights)}


class RoutedNorm(nn.Module):
    """A norm whose scale and shift the experts change."""

    def __init__(self, inner: nn.Module, mix: Mix, changes: dict[str, Tensor]) -> None:
        """`changes`: parameter -> what each expert adds, [T, width]."""
        super().__init__()
        self.inner, self._mix, self._names = inner, mix, tuple(changes)
        for name, change in changes.items():
            self.register_buffer(f"more_{name}", change)

    def forward(self, x: Tensor) -> Tensor:
        if self._mix.index is None:
            plain: Tensor = self.inner(x)
            return plain
        own = {name: _per_row(getattr(self.inner, name) + self._change(name), x) for name in self._names}
        if isinstance(self.inner, nn.LayerNorm):  # takes no scale per row
            y = layer_norm(x, self.inner.normalized_shape, None, None, self.inner.eps)
            y = y * own.get("weight", self.inner.weight)
            bias = own.get("bias", self.inner.bias)
            return y if bias is None else y + bias
        found: Tensor = functional_call(self.inner, own, (x,))
        return found

    def _change(self, name: str) -> Tensor:
        return _mixed(getattr(self, f"more_{name}"), self._mix)

    def explicit(self, weights: Tensor) -> dict[str, Tensor]:
        """Parameter -> its value for one sample's weights [T]."""
        changes = {name: getattr(self, f"more_{name}") for name in self._names}
        return {name: getattr(self.inner, name) + weights.to(change) @ change for name, change in changes.items()}


def _by_sample(x: Tensor, samples: int) -> Tensor:
    """[samples * n, ..., width] -> [samples, n * ..., width]."""
    if x.shape[0] % samples:
        raise PlanError([f"experts were chosen for {samples} samples, but a batch of {x.shape[0]} came; choose again"])
    return x.reshape(samples, -1, x.shape[-1])


def _mixed(changes: Tensor, mix: Mix) -> Tensor:
    """sum_t w_t changes_t of each sample: [samples, width]."""
    assert mix.index is not None
    assert mix.weights is not None
    return (changes[mix.index] * mix.weights[..., None].to(changes.dtype)).sum(1)


def _per_row(values: Tensor, x: Tensor) -> Tensor:
    """[samples, width] -> as many leading rows as x has, to be broadcast against it."""
    samples = values.shape[0]
    if x.shape[0] % samples:
        raise PlanError([f"experts were chosen for {samples} samples, but a batch of {x.shape[0]} came; choose again"])
    wide = values.repeat_interleave(x.shape[0] // samples, 0)
    return wide.view(x.shape[0], *[1] * (x.ndim - 2), -1)
