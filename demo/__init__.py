"""The main job, as a story: real daemons as separate processes, one VM, one signature, and the attacks that fail.

``processes`` starts and stops daemons (told of their readiness as systemd would be), ``stack`` sets up a whole installation in one folder,
``story`` tells what happens, ``attacks`` performs the attacks. ``python -m demo`` runs it; tests and benchmarks use ``stack`` too.
"""
