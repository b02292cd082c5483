"""Runs in every process: what a hook is, which hooks there are, and putting them in place."""
