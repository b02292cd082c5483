"""What a name means: model names of requests, adapter folders, the adapter of a frontend call."""
