"""Bytes on disk: written whole or not at all, in pieces, shared, and found by what made them."""
