"""A node next to a server that decodes in another process: what the nodes of all servers share."""
