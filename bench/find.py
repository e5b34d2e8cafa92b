"""python -m bench.find [--count 100000] : indexing and querying recipes, against NumPy's product of the same size."""

from __future__ import annotations

import argparse
import itertools
import time

import numpy as np

from weightsmith.vsa import Encoder, Index


def recipes(count: int) -> dict[str, dict[str, object]]:
    """Recipes as a sweep writes them: method, models, parameters, seed."""
    methods, bases = ("ties", "dare", "slerp", "linear", "della", "tsvm"), ("llama", "qwen", "gemma", "mistral")
    models = [f"expert{i}" for i in range(50)]
    found = {}
    draw = np.random.default_rng(0)
    for i, (method, base) in zip(range(count), itertools.cycle(itertools.product(methods, bases))):
        a, b = draw.choice(50, 2, replace=False)
        found[f"r{i}"] = {
            "base": base, "models": {"a": models[a], "b": models[b]}, "method": method,
            "seed": int(draw.integers(1000)),
            "parameters": {"density": round(float(draw.uniform()), 2), "lambda": round(float(draw.uniform(0, 2)), 2)},
        }  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--dim", type=int, default=1024)
    options = parser.parse_args()
    encoder, documents = Encoder(dim=options.dim), recipes(options.count)
    began = time.perf_counter()
    index = Index.of(encoder, documents)
    print(f"indexed {len(index)} in {time.perf_counter() - began:.1f} s")
    queries = [encoder.encode({"method": "ties", "parameters": {"density": d / 20}}) for d in range(20)]
    index.query(queries[0])
    ours, floor = [], []
    for query in queries:
        began = time.process_time()
        index.query(query)
        ours.append(time.process_time() - began)
        began = time.process_time()
        _ = index.vectors @ query
        floor.append(time.process_time() - began)
    print(
        f"processor time: query {1e3 * np.median(ours):.1f} ms, product alone {1e3 * np.median(floor):.1f} ms: ", end=""
    )
    print(f"{np.median(ours) / np.median(floor):.2f} times")


if __name__ == "__main__":
    main()
