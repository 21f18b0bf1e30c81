"""``aurora bench``: what the serving node is worth on this machine, in figures that a second run gives again."""
