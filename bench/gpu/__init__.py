"""Correctness and speed on a GPU, in one command on a bare machine: `python -m bench.gpu`."""
