"""What two processes must agree on: records, settings, and the speculator itself."""
