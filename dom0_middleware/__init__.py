"""The Secure Middleware: the daemon in dom0 between the agents of VMs and the grid.

A request comes in through ``api`` (a pair of servers a domain: who calls is fixed by the channel and checked by ``api.guard``), is
sanitised, permitted and done by ``operations`` (``policy``, ``audit``), and goes down through ``sessions`` to ``gose_client``.

``vms`` is the life of VMs: what orchestrators ask, and what ``libvirt_hypervisor`` reports. ``runs`` makes and ends
``guest`` (one run of one domain) with its ``guest_channel`` and its certificates (``enrolment``, ``guest_authority``).
``state`` outlives the process, ``server`` wires it all, ``cli`` is the command.
"""

import secfunet  # noqa: F401 - before gRPC: see there
