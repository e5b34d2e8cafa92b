"""Compiled kernels that work on the stored bits, and the machine code that is kept of them."""
