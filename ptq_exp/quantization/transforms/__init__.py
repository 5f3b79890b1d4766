"""Exact re-parametrisations of a network before it is rounded."""
