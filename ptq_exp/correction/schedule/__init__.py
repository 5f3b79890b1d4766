"""Activation bits for each sampling step."""
