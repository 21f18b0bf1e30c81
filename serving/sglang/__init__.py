"""The plugin that records what SGLang's own server decides."""
