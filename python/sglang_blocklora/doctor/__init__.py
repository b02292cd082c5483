"""Looks at a machine before a server is started on it: ``python -m sglang_blocklora.doctor``."""
