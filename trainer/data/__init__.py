"""Training data: table reader, samples, replay, prefetch and recomputed features."""
