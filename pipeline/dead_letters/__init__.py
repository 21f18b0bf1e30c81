"""The dead-letter queue: reasons, diagnosis and replay of records that could not be used."""
