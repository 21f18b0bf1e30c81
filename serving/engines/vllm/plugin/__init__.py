"""Extension of vLLM's workers: records the decisions of the verifier, and swaps the draft."""
