"""The fixtures of tests/reliability, and its figures at the end."""

from reliability.conftest import note, pytest_terminal_summary, scenes, zygote
from reliability.test_matrix import layouts, memory

__all__ = ["layouts", "memory", "note", "pytest_terminal_summary", "scenes", "zygote"]
