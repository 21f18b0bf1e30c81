"""Runs next to SGLang's server: starts it, watches it, and updates its draft."""
