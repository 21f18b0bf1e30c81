"""The node's HTTP server: the OpenAI API, the admin API, status, health and drain."""
