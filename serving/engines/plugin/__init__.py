"""Recording of verify steps inside the process of a server that decodes: what the plugins of all servers share."""
