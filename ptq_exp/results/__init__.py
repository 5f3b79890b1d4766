"""What a run leaves in its folder, and the W&B run beside it."""
