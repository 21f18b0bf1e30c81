"""Training data: table reader, samples, data loader, replay buffer, batches and the frozen target."""
