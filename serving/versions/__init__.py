"""Speculator versions on a node: polling, cache, active version, alias and update policy."""
