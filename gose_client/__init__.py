"""How anything reaches a grid: the hypervisor's login through OpenID, sessions for VMs, and operations."""
