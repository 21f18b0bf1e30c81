"""The engines that decode: one protocol, several implementations."""
