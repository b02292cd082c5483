"""Block-diagonal LoRA serving on SGLang: adapters, sharding, memory layout and batch metadata."""

__version__ = "0.1.0"
SGLANG_VERSIONS = ("0.5.21", "0.5.22", "0.5.23")  # releases that are tested, oldest first
