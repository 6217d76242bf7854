"""Decode steps that are made for one kind of device; `model.decoder` runs on any."""
