"""Block-diagonal LoRA serving on SGLang: adapters, sharding, memory layout and batch metadata."""

__version__ = "0.1.0"
SGLANG_VERSION = "0.5.21"
