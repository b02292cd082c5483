"""Tries every causal architecture that SGLang and transformers both have, at tiny sizes, against PEFT's tokens."""
