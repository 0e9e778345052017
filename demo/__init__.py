"""The main job, as a story: real daemons as separate processes, one VM, one signature, and the attacks that fail.

``processes`` starts and stops daemons (told of their readiness as systemd would be), ``installation`` has the files of a whole installation
in one folder, ``stack`` sets it up and starts it. ``story`` tells what happens, from the daemons' own logs (``evidence``); ``attacks``
performs the attacks. ``python -m demo`` runs it; tests and benchmarks use ``stack`` too.
"""
