"""What a VM's first boot is told: cloud-init user data that installs the agent, and the disk (NoCloud seed) that brings both to the guest.

Nothing in them is secret: the join secret travels by the domain's channel alone, and the agent finds it there by itself. Whoever copies a
seed to another domain gets an agent that nobody invites.
"""
