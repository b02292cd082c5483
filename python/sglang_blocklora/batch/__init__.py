"""The adapters of one forward pass: which tokens use which, and adding their deltas."""
