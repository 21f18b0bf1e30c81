"""vLLM as an engine: the plugin in its worker, and the node next to its server."""
