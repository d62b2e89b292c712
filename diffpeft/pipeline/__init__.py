"""Hooks on a diffusers pipeline: load, mix, unload, save."""
