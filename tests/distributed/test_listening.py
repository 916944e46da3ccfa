"""The rendezvous store is reached at the address asked for, and nowhere else."""

from __future__ import annotations

import socket

import pytest
import torch.distributed as dist
from runs import free_port

from steerlora.distributed.group import Group
from steerlora.distributed.listening import listening
from steerlora.distributed.ranks import Ranks
from steerlora.errors import UserError


def ranks(address: str = "127.0.0.1", machines: int = 1) -> Ranks:
    world = 2 * machines
    return Ranks(world=world, local_world=2, address=address, port=free_port())


@pytest.mark.parametrize("address", ["127.0.0.1", "localhost"])
def test_ranks_on_one_machine_meet_where_no_other_reaches(address):
    with listening(ranks(address)) as found:
        assert found.getsockname()[0] in ("127.0.0.1", "::1")


@pytest.mark.parametrize(
    ("address", "machines"),
    [("127.0.0.1", 2), ("192.0.2.1", 1)],  # a loopback for two machines, an address of none
)
def test_an_address_that_cannot_serve_is_all_addresses(address, machines):
    with listening(ranks(address, machines)) as found:
        assert found.getsockname()[0] in ("::", "0.0.0.0")


def test_a_port_that_is_taken_is_one_line():
    asked = ranks()
    with listening(asked), pytest.raises(UserError, match="cannot host the rendezvous store at"):
        Group(asked)


def test_the_store_serves_there():
    asked = ranks()
    store = dist.TCPStore(
        asked.address,
        asked.port,
        is_master=True,
        wait_for_workers=False,
        master_listen_fd=listening(asked).detach(),
    )
    store.set("key", "value")
    other = dist.TCPStore(asked.address, asked.port, wait_for_workers=False)
    assert other.get("key") == b"value"
    own = socket.gethostbyname(socket.gethostname())
    if not own.startswith("127."):
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((own, asked.port), timeout=5).close()
