"""Colours of SVG as numbers."""

from __future__ import annotations

import re

__all__ = ["NAMED", "colour"]

NAMED = {
    "black": "000000", "white": "ffffff", "red": "ff0000", "lime": "00ff00", "green": "008000", "blue": "0000ff",
    "yellow": "ffff00", "cyan": "00ffff", "aqua": "00ffff", "magenta": "ff00ff", "fuchsia": "ff00ff",
    "gray": "808080", "grey": "808080", "silver": "c0c0c0", "maroon": "800000", "olive": "808000", "navy": "000080",
    "teal": "008080", "purple": "800080", "orange": "ffa500", "pink": "ffc0cb", "brown": "a52a2a", "gold": "ffd700",
    "violet": "ee82ee", "indigo": "4b0082", "coral": "ff7f50", "salmon": "fa8072", "tomato": "ff6347",
    "crimson": "dc143c", "khaki": "f0e68c", "turquoise": "40e0d0", "skyblue": "87ceeb", "lightblue": "add8e6",
    "darkblue": "00008b", "lightgreen": "90ee90", "darkgreen": "006400", "darkred": "8b0000", "beige": "f5f5dc",
    "chocolate": "d2691e", "tan": "d2b48c", "plum": "dda0dd", "orchid": "da70d6", "lavender": "e6e6fa",
    "lightgray": "d3d3d3", "lightgrey": "d3d3d3", "darkgray": "a9a9a9", "darkgrey": "a9a9a9",
}  # fmt: skip

Colour = tuple[float, float, float, float]


def colour(text: str) -> Colour | None:
    """(r, g, b, alpha) in [0, 1]; None for none and transparent.  Raises ValueError for what is not known here."""
    word = text.strip().lower()
    if word in ("none", "transparent"):
        return None
    word = "#" + NAMED[word] if word in NAMED else "#000000" if word == "currentcolor" else word
    if re.fullmatch(r"#[0-9a-f]{3,4}", word):
        word = "#" + "".join(2 * digit for digit in word[1:])
    if re.fullmatch(r"#[0-9a-f]{6}([0-9a-f]{2})?", word):
        r, g, b = (int(word[at : at + 2], 16) / 255 for at in (1, 3, 5))
        return r, g, b, int(word[7:], 16) / 255 if len(word) == 9 else 1.0
    if match := re.fullmatch(r"rgba?\(([^)]*)\)", word):
        parts = [part for part in re.split(r"[\s,/]+", match[1].strip()) if part]
        if len(parts) in (3, 4):
            values = [float(part.rstrip("%")) / (100 if part.endswith("%") else 255) for part in parts[:3]]
            alpha = 1.0 if len(parts) == 3 else float(parts[3].rstrip("%")) / (100 if parts[3].endswith("%") else 1)
            r, g, b, a = (min(max(value, 0.0), 1.0) for value in (*values, alpha))
            return r, g, b, a
    raise ValueError(f"colour {text!r}")
