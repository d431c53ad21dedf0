"""Measurements, run by `make bench`: each compares in one process against the honest alternative and prints a ratio."""
