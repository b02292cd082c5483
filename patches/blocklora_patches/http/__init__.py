"""Runs in the HTTP (tokenizer) process: names, loading and unloading, routes, metrics, replicas."""
