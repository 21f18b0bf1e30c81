"""Logs, spans and trace contexts of every process."""
