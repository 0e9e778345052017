"""What Xen itself offers between dom0 and one domain: xenstore, and shared-memory channels.

``xenstore`` and ``vchan`` are thin shells around Xen's own libraries (looked for when they are used, not when they are imported);
``multiplex`` is a sans-IO protocol that carries many byte streams over one channel; ``link`` ties both ends of it to Unix sockets, so that
what runs over it (gRPC with mutual TLS) need not know.

Names, relative to a domain's own home in xenstore (``/local/domain/<domid>``): a domain that migrates gets another domid, and finds
everything under the same relative names again.
"""

JOIN_PATH = "secfunet/join"
"""The join information. dom0 writes it; this domain may read it, nobody else."""

VCHAN_PATH = "secfunet/vchan"
"""Where libxenvchan rendezvous: dom0 serves, this domain connects."""

ENROL_SERVICE = "enrol"
AGENT_SERVICE = "agent"


def home(domain_id: int) -> str:
    """The home of a domain in xenstore."""
    return f"/local/domain/{domain_id}"
