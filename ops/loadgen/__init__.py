"""Load generator for serving nodes."""
