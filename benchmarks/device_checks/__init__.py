"""The parts of `benchmarks/device_check.py`: `runner`, then what is checked and what is measured."""
