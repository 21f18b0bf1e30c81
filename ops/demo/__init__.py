"""``aurora demo``: the whole loop on one machine, with a draft that starts untrained."""
