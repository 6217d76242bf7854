"""The decoder over the op library: rotary tables, sub-layers, whole model."""
