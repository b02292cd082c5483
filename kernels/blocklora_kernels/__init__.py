"""Shrink and expand of block-diagonal LoRA over rows of an arena. Torch and Triton only."""
