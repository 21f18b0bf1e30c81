"""Grafana dashboards as code, next to the JSON that Grafana is given."""
