"""The training loop: learner, optimizers, distribution, checkpoints, divergence guard and metrics."""
