"""One of two ranks: losses and gradients of its half of a batch, steps of tasks.  gloo_rank.py RANK STORE OUT"""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from embedding_cases import RANKS, features, losses, model, of_tasks

from weightsmith.core.errors import PlanError
from weightsmith.train.embed import gather


def mean(gradient: torch.Tensor) -> None:
    dist.all_reduce(gradient)
    gradient /= RANKS


def main(rank: int, store: str, out: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    found = {}
    for name, (loss, columns, labels) in losses(model(), cross_device=True).items():
        loss.model.zero_grad()
        rows = slice(rank * 4, (rank + 1) * 4)
        value = loss([{"x": features(c)[rows]} for c in range(columns)], labels[rows])
        value.backward()
        for p in loss.model.parameters():  # as DistributedDataParallel does
            dist.all_reduce(p.grad)
            p.grad /= RANKS
        dist.all_reduce(value := value.detach())
        found[name] = (value / RANKS, loss.model.weight.grad.clone())
    try:
        gather(torch.zeros(2 + rank, 3))
    except PlanError as error:
        found["refusal"] = str(error)
    made = of_tasks(RANKS, rank, 4, mean)
    each: list = [None] * RANKS
    dist.all_gather_object(each, made)
    if rank == 0:
        torch.save({**found, "tasks": each}, out)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
