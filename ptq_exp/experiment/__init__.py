"""One experiment: its objects, its stages, and the order they are called in."""
