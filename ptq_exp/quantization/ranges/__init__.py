"""Ranges of quantizers: histograms, errors by metric, and the search for the best range."""
