"""Decides how much to draft from measured latency and acceptance."""
