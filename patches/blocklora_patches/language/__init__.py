"""Runs in a user's own process: SGLang's frontend language and its in-process engine."""
