"""The training objective: draft trees, training-time test, losses and divergences."""
