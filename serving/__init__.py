"""The serving node: engine, trace publisher, version poller and HTTP API."""
