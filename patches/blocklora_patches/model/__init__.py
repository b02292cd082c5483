"""Runs in every TP rank's scheduler process: the model's linears and the adapters that join them."""
