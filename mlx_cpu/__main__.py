"""`python -m mlx_cpu`: compile now what would be compiled in the background, for an image or an installation."""

import sys

import mlx_cpu

mlx_cpu.wait()
failure = "" if mlx_cpu.installed else mlx_cpu.compile_primitives()
sys.exit(failure or None)
