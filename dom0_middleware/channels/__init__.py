"""The way between one domain and dom0, which only dom0 can lay: there before the domain runs, gone when it stops.

``port`` says what a channel is; ``folder`` is the embedded default (Unix sockets in a folder that is handed to the guest), ``vchan`` shared
memory that Xen keeps for one domain, ``tcp`` a pair of ports on the bridge with checks against the hypervisor's facts (``interfaces``). The
settings choose one for all domains of a host (``choose``).
"""
