"""Runs in every process: what a hook is, and putting hooks in place."""
