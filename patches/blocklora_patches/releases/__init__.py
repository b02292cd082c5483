"""Runs in every process: which SGLang release fits, and how each upstream symbol must look."""
