"""The serving node: engine, trace publisher, registry puller, HTTP API."""
