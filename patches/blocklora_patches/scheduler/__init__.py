"""Runs in every TP rank's scheduler process: admission, the order of the queue, control messages."""
