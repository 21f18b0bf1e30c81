"""The stack on one machine: supervisor, embedded Kafka and MLflow, demo model."""
