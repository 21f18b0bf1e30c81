"""Benchmarks of the parts and of the whole loop. They exist in a checkout only: no wheel and no image contains them."""
