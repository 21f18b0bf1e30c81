"""``aurora bench learning``: how fast a speculator learns from recorded traffic, offline, and what helps it."""
