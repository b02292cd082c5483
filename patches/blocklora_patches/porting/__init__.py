"""Runs on a developer's machine: what of SGLang the code uses, written down as the contract with a release."""
