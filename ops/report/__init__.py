"""Self-contained HTML pages: theme, charts and templates."""
