"""What the command does besides running experiments: overview, help, doctor, cache. Nothing here loads torch early."""
