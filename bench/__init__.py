"""Benchmarks and proofs: everything here may import everything else, and nothing imports it."""
