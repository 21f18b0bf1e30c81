"""Offline replay of logged requests: what versions would have accepted, and what other settings would have learned."""
