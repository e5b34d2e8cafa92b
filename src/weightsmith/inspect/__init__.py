"""How task vectors lie to each other: norms, angles, conflicts, overlaps, spectra, and what they speak for."""
