"""The Secure Middleware: the daemon in dom0 between the agents of VMs and the grid."""
