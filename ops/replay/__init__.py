"""Experiments, evaluation reports and trace import of ``aurora replay``."""
