"""Runs in a user's own process: SGLang's frontend language and the engine of a script."""
