"""Answers from history: what versions would have accepted, and what other settings would have learned, offline."""
