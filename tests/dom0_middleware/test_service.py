"""The daemon's other doors and files: metrics, loopback TCP, the state file, the settings."""

from __future__ import annotations

import asyncio
import socket
import sqlite3
import urllib.request
from pathlib import Path

import grpc
import grpc.aio
import pytest

from dom0_middleware.authority import Authority, AuthorityError
from dom0_middleware.channels.folder import FolderChannel
from dom0_middleware.channels.port import ChannelDomain, ChannelError
from dom0_middleware.errors import Refused
from dom0_middleware.initialise import EXAMPLE_SETTINGS
from dom0_middleware.orchestrator_authority import credential_paths
from dom0_middleware.settings import MiddlewareSettings
from dom0_middleware.state import RunRecord, StateError, StateStore
from secfunet.middleware.v1 import orchestrator_pb2, orchestrator_pb2_grpc
from secfunet.service.audit import AuditBusyError
from secfunet.service.files import UnsafeFileError
from secfunet.service.settings import SettingsError, load_settings
from secfunet.service.unix_socket import SocketInUse, SocketPathError
from tests.dom0_middleware.test_access import sign
from tests.dom0_middleware.world import NAME_OVERRIDE, TIMEOUT, World


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as opened:
        return int(opened.getsockname()[1])


async def test_metrics_count_decisions(world: World) -> None:
    port = free_port()
    world.extra = {"metrics_port": port}
    await world.stop()
    await world.start()
    guest = await world.enrolled()
    async with guest.agent() as stub:
        await sign(stub)
    url = f"http://127.0.0.1:{port}/metrics"
    text = (await asyncio.to_thread(lambda: urllib.request.urlopen(url, timeout=5).read())).decode()
    expected = 'secfunet_middleware_operations_total{decision="permitted",operation="sign",reason=""} 1.0'
    assert expected in text
    assert "secfunet_middleware_guests 1.0" in text
    assert "secfunet_middleware_sessions 1.0" in text


async def test_orchestrators_over_loopback_need_a_certificate_too(world: World) -> None:
    address = f"127.0.0.1:{free_port()}"
    world.extra = {"orchestrators": {"allowed": ["admin"], "address": address}}
    await world.stop()
    await world.start()
    root = (world.state / "orchestrator-authority.pem").read_bytes()
    certificate, key = credential_paths(world.state, "admin")
    with_certificate = grpc.ssl_channel_credentials(root, key.read_bytes(), certificate.read_bytes())
    request = orchestrator_pb2.ListVmsRequest()
    async with grpc.aio.secure_channel(address, with_certificate, NAME_OVERRIDE) as channel:
        await orchestrator_pb2_grpc.OrchestratorServiceStub(channel).ListVms(request, timeout=TIMEOUT)
    async with grpc.aio.secure_channel(address, grpc.ssl_channel_credentials(root), NAME_OVERRIDE) as channel:
        with pytest.raises(grpc.aio.AioRpcError):
            await orchestrator_pb2_grpc.OrchestratorServiceStub(channel).ListVms(request, timeout=2)


async def test_files_are_for_their_owner_alone(world: World) -> None:
    guest = await world.enrolled()
    assert world.state.stat().st_mode & 0o777 == 0o700
    for name in ("state.sqlite", "audit.jsonl", "audit.jsonl.lock", "orchestrator.sock", "guest-authority.key"):
        assert (world.state / name).stat().st_mode & 0o077 == 0, name
    assert guest.folder.stat().st_mode & 0o077 == 0


async def test_a_second_daemon_on_the_same_state_does_not_start(world: World) -> None:
    second = World.__new__(World)
    second.__dict__.update(world.__dict__)
    with pytest.raises(AuditBusyError):
        await second.start()


def test_a_state_file_of_another_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "state.sqlite"
    StateStore(path).close()
    assert path.stat().st_mode & 0o777 == 0o600
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version=99")
    db.close()
    with pytest.raises(StateError, match="version 99"):
        StateStore(path)
    path.write_bytes(b"no database, but long enough to look like one" * 100)
    with pytest.raises(StateError):
        StateStore(path)


def test_a_state_file_of_each_earlier_version_is_taken_over(tmp_path: Path) -> None:
    """As they made it, with a VM that is enrolled."""
    columns = (
        "uuid TEXT PRIMARY KEY, name TEXT NOT NULL UNIQUE, vmid TEXT NOT NULL UNIQUE, vm_certificate BLOB NOT NULL, "
        "vm_auth_token TEXT NOT NULL, memory_mib INTEGER NOT NULL, vcpus INTEGER NOT NULL, "
        "revoked INTEGER NOT NULL DEFAULT 0, created_at REAL NOT NULL"
    )
    second = ", address TEXT NOT NULL DEFAULT '', arriving INTEGER NOT NULL DEFAULT 0"
    third = second + ", leaving TEXT NOT NULL DEFAULT ''"
    runs = (
        "uuid TEXT PRIMARY KEY REFERENCES vms (uuid) ON DELETE CASCADE, domain_id INTEGER, secret_hash BLOB NOT NULL, "
        "attempts_left INTEGER NOT NULL, secret_used INTEGER NOT NULL DEFAULT 0, serials TEXT NOT NULL DEFAULT '{}'"
    )
    for version, more in ((1, ""), (2, second), (3, third)):
        path = tmp_path / f"{version}.sqlite"
        with sqlite3.connect(path) as db:
            db.executescript(
                f"CREATE TABLE vms ({columns}{more}) STRICT; CREATE TABLE runs ({runs}) STRICT; PRAGMA user_version={version};"
            )
            db.execute(
                "INSERT INTO vms (uuid, name, vmid, vm_certificate, vm_auth_token, memory_mib, vcpus, created_at)"
                " VALUES ('u', 'web', 'v', x'00', 't', 512, 1, 1.0)"
            )
            db.execute("""INSERT INTO runs VALUES ('u', 7, x'', 4, 1, '{"a": 2.0}')""")
        db.close()
        store = StateStore(path)
        store.set_leaving("u", "xen-2")
        assert (store.vm("u").name, store.vm("u").arriving, store.vm("u").leaving) == ("web", False, "xen-2")
        assert store.run("u") == RunRecord("u", 7, 4, True, True, {10: 2.0})
        assert store.take_attempt("u") is None
        store.close()
        StateStore(path).close()


def test_an_authority_that_others_can_read_or_that_is_not_whole(tmp_path: Path) -> None:
    stem = tmp_path / "ca"
    Authority.create(stem, "one", clock=lambda: 1.8e9)
    with pytest.raises(AuthorityError, match="exists already"):
        Authority.create(stem, "one", clock=lambda: 1.8e9)
    Authority.create(tmp_path / "other", "other", clock=lambda: 1.8e9)
    (tmp_path / "ca.pem").write_bytes((tmp_path / "other.pem").read_bytes())
    with pytest.raises(AuthorityError, match="not the key"):
        Authority.load(stem, clock=lambda: 1.8e9)
    (tmp_path / "ca.key").chmod(0o640)
    with pytest.raises(UnsafeFileError):
        Authority.load(stem, clock=lambda: 1.8e9)
    with pytest.raises(AuthorityError, match="is missing"):
        Authority.load(tmp_path / "nothing", clock=lambda: 1.8e9)


async def test_a_channel_stays_in_its_folder(tmp_path: Path) -> None:
    import tempfile

    with tempfile.TemporaryDirectory(dir="/tmp") as short:
        channel = FolderChannel(Path(short) / "guests")
        for uuid in ("../elsewhere", "", "6695eb01-f6a4-8304-79aa-97f2502e193f/.."):
            with pytest.raises(ChannelError):
                await channel.open(ChannelDomain(uuid, None))
        # A link in the place of a folder is removed, not followed.
        victim = Path(short) / "victim"
        victim.mkdir()
        (victim / "file").touch()
        uuid = "6695eb01-f6a4-8304-79aa-97f2502e193f"
        (Path(short) / "guests" / uuid).symlink_to(victim)
        await channel.open(ChannelDomain(uuid, None))
        assert (victim / "file").exists()
        await channel.sweep([])
        assert list((Path(short) / "guests").iterdir()) == []
    with pytest.raises(ChannelError, match="too long"):
        FolderChannel(tmp_path / ("d" * 80))


def test_the_example_settings_are_valid(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text(EXAMPLE_SETTINGS)
    settings = load_settings(MiddlewareSettings, path)
    assert settings.state == tmp_path / "state"
    assert settings.grid.authority == tmp_path / "grid-ca.pem"
    assert settings.reflection is False


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('state = "state"', 'sate = "state"'),
        ('uri = "test:///default"', "uri = 5"),
        ('allowed = ["admin"]', 'allowed = ["../admin"]'),
        ('# address = "127.0.0.1:7443"', 'address = "0.0.0.0:7443"'),
        ("operations_in_flight = 1024", "operations_in_flight = 0"),
    ],
)
def test_settings_that_are_refused(tmp_path: Path, old: str, new: str) -> None:
    path = tmp_path / "c.toml"
    assert old in EXAMPLE_SETTINGS
    path.write_text(EXAMPLE_SETTINGS.replace(old, new))
    with pytest.raises(SettingsError):
        load_settings(MiddlewareSettings, path)


async def test_an_orchestrators_name_is_no_path(world: World) -> None:
    from dom0_middleware.orchestrator_authority import OrchestratorAuthority

    authority = OrchestratorAuthority.load(world.state, clock=lambda: 1.8e9)
    for name in ("../admin", "", "a/b", "a" * 65, ".hidden"):
        with pytest.raises(Refused):
            authority.add(name)


async def test_what_lies_where_the_orchestrators_socket_should_be_is_left_alone(world: World) -> None:
    socket_path, own = world.folder / "precious.txt", world.state / "orchestrator.sock"
    socket_path.write_text("precious")
    assert own.is_socket()
    await world.stop()
    assert not own.exists()
    world.extra = {"orchestrators": {"socket": "precious.txt"}}
    with pytest.raises(SocketPathError, match="is no socket"):
        await world.start()
    assert socket_path.read_text() == "precious"
    socket_path.unlink()
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(socket_path))
        other.listen()
        with pytest.raises(SocketInUse):
            await world.start()
        other.settimeout(0.2)
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(socket_path))
    # Now nobody listens there: what is left of a dead process is replaced, and what replaced ours is not removed.
    await world.start()
    assert sorted(path.name for path in world.folder.iterdir()) == ["grid.pem", "policy.toml", "precious.txt", "s"]
    socket_path.unlink()
    socket_path.write_text("put there meanwhile")
    await world.stop()
    assert socket_path.read_text() == "put there meanwhile"
