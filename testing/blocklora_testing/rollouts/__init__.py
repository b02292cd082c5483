"""Adapters that are updated all the time while they serve: every answer names its version and is PEFT's for that."""
