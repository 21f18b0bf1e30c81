"""Dashboards as code: built with Grafana's own library, kept beside the code as the JSON that Grafana is given."""
