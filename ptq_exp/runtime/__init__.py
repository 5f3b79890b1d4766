"""How a quantized network is executed: simulated in torch, or as integers by an engine."""
