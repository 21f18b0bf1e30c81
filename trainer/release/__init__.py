"""Releasing versions: registration, gate, canary analysis, promoter, alias moves and audit."""
