"""Load for serving nodes."""
