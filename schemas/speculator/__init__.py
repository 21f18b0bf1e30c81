"""The speculator: its checkpoint contract, the EAGLE-3 draft network, and the acceptance rule."""
