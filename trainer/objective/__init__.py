"""The training objective: training-time test, losses, divergences and simulated acceptance."""
