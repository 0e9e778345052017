"""A real Xen host on an ordinary machine: Xen, a Debian dom0 and its guests, under QEMU's software emulation.

::

    python -m testbed build                 # about two minutes, once; everything lies in one folder outside the tree
    python -m testbed up --hosts 2 --grid   # seconds: saved hosts are resumed
    python -m testbed ssh xen1 -- xl list
    python -m testbed down

``build`` makes disks and kernels from Debian's packages, ``machine`` is one QEMU, ``host`` is a host that is reached by ssh, ``bed`` are
the hosts that belong together, ``guests`` the domains on them. A bed's hosts are ``xen1`` and ``xen2`` (Xen, dom0 with systemd and libvirt)
and ``grid1`` (the same disk without Xen); a switch of our own is their cable.
"""

from testbed.bed import Testbed
from testbed.errors import TestbedError
from testbed.host import Host, Result

__all__ = ["Host", "Result", "Testbed", "TestbedError"]
