"""Local stack: supervisor, embedded Kafka and MLflow, demo model."""
