"""SGLang as an engine: the plugin in its process, and the node next to it."""
