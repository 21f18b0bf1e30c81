"""The trace record: its types, its encoder and its decoder."""
