"""Runs in every TP rank's scheduler process: the radix cache in which adapters are prefixes."""
