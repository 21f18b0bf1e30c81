"""The stream processor: from trace chunks on Kafka to rows in Delta tables, exactly once."""
