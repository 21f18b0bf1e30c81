"""Images, compose files, a Helm chart and monitoring."""
