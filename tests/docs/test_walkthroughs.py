"""The commands of docs/operations.md, copied into a shell as they stand: each walk-through comes to its end."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "operations.md"
COMMANDS = Path(sys.executable).parent

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.walk,
    pytest.mark.skipif(os.getuid() != 0 or shutil.which("unshare") is None, reason="takes namespaces of its own"),
]

# Ports and folders of the page are used as they stand, in a network and with folders of our own; both hosts are this one.
STAGE = """
set -euo pipefail
ip link set lo up
mount --make-rprivate /
for folder in /tmp /srv /opt; do mount -t tmpfs tmpfs $folder; done
mkdir -p /opt/secfunet/bin
ln -s {commands}/secure-element {commands}/gose {commands}/secure-middleware {commands}/vm-agent /opt/secfunet/bin/
cat > /opt/secfunet/bin/scp <<'SH'
#!/bin/bash
cp "${{@:1:$#-1}}" "${{!#}}" 2>/dev/null || cp "${{@:1:$#-1}}" "$(sed 's/^[^:]*://' <<<"${{!#}}")"
SH
chmod 755 /opt/secfunet/bin/scp
printf '127.0.0.1 localhost grid.example.org xen-1.example.org\\n' > /opt/hosts
mount --bind /opt/hosts /etc/hosts
export PATH=/opt/secfunet/bin:$PATH
unset GOSE_CONFIG
trap 'kill $(jobs -p) 2>/dev/null; wait' EXIT
"""


def section(title: str) -> str:
    """Every ``sh`` block of a section, in order, as one script."""
    text = PAGE.read_text()
    match = re.search(rf"^(#+) {re.escape(title)}$", text, re.MULTILINE)
    assert match is not None, title
    rest = text[match.end() :]
    end = re.search(rf"^#{{1,{len(match[1])}}} ", rest, re.MULTILINE)
    return "\n".join(re.findall(r"^```sh\n(.*?)^```", rest[: end.start() if end else None], re.MULTILINE | re.DOTALL))


def walk(*scripts: str) -> subprocess.CompletedProcess[str]:
    # A daemon that shares its processor with other tests takes longer to start than one in a reader's terminal.
    script = re.sub(
        r"^sleep \d$", "sleep 3", "\n".join([STAGE.format(commands=COMMANDS), *scripts]), flags=re.MULTILINE
    )
    command = ["unshare", "--mount", "--net", "bash", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=110, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done


def test_from_nothing_to_a_new_vm_and_a_backup_that_is_restored() -> None:
    """From nothing to a first signed file; what follows goes on where that ends."""
    beginning, new, backup = map(section, ("From nothing to a first signed file", "A new VM", "Backup and restore"))
    new += """
    secure-middleware vm stop db --force && secure-middleware vm delete db
    """
    verified = """
    openssl dgst -sha256 -sigopt rsa_padding_mode:pss -verify /tmp/ops/web.pub -signature message.sig message
    """
    done = walk(beginning, new, backup, verified)
    assert done.stdout.count("Verified OK") == 2
    assert "sound" in done.stdout


def test_two_hosts_by_hand() -> None:
    in_the_vm = """
    printf 'join = "%s/join.json"\\n' "$(echo $PWD/state/guests/*)" > vm-agent.toml
    vm-agent serve --config vm-agent.toml 2> vm-agent.log &
    sleep 3
    echo hello > message && vm-agent sign message --out message.sig --config vm-agent.toml
    openssl x509 -in web.pem -pubkey -noout > web.pub
    openssl dgst -sha256 -sigopt rsa_padding_mode:pss -verify web.pub -signature message.sig message
    """
    assert "Verified OK" in walk(section("Two hosts, by hand"), in_the_vm).stdout
