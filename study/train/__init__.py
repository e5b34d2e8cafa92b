"""The parts for training on real data, each beside what it is published to beat."""
