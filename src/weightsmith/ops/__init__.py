"""Tensor maths that methods share: selection, spectra, masks, sums in a fixed order, noise."""
