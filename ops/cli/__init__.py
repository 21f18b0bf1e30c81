"""The ``aurora`` command: one file per command group."""
