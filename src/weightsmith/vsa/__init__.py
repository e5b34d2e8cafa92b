"""Vectors of recipes, manifests and model cards, and search among them by example."""

from weightsmith.vsa.encode import Encoder, Noise, noise, path_of
from weightsmith.vsa.index import Hit, Index

__all__ = ["Encoder", "Hit", "Index", "Noise", "encode", "noise", "path_of", "probe"]


def encode(value: object, **options: object) -> object:
    """The vector of plain JSON values: [dim] float32.  Options: fields of `Encoder`."""
    return Encoder(**options).encode(value)  # type: ignore[arg-type]


def probe(vector: object, path: str, **options: object) -> object:
    """The noisy vector of what stands at a path ('parameters.density') of an encoded value; same options."""
    return Encoder(**options).probe(vector, path)  # type: ignore[arg-type]
