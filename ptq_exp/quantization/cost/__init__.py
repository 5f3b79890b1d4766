"""The cost of a quantized network: every multiplication, its bits, or the reason it has none."""
