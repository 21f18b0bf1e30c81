"""The aurora command, the local stack, the demo and its report."""
