"""``aurora doctor``: looks at everything the processes depend on, and says what to change."""
