"""``aurora bench serving``: the figures of the serving node beside others on the same weights."""
