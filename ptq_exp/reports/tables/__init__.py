"""What a run leaves behind: results, samples, pictures, cached artefacts, W&B, and tables over many runs."""
