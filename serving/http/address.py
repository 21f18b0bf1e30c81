"""The address that a node listens on."""

from __future__ import annotations

import errno
import socket

from schemas.settings import SettingsError


def bind(host: str, port: int) -> socket.socket:
    """Take the address before anything is loaded; nothing is accepted until the server listens.

    Raises:
        SettingsError: it cannot be had.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        server_socket = socket.socket(family, kind, protocol)
        server_socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server_socket.bind(address)
    except OSError as error:
        setting = "serve.port" if error.errno == errno.EADDRINUSE else "serve.host or serve.port"
        raise SettingsError(f"{setting}: cannot listen on {host}:{port}: {error.strerror}; set another") from error
    return server_socket
