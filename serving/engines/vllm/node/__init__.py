"""Node next to vLLM's server: starts it, watches it, and swaps its draft."""
