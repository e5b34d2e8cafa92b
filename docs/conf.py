"""Sphinx configuration.  Build without the network: python -m sphinx -W -b html docs docs/_build/html"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from _generate import generate

from weightsmith import __version__

project = "weightsmith"
author = "the weightsmith authors"
version = release = __version__
extensions = ["myst_parser"]
exclude_patterns = ["_build"]

myst_enable_extensions = ["deflist"]
myst_heading_anchors = 3

html_theme = "furo"
html_title = f"weightsmith {version}"
html_copy_source = False


def setup(app: object) -> None:
    """The reference is written from the code's own declarations, before Sphinx looks for pages."""
    generate(Path(__file__).parent / "reference" / "_generated")
