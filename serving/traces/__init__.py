"""Trace capture: sampling, chunking, offloading and publishing of verify steps."""
