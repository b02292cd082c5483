"""A GPU that does not exist: CPU tensors that say they are on one, and what was asked of it in what order."""
