"""Drift of acceptance: detector, monitor and events."""
