"""The training loop: learner, optimizers, distribution, checkpoints and divergence guard."""
