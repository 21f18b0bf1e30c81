"""``aurora bench learning``: how a speculator learns from traffic, replayed offline from recorded traces."""
