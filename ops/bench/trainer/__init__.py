"""``aurora bench trainer``: training steps of this project's trainer beside those of public ones."""
