"""Sweeps: many composed experiments that share a folder, a W&B group and a cache; how they fail, go on, and end."""
