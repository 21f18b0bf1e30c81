"""The dead-letter queue: reasons, diagnosis and replay of unusable records."""
