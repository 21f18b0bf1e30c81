"""The pages of ``aurora replay``, and its load generator."""
