"""Node next to SGLang's server: starts it, watches it, and swaps its draft."""
