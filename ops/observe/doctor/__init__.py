"""Checks of ``aurora doctor``."""
