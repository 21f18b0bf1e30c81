"""Plugin in SGLang's process: records the decisions of its verifier."""
