"""``python -m benchmarks.gpu``: all that must be measured on a GPU, in one command and under eight minutes."""
