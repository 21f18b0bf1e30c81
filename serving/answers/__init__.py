"""The answers topic: nodes publish their finished answers to it, and read those of all nodes from it."""
