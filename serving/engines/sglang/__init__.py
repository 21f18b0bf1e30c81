"""SGLang's own server as an engine: a plugin in its process, a node next to it."""
