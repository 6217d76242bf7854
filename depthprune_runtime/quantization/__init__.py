"""Weights in 8 or 4 bits: round to nearest, and GPTQ along the walk of the repair."""
