"""``secure-middleware init``: what a dom0 needs before the daemon can start."""

from __future__ import annotations

import time
from pathlib import Path

from dom0_middleware.guest_authority import GuestAuthority
from dom0_middleware.orchestrator_authority import OrchestratorAuthority, credential_paths
from dom0_middleware.settings import MiddlewareSettings
from secfunet.service.files import private_folder, write_atomically
from secfunet.service.settings import load_settings

FIRST_ORCHESTRATOR = "admin"

EXAMPLE_SETTINGS = """\
# Settings of the Secure Middleware. Relative paths are relative to this file's folder.
state = "state"                 # authorities, VMs, sockets, audit log; mode 0700
policy = "policy.toml"          # which VM may do what
# reflection = false            # gRPC reflection
# metrics_port = 9464           # Prometheus, on loopback
# log_level = "info"

[libvirt]
uri = "test:///default"         # on a Xen host: "xen:///system"
# template = "domain.xml"       # operating system and devices that every domain gets

[card]                          # the secure element of this hypervisor
socket = "card.sock"            # a software card's Unix socket, or
# pcsc = "ACS ACR39U ICC Reader 00 00"  # a PC/SC reader ('secure-middleware readers' shows them)
user_pin_file = "card.pin"      # mode 0600; or
# user_pin_credential = "card-pin"  # systemd's LoadCredentialEncrypted=, or
# user_pin_prompt = true        # typed when the daemon starts
identity = "hypervisor"

[grid]                          # where the keys of the VMs are
service_provider = "https://localhost:8443"
operations = "localhost:8444"
openid_provider = "https://localhost:9443"
openid_login = "https://localhost:9444"
authority = "grid-ca.pem"       # the grid's CA, PEM

[orchestrators]
allowed = ["admin"]             # names in certificates of 'secure-middleware orchestrator add'
# address = "127.0.0.1:7443"    # beside the Unix socket in the state folder

[limits]                        # of each domain
operations_in_flight = 1024
concurrent_calls = 256
"""

EXAMPLE_POLICY = """\
# Which VM may run which operation with which scheme, and how often. What no rule allows is denied; the first rule that matches decides.
# A rule selects VMs by names, uuids or vmids (patterns with * and ?); where several are given, all must match.
#
# As it stands nothing is allowed. Write rules like these, look at them with 'secure-middleware policy check', and send the daemon SIGHUP.

# [[rule]]
# names = ["web-*"]
# operations = ["sign"]
# schemes = ["rsassa-pss-*", "ecdsa-*"]
# rate = { per_second = 100, burst = 200 }

# [[rule]]
# names = ["mail"]
# operations = ["decrypt"]
# schemes = ["rsaes-oaep-sha256"]
"""

NEXT_STEPS = """\
Next:
  1. {config}: where this hypervisor's card and the grid are.
  2. {policy}: it allows nothing yet; write a rule for each VM that may use its key ('secure-middleware policy check').
  3. 'secure-middleware serve' runs the daemon; 'secure-middleware vm create' makes the first VM."""


def initialise(config: Path) -> list[Path]:
    """Makes whatever is missing, and leaves whatever is there; the paths of what it made. Raises SettingsError, AuthorityError."""
    made = []
    if not config.exists():
        config.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(config, EXAMPLE_SETTINGS.encode(), mode=0o644)
        made.append(config)
    settings = load_settings(MiddlewareSettings, config)
    if not settings.policy.exists():
        settings.policy.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(settings.policy, EXAMPLE_POLICY.encode(), mode=0o644)
        made.append(settings.policy)
    state = private_folder(settings.state)
    state.chmod(0o700)
    if not (state / "guest-authority.key").exists():
        GuestAuthority.create(state, clock=time.time)
        made.append(state / "guest-authority.pem")
    if not (state / "orchestrator-authority.key").exists():
        OrchestratorAuthority.create(state, clock=time.time)
        made.append(state / "orchestrator-authority.pem")
    if not credential_paths(state, FIRST_ORCHESTRATOR)[0].exists():
        made.append(OrchestratorAuthority.load(state, clock=time.time).add(FIRST_ORCHESTRATOR))
    return made
