"""Images, compose files, Kubernetes manifests and monitoring."""
