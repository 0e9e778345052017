"""The agent: what runs inside a VM and lets its programs use a key that is not there."""
