"""Observe a deployment: status, top, lineage and doctor."""
