"""Where adapters' weights are: in the arena, in host memory or on disk, and who gives way."""
