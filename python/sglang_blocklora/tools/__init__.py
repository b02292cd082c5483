"""Command line tools for adapters, without a server: ``python -m sglang_blocklora.tools``."""
