"""The whole chain on a real Xen host: what is deployed, by whom, and what attacks come to. ``make test-xen`` runs it.

Hosts are resumed from a saved state, in which the playbooks have deployed this checkout; ``deployment`` makes it once for each content.
Tests speak to dom0's orchestrator API and to agents' sockets over ssh, as an orchestrator and as programs in guests do. Time limits are
generous, since the machine below is shared; assertions are not.
"""
