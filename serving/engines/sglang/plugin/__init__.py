"""Runs in SGLang's process: records what its verifier decides."""
