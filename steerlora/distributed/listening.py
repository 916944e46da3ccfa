"""Where the rank that hosts the rendezvous store listens."""

from __future__ import annotations

import errno
import ipaddress
import socket

from steerlora.distributed.ranks import Ranks


def listening(ranks: Ranks) -> socket.socket:
    """A socket at the address where the ranks meet, and at no other of this machine's.

    At all of them only where that cannot be: the address is not one of this machine's own, as
    behind a gateway, or its own loopback, which ranks on other machines do not reach.

    Raises:
        OSError: the port is taken, or there is no such address.
    """
    one_machine = ranks.local_world == ranks.world
    for family, _, _, _, place in socket.getaddrinfo(
        ranks.address, ranks.port, type=socket.SOCK_STREAM
    ):
        if not one_machine and ipaddress.ip_address(place[0].partition("%")[0]).is_loopback:
            continue
        try:
            return socket.create_server(place[:2], family=family)
        except OSError as error:
            if error.errno != errno.EADDRNOTAVAIL:
                raise
    if socket.has_dualstack_ipv6():
        everywhere = socket.AF_INET6
        return socket.create_server(("", ranks.port), family=everywhere, dualstack_ipv6=True)
    return socket.create_server(("", ranks.port))
