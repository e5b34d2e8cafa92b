"""The gradient pass: what the merged weights' gradient says about the merge's parameters.

A parameter may be a tensor that requires grad.  Plans and merges then see its number (`core.parameter.Traced`); this
pass reads the inputs once more, block by block, and contracts the gradient of the merged weights with the merge's own
derivative.  Memory is bounded as a merge's is, whatever the number of experts.

    plan = ...                                          # of a recipe whose parameters are tensors
    found = pull(plan, inputs, {"model.norm.weight": gradient})
    found[weight]                                       # shaped like the tensor `weight`

What measuring passes found (cuts, norms, signs, singular directions chosen by rank) is constant to the pass: its
derivative is zero almost everywhere, or the method does not declare the parameter `smooth`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from weightsmith.core.errors import PlanError, did_you_mean
from weightsmith.core.keys import Key
from weightsmith.core.lazy import torch
from weightsmith.core.method import Grain, Pipeline
from weightsmith.core.parameter import Traced, Vector, opened, traced
from weightsmith.core.settings import DEFAULT, Settings, cores
from weightsmith.core.task import Task, Way, takes_deltas
from weightsmith.engine.carry import context_of
from weightsmith.engine.context import Context
from weightsmith.engine.execute import carried_out_here
from weightsmith.engine.model import measure_model
from weightsmith.engine.passes import Chain, measure, ranges, refuse_bad_inputs
from weightsmith.engine.rows import StoredRows
from weightsmith.engine.runner import SerialRunner, ThreadRunner, one_thread_each
from weightsmith.engine.sites import Reader
from weightsmith.inputs.opened import Inputs
from weightsmith.kernels.stored import dots
from weightsmith.ops.combine import Summed
from weightsmith.plan.plan import Plan

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Pullback", "attached", "pull", "tensors_of"]

Gradients = dict["Tensor", "Tensor"]
"""Parameter -> gradient of its shape and dtype."""


def pull(
    plan: Plan,
    inputs: Inputs,
    gradient: Mapping[str, Tensor],
    *,
    keys: Iterable[str] | None = None,
    settings: Settings = DEFAULT,
) -> Gradients:
    """Contract the gradient of the merged weights: parameter -> gradient, for every tensor that the plan depends on.

    gradient  tensor name -> d loss / d merged tensor, of its shape; tensors left out have a gradient of zero
    keys      the tensors to look at; default: all of `gradient`

    The same numbers for any number of threads: tensors are added in the order of the plan.

    Raises PlanError for a name or shape that the plan does not have, NumericError for a NaN or Inf in an input.
    """
    chosen = gradient if keys is None else {name: gradient[name] for name in keys}
    return Pullback.of(plan, inputs).all(chosen, settings.threads or cores())


def tensors_of(tasks: Iterable[Task]) -> tuple[Tensor, ...]:
    """The tensors that parameters of these tasks stand for, each once."""
    traced = (value for task in tasks if task.pipeline is not None for value in _traced(task.pipeline))
    return tuple({id(value.tensor): value.tensor for value in traced}.values())


def refuse_underived(tasks: Iterable[Task], count: int) -> None:
    """Raise PlanError where a tensor changes what is measured, or a codec or a group of tensors is made of it.

    What passes find is constant to the gradient pass (`Pass.slope`): it would silently leave out their part.
    """
    problems = dict[str, None]()
    for pipeline in dict.fromkeys(task.pipeline for task in tasks):
        if pipeline is None or not _traced(pipeline):
            continue
        if pipeline.grain is Grain.GROUP or pipeline.codec is not None:
            problems[f"{pipeline.name}: no gradient goes through it; give it numbers"] = None
        for index, one in pipeline.passes(count):
            before = one.slope != "flat" and any(traced(stage) for stage in pipeline.stages[:index])
            if before or (not one.slope and _holds_traced(one)):
                stage = pipeline.stages[index].name
                problems[
                    f"{stage} measures what a tensor that requires grad changes, and has no derivative of that; "
                    f"give a number in place of auto, or leave the tensor to the stages behind {stage}"
                ] = None
    if problems:
        raise PlanError(problems)


def _holds_traced(value: Any) -> bool:
    """Whether a tensor that requires grad stands anywhere in a value."""
    if isinstance(value, Vector):
        return value.tensor.requires_grad
    if isinstance(value, (tuple, list)):
        return any(map(_holds_traced, value))
    if is_dataclass(value) and not isinstance(value, type):
        return any(_holds_traced(getattr(value, field.name)) for field in fields(value))
    return isinstance(value, Traced)


class Pullback:
    """The derivative of a planned merge, to be applied to one tensor's gradient after another.

    tensors  the parameters that it depends on
    names    the merged tensors that depend on them

    The context holds what was measured of the whole model, where the methods ask for it.
    """

    def __init__(self, tasks: Iterable[Task], keys: Iterable[Key], context: Context) -> None:
        tasks = [task for task in tasks if task.pipeline is not None and _traced(task.pipeline)]
        refuse_underived(tasks, len(context.inputs.experts))
        self.tensors = tensors_of(tasks)
        self._tasks: dict[str, list[Task]] = {}
        for task in tasks:
            self._tasks.setdefault(task.key.name, []).append(carried_out_here(task))
        self.names = tuple(self._tasks)
        self._keys = {key.name: key for key in keys}
        self._context = context

    @classmethod
    def of(cls, plan: Plan, inputs: Inputs) -> Pullback:
        """The derivative of a plan's merge; measures the whole model once where the methods ask for it."""
        context = context_of(plan, inputs)
        found = measure_model(plan.tasks, context, SerialRunner())
        return cls(plan.tasks, plan.keys, replace(context, found=found))

    def all(self, gradient: Mapping[str, Tensor], threads: int = 1) -> Gradients:
        """The parameters' gradients for those of several merged tensors."""
        for name in gradient:
            self._check(name, gradient[name])
        work = [(task, gradient[name]) for name in self.names if name in gradient for task in self._tasks[name]]
        with one_thread_each():
            runner = ThreadRunner(threads) if threads > 1 else SerialRunner()
            return self._added(runner.map(lambda one: _contracted(*one, self._context), work))

    def one(self, name: str, gradient: Tensor) -> Gradients:
        """The parameters' gradients for that of one merged tensor; in the calling thread."""
        self._check(name, gradient)
        return self._added(_contracted(task, gradient, self._context) for task in self._tasks.get(name, ()))

    def _added(self, found: Iterable[Mapping[int, Tensor]]) -> Gradients:
        totals: dict[int, Tensor] = {}
        for one in found:
            for place, value in one.items():
                totals[place] = totals[place] + value if place in totals else value
        return {
            t: totals[id(t)].to(t.device, t.dtype) if id(t) in totals else torch.zeros_like(t) for t in self.tensors
        }

    def _check(self, name: str, gradient: Tensor) -> None:
        key = self._keys.get(name)
        if key is None:
            raise PlanError([f"gradient of {name!r}: the merge makes no such tensor{did_you_mean(name, self._keys)}"])
        if tuple(gradient.shape) != key.shape:
            raise PlanError([f"gradient of {name!r} has shape {list(gradient.shape)}, the tensor {list(key.shape)}"])


def _traced(pipeline: Pipeline) -> list[Traced | Vector]:
    found = (value for stage in pipeline.stages for value in traced(stage))
    return [v for v in found if isinstance(v, Traced) or (isinstance(v, Vector) and v.tensor.requires_grad)]


def _contracted(task: Task, gradient: Tensor, context: Context) -> dict[int, Tensor]:
    """Identity of a parameter -> its gradient (of numbers in float64) from the rows of one task."""
    assert task.pipeline is not None
    leaves: dict[int, Tensor] = {}
    for value in _traced(task.pipeline):
        # Numbers in float64; a vector may be as large as the tensor itself.
        dtype = torch.float64 if isinstance(value, Traced) else value.tensor.dtype
        known = value.tensor.detach().to(context.place.device, dtype)
        leaves.setdefault(id(value.tensor), known.requires_grad_())

    def leaf(value: Any) -> Any:
        return leaves.get(id(value.tensor), value) if isinstance(value, (Traced, Vector)) else value

    live = Pipeline(tuple(opened(stage, leaf) for stage in task.pipeline.stages))
    totals = {place: torch.zeros_like(leaf, device="cpu", requires_grad=False) for place, leaf in leaves.items()}
    for part in _by_products(task, live, gradient, context) or _by_autograd(task, live, gradient, context):
        slopes = torch.autograd.grad(part, list(leaves.values()), allow_unused=True)
        for place, slope in zip(leaves, slopes, strict=True):
            if slope is not None:
                totals[place] += slope.cpu()
    return totals


def _by_autograd(task: Task, live: Pipeline, gradient: Tensor, context: Context) -> Iterator[Tensor]:
    """Block by block <gradient, merged>, whose derivative is wanted; a graph lives as long as its block."""
    if task.way is Way.KERNEL:  # the kernels keep no graph
        task = replace(task, way=Way.ROWS)
    assert task.pipeline is not None
    reader, chain = Reader(), Chain(task, context)
    measure([chain], reader, None)
    count = len(context.inputs.experts)
    # Both pipelines ask for the same passes, the one by numbers and the other by tensors.
    same = {(i, of_number): of_tensor for (i, of_number), (_, of_tensor) in
            zip(task.pipeline.passes(count), live.passes(count), strict=True)}  # fmt: skip
    found = {i: {same[i, one]: value for one, value in results.items()} for i, results in chain.found.items()}
    for start, stop in ranges(task, context.merged):
        site = reader.site(task.key, task, context, start, stop)
        rows = _rows(gradient, start, stop, site.stack.dtype, context)
        with torch.enable_grad():
            merged = live.merge(site, found)
            if merged.requires_grad:
                yield (merged * rows).sum(dtype=torch.float64)


def _by_products(task: Task, live: Pipeline, gradient: Tensor, context: Context) -> list[Tensor]:
    """Of a weighted sum, <gradient, merged> from the n inner products <gradient, x_i>; no graph over the block.

    An empty list for other methods.
    """
    stage = live.stages[0]
    if len(live.stages) > 1 or not isinstance(stage, Summed):
        return []
    count = len(context.inputs.experts)
    products = _low_rank(task, gradient, context)
    if products is None:
        products = _dense(task, gradient, context)
    with torch.enable_grad():
        spec = stage.fused(count)
        total: Any = sum(weight * product for weight, product in zip(spec.weights, products, strict=True))
        return [torch.as_tensor(total / spec.divisor * spec.scale)]


def _dense(task: Task, gradient: Tensor, context: Context) -> Tensor:
    """<gradient, x_i> of the rows of a task, x_i a task vector where the method takes those: float64 [n]."""
    total = torch.zeros(len(context.inputs.experts), dtype=torch.float64)
    for start, stop in ranges(task, context.merged):
        total += (_by_kernel if task.way is Way.KERNEL else _by_torch)(task, gradient, context, start, stop)
    return total


def _by_kernel(task: Task, gradient: Tensor, context: Context, start: int, stop: int) -> Tensor:
    """The inner products of a block, from the stored bits."""
    rows = _rows(gradient, start, stop, torch.float32, context).contiguous().numpy()
    found = dots(StoredRows(task.key, context)(start, stop), rows, takes_deltas(task.pipeline))
    if not np.isfinite(found).all():
        refuse_bad_inputs(task.key, start, stop, context)
    return torch.from_numpy(found)


def _by_torch(task: Task, gradient: Tensor, context: Context, start: int, stop: int) -> Tensor:
    """The same in torch."""
    site = Reader().site(task.key, task, context, start, stop)
    rows = _rows(gradient, start, stop, site.stack.dtype, context).flatten()
    stack = site.deltas if takes_deltas(task.pipeline) else site.experts
    # One by one: a product of matrices adds in an order of its own.
    return torch.stack([torch.dot(vector.flatten(), rows) for vector in stack]).double().cpu()


def _low_rank(task: Task, gradient: Tensor, context: Context) -> Tensor | None:
    """The same where every task vector is a product B A (adapters on the base): <B^T gradient, A>, never B A itself."""
    base = context.inputs.base
    if base is None or not takes_deltas(task.pipeline):
        return None
    found = []
    for source in context.inputs.experts.values():
        product = source.factors(task.key.name, base)
        if product is None:
            return None
        left, right = (context.place.bring(side, torch.float32) for side in product.read())
        rows = _rows(gradient, task.start, task.stop, torch.float32, context)
        found.append(((left[task.start : task.stop].T @ rows) * right).sum(dtype=torch.float64).cpu())
    return torch.stack(found)


def _rows(gradient: Tensor, start: int, stop: int, dtype: torch.dtype, context: Context) -> Tensor:
    rows = gradient.detach()[start:stop] if gradient.ndim else gradient.detach()
    return rows.to(context.place.device, dtype)


# --- merges in memory -----------------------------------------------------------------------------


def attached(plan: Plan, inputs: Inputs, merged: Mapping[str, Tensor], threads: int = 1) -> dict[str, Tensor]:
    """Merged tensors in memory, with the gradient of the parameters that are tensors; the same bytes.

    Backward is a gradient pass over the inputs, so that nothing of the merge is kept for it.  Names of one tensor keep
    sharing it.
    """
    parameters = tensors_of(plan.tasks)
    depending = {key.name for task in plan.tasks if tensors_of([task]) for key in task.keys}
    names = [name for name in merged if name in depending]
    if not names:
        return dict(merged)
    refuse_underived(plan.tasks, len(inputs.experts))

    def back(gradients: Sequence[Tensor | None]) -> list[Tensor]:
        known = {name: g for name, g in zip(names, gradients, strict=True) if g is not None}
        found = Pullback.of(plan, inputs).all(known, threads)
        return [found[parameter] for parameter in parameters]

    made = _merge_function()(back, [merged[name] for name in names], parameters)
    alive = {id(merged[name]): tensor for name, tensor in zip(names, made, strict=True)}
    return {name: alive.get(id(tensor), tensor) for name, tensor in merged.items()}


def _merge_function() -> Callable[..., tuple[Tensor, ...]]:
    """Torch's class of a function with a derivative, made when torch is there."""

    class Merge(torch.autograd.Function):
        """Merged tensors as a function of parameters."""

        @staticmethod
        def forward(ctx: Any, back: Any, tensors: Sequence[Tensor], *parameters: Tensor) -> tuple[Tensor, ...]:
            ctx.back = back
            ctx.set_materialize_grads(False)
            return tuple(tensor.view_as(tensor) for tensor in tensors)

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor | None) -> Any:
            return (None, None, *ctx.back(gradients))

    return lambda back, tensors, parameters: Merge.apply(back, tensors, *parameters)  # type: ignore[no-untyped-call]
