"""Benchmarks, run from a checkout: `python -m bench`; see README.md beside this file."""
