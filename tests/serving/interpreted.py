"""Runs the kernel's comparison in a process of its own, started with TRITON_INTERPRET=1."""

from tests.serving.test_steering_op import compare_kernel

compare_kernel()
