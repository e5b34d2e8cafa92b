"""Five classical operators of documents whose results tell a network what to do (DocRes, arXiv 2405.04408).

Images and results are [3, H, W] float32 from 0 to 1; every operator looks at one image only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn.functional import conv2d, interpolate, max_pool2d, pad

from weightsmith.core.errors import RecipeError

__all__ = ["CONTROLS", "PRIORS", "background", "coordinates", "gradient", "prior", "sauvola", "shading"]

SIDE = 1024
"""The background is estimated at this size where an image is larger."""


def background(image: Tensor, dilate: int = 7, median: int = 21) -> Tensor:
    """Paper without its ink, by plane: dilation, then a median; of large images at 1024 pixels, resized back."""
    height, width = image.shape[-2:]
    small = image[None]
    if max(height, width) > SIDE:
        size = (max(1, height * SIDE // max(height, width)), max(1, width * SIDE // max(height, width)))
        small = interpolate(small, size, mode="bilinear", antialias=True)
    small = max_pool2d(_padded(small, dilate // 2), dilate, 1)
    small = _median(small[0], median)[None]
    if small.shape[-2:] != (height, width):
        small = interpolate(small, (height, width), mode="bilinear")
    return small[0]


def shading(image: Tensor) -> Tensor:
    """The appearance without shadows: 1 - |image - background|, stretched to 0 .. 1."""
    found = 1 - (image - background(image)).abs()
    low, high = found.amin(), found.amax()
    return (found - low) / (high - low) if high > low else torch.ones_like(found)


def gradient(image: Tensor) -> Tensor:
    """Half of |Sobel x| and half of |Sobel y| of the grey image, three times; both cut at 1."""
    down = torch.tensor([[-1.0, -2, -1], [0, 0, 0], [1, 2, 1]])
    found = conv2d(_padded(_grey(image)[None], 1), torch.stack([down.T, down])[:, None]).abs().clamp_max(1)
    return (found.mean(1)).expand(3, -1, -1).contiguous()


def sauvola(image: Tensor, window: int = 15, k: float = 0.2, reach: float = 128 / 255) -> Tensor:
    """Sauvola's threshold m (1 + k (s / R - 1)), the gradient, and where the image is above the threshold.

    Mean m and deviation s of a window by integral images in float64; a window at the border ends there.
    """
    grey = _grey(image)[0].double()
    count = _sums(torch.ones_like(grey), window)
    mean = _sums(grey, window) / count
    deviation = (_sums(grey.square(), window) / count - mean.square()).clamp_min(0).sqrt()
    threshold = (mean * (1 + k * (deviation / reach - 1))).clamp(0, 1)
    return torch.stack([threshold.float(), gradient(image)[0], (grey > threshold).float()])


def coordinates(image: Tensor) -> Tensor:
    """Where the document lies, and the place of each of its pixels, 0 outside: mask, x, y.

    The mask is what is brighter than Otsu's threshold: a stand-in for the paper's segmentation network.
    """
    height, width = image.shape[-2:]
    mask = (_grey(image)[0] > _otsu(_grey(image)[0])).float()
    x = torch.linspace(0, 1, width).expand(height, width)
    y = torch.linspace(0, 1, height)[:, None].expand(height, width)
    return torch.stack([mask, x * mask, y * mask])


PRIORS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "background": background,
    "shading": shading,
    "gradient": gradient,
    "sauvola": sauvola,
    "coordinates": coordinates,
}
CONTROLS = ("none", "noise", "fixed")
"""What to compare them with: zeros, random numbers, and a learned constant per task."""


def prior(name: str, image: Tensor, seed: int = 0) -> Tensor:
    """A prior by its name; `none` and `noise` too.  RecipeError for what is not an image from 0 to 1."""
    if image.ndim != 3 or image.shape[0] != 3 or not image.is_floating_point():
        raise RecipeError(f"a prior needs an image [3, H, W] of numbers from 0 to 1, got {image.dtype} "
                          f"of shape {tuple(image.shape)}")  # fmt: skip
    if float(image.min()) < -1e-3 or float(image.max()) > 1 + 1e-3:
        raise RecipeError(
            f"a prior needs numbers from 0 to 1, got {float(image.min()):g} to {float(image.max()):g}; divide by 255?"
        )
    if name == "noise":
        return torch.rand(image.shape, generator=torch.Generator().manual_seed(seed))
    return torch.zeros_like(image) if name in ("none", "fixed") else PRIORS[name](image)


# --- parts ------------------------------------------------------------------------------------------


def _grey(image: Tensor) -> Tensor:
    return (image * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(0, keepdim=True)


def _padded(images: Tensor, by: int) -> Tensor:
    """Borders repeated: [batch, planes, H + 2 by, W + 2 by]."""
    return pad(images, (by, by, by, by), mode="replicate")


def _median(planes: Tensor, window: int) -> Tensor:
    """The median of every window, rows at a time so that memory stays small."""
    height, width = planes.shape[-2:]
    wide = _padded(planes[None], window // 2)[0]
    out = torch.empty_like(planes)
    rows = max(1, (1 << 24) // (width * window * window * len(planes)))
    for top in range(0, height, rows):
        part = wide[:, top : min(top + rows, height) + window - 1].unfold(1, window, 1).unfold(2, window, 1)
        out[:, top : top + rows] = part.flatten(3).median(-1).values
    return out


def _sums(grey: Tensor, window: int) -> Tensor:
    """Sums over windows cut at the border, from an integral image."""
    height, width = grey.shape
    whole = pad(grey.cumsum(0).cumsum(1), (1, 0, 1, 0))
    half = window // 2
    top, bottom = (torch.arange(height) + d for d in (-half, half + 1))
    left, right = (torch.arange(width) + d for d in (-half, half + 1))
    top, bottom, left, right = top.clamp_min(0), bottom.clamp_max(height), left.clamp_min(0), right.clamp_max(width)
    return whole[bottom][:, right] - whole[top][:, right] - whole[bottom][:, left] + whole[top][:, left]


def _otsu(grey: Tensor) -> float:
    """The threshold of 256 that parts the grey levels best."""
    counts = torch.histc(grey, 256, 0, 1).double()
    levels = (torch.arange(256, dtype=torch.float64) + 0.5) / 256
    below = counts.cumsum(0)
    sums = (counts * levels).cumsum(0)
    above = below[-1] - below
    between = (sums[-1] * below / below[-1] - sums).square() / (below * above).clamp_min(1e-12)
    return float(levels[between[:-1].argmax()] + 0.5 / 256)
