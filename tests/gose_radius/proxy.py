"""FreeRADIUS as a proxy in front of the grid, as a private process: it decides whether the grid is alive."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

from tests.gose_radius.peer import SECRET
from tests.interop_radius.freeradius import FreeRadius, running_radiusd

SETTINGS = """
prefix = /usr
libdir = /usr/lib/freeradius
confdir = {folder}
logdir = {folder}
run_dir = {folder}
pidfile = {folder}/radiusd.pid
max_request_time = 30
cleanup_delay = 2
max_requests = 1024
hostname_lookups = no
proxy_requests = yes
log {{
  destination = stdout
  auth = yes
}}
security {{
  reject_delay = 0
  status_server = yes
}}
thread pool {{
  start_servers = 2
  max_servers = 4
  min_spare_servers = 1
  max_spare_servers = 2
}}
proxy server {{
  default_fallback = no
}}
home_server grid {{
  type = auth
  ipaddr = 127.0.0.1
  port = {grid}
  secret = "{secret}"
  require_message_authenticator = yes
  response_window = 5
  zombie_period = 20
  revive_interval = 3600
  status_check = status-server
  check_interval = 6
  check_timeout = 4
  num_answers_to_alive = 3
}}
home_server_pool grids {{
  type = fail-over
  home_server = grid
}}
realm grid {{
  auth_pool = grids
  nostrip
}}
modules {{
}}
client here {{
  ipaddr = 127.0.0.1
  secret = "{secret}"
  require_message_authenticator = yes
}}
server default {{
  listen {{
    type = auth
    ipaddr = 127.0.0.1
    port = {port}
  }}
  authorize {{
    update control {{
      Proxy-To-Realm := "grid"
    }}
  }}
  authenticate {{
  }}
}}
"""


@contextlib.asynccontextmanager
async def running_proxy(folder: Path, grid_port: int) -> AsyncIterator[FreeRadius]:
    """Everything that it is asked goes to the grid; ``port`` of what it yields is the proxy's own."""
    settings = SETTINGS.replace("{grid}", str(grid_port)).replace("{secret}", SECRET.decode())
    async with running_radiusd(folder, settings, {}) as proxy:
        yield proxy
