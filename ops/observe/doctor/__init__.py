"""``aurora doctor``: checks everything that the processes depend on, and says what to change."""
