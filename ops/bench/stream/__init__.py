"""``aurora bench stream``: the stream worker from topic to tables, beside bare loops over the same records."""
