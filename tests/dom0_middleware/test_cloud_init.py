"""User data: what a first boot does with it (run here, with a shell in the place of a guest), and what real tools say of both documents."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dom0_middleware.cloud_init.seed import PackageFile, write_seed
from dom0_middleware.cloud_init.user_data import MAX_PACKAGES, CloudInitError, Package, meta_data, user_data

UUID = "6695eb01-f6a4-8304-79aa-97f2502e193f"
CONTENT = b"!<arch>\ndebian-binary and the rest"
DIGEST = hashlib.sha256(CONTENT).hexdigest()
AGENT = Package("agent_1.0_amd64.deb", DIGEST)


def script_of(document: bytes) -> list[str]:
    """The one command of the first boot."""
    head, _, body = document.partition(b"\n")
    assert head == b"#cloud-config"
    (command,) = json.loads(body)["runcmd"]
    return [str(word) for word in command]


@pytest.fixture
def guest(tmp_path: Path) -> Path:
    """A folder with commands that a guest has, which write down how they were called."""
    for name, body in {
        "mount": f'mkdir -p seed/secfunet; cp {tmp_path}/given.deb "seed/secfunet/{AGENT.name}"',
        "umount": "",
        "apt-get": f'for last; do :; done; cp "$last" {tmp_path}/installed',
        "vm-agent": f"[ -e {tmp_path}/invited ]",
        "sleep": f"touch {tmp_path}/invited",
    }.items():
        command = tmp_path / "bin" / name
        command.parent.mkdir(exist_ok=True)
        command.write_text(f'#!/bin/sh\necho "{name} $*" >>{tmp_path}/calls\n{body}\n')
        command.chmod(0o755)
    return tmp_path


def boot(guest: Path, document: bytes) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": f"{guest}/bin:{os.environ['PATH']}", "TMPDIR": str(guest)}
    return subprocess.run(script_of(document), env=environment, capture_output=True, text=True, timeout=60, check=False)


def test_a_first_boot_installs_the_package_of_the_seed_and_waits_for_the_enrolment(guest: Path) -> None:
    (guest / "given.deb").write_bytes(CONTENT)
    done = boot(guest, user_data([AGENT]))
    assert done.returncode == 0, done.stderr
    assert (guest / "installed").read_bytes() == CONTENT
    calls = (guest / "calls").read_text().splitlines()
    assert calls[0] == "mount -o ro LABEL=cidata seed"
    assert calls[-3:] == ["vm-agent status", "sleep 2", "vm-agent status"]
    assert not list(guest.glob("tmp.*")), "the packages are left behind"


def test_a_package_that_was_changed_is_not_installed(guest: Path) -> None:
    (guest / "given.deb").write_bytes(CONTENT + b"!")
    assert boot(guest, user_data([AGENT])).returncode != 0
    assert "apt-get" not in (guest / "calls").read_text()


def test_a_guest_fetches_what_is_elsewhere(guest: Path) -> None:
    """urllib reads files, too; only the URL's own check keeps them out of user data."""
    (guest / AGENT.name).write_bytes(CONTENT)
    elsewhere = Package(AGENT.name, DIGEST, f"file://{guest}/{AGENT.name}")
    done = boot(guest, user_data([elsewhere]))
    assert done.returncode == 0, done.stderr
    assert (guest / "installed").read_bytes() == CONTENT
    assert "mount" not in (guest / "calls").read_text()


@pytest.mark.parametrize(
    "text",
    [
        "http://example.org/agent.deb",
        "http://example.org/agent.deb#sha256=",
        f"http://example.org/agent.deb#md5={DIGEST}",
        f"file:///agent.deb#sha256={DIGEST}",
        f"http:///agent.deb#sha256={DIGEST}",
        f"http://[/agent.deb#sha256={DIGEST}",
        f"http://example.org/#sha256={DIGEST}",
        f"http://example.org/agent.tar#sha256={DIGEST}",
        f"http://example.org/a b.deb#sha256={DIGEST}",
        f"http://example.org/agent.deb#sha256={DIGEST[:-1]}g",
    ],
)
def test_what_is_no_url_with_a_digest_is_refused(text: str) -> None:
    with pytest.raises(CloudInitError):
        Package.from_url(text)


def test_a_url_names_its_file() -> None:
    url = "https://example.org:8443/pool/agent_1.0%2B1.deb"
    with pytest.raises(CloudInitError):
        Package.from_url(f"{url}#sha256={DIGEST}")
    url = "https://example.org:8443/pool/agent_1.0+1.deb?x=1&y='"
    assert Package.from_url(f"{url}#sha256={DIGEST}") == Package("agent_1.0+1.deb", DIGEST, url)


@given(st.text(max_size=80), st.text(max_size=80))
def test_any_text_is_a_url_or_refused(url: str, digest: str) -> None:
    for text in (url, f"http://{url}.deb#sha256={digest}", f"http://example.org/{url}.deb#sha256={DIGEST}"):
        try:
            package = Package.from_url(text)
        except CloudInitError:
            continue
        assert package.name.endswith(".deb")
        assert "/" not in package.name


def test_there_are_some_packages_and_not_too_many() -> None:
    many = [Package(f"p{number}.deb", DIGEST) for number in range(MAX_PACKAGES + 1)]
    for packages in ([], many, [AGENT, AGENT]):
        with pytest.raises(CloudInitError):
            user_data(packages)
    assert user_data(many[:-1])


def test_a_name_that_no_host_can_have_is_left_out() -> None:
    assert json.loads(meta_data(UUID, "web-1")) == {"instance-id": UUID, "local-hostname": "web-1"}
    assert json.loads(meta_data(UUID, "web_1.x")) == {"instance-id": UUID}


def test_what_is_no_package_is_refused(tmp_path: Path) -> None:
    for content in (b"", b"!<arch>\n", b"#!/bin/sh\n"):
        (tmp_path / "agent.deb").write_bytes(content)
        with pytest.raises(CloudInitError, match="no Debian package"):
            PackageFile.read(tmp_path / "agent.deb")
    with pytest.raises(CloudInitError, match="cannot be read"):
        PackageFile.read(tmp_path / "none.deb")


@pytest.mark.interop
def test_the_seed_is_found_by_its_label_and_holds_what_it_says(tmp_path: Path) -> None:
    (tmp_path / AGENT.name).write_bytes(CONTENT)
    (tmp_path / "network").write_text("network: {config: disabled}\n")
    seed = tmp_path / "seed.iso"
    file = PackageFile.read(tmp_path / AGENT.name)
    write_seed(seed, uuid=UUID, name="web", files=[file], fetched=[], network=tmp_path / "network")
    image = seed.read_bytes()
    assert image[0x8001:0x8006] == b"CD001"  # ECMA-119 section 8.4: the primary volume descriptor
    assert image[0x8028:0x8048].rstrip() == b"cidata"
    assert CONTENT in image
    assert user_data([AGENT]) in image
    assert b"network: {config: disabled}" in image
    assert seed.stat().st_mode & 0o777 == 0o644
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted((AGENT.name, "network", "seed.iso"))


@pytest.mark.interop
@pytest.mark.skipif(not shutil.which("cloud-init"), reason="cloud-init is not here")
def test_cloud_init_finds_nothing_wrong(tmp_path: Path) -> None:
    document = tmp_path / "user-data"
    document.write_bytes(user_data([AGENT, Package.from_url(f"http://example.org/x_1.deb#sha256={DIGEST}")]))
    command = ["cloud-init", "schema", "--config-file", str(document)]
    good = subprocess.run(command, capture_output=True, text=True, check=False)
    assert good.returncode == 0, good.stdout + good.stderr
    document.write_text('#cloud-config\n{"runcmd": 5}\n')
    assert subprocess.run(command, capture_output=True, check=False).returncode != 0
