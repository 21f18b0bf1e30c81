"""``aurora bench loop``: the value of the whole loop, driven for real through two domains of traffic."""
