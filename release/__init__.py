"""What is handed to those who deploy: the project's wheel, the wheels of what it depends on, the archive that has both for hosts, and the
agent's Debian package.

::

    python -m release wheel     # dist/secfunet-VERSION-py3-none-any.whl
    python -m release wheels    # dist/wheels: the dependencies of every place, and a requirements.lock with their hashes
    python -m release archive   # dist/secfunet-release-VERSION.tar.gz: both, as the playbooks deploy them
    python -m release deb       # dist/secfunet-vm-agent_VERSION_ARCH.deb

``locked`` finds in requirements.lock what a place needs; ``wheels``, ``archive`` and ``deb`` make the things. What only lies there for
them (the package's files and maintainer scripts) is in ``packaging/deb``.
"""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PLACES = frozenset({"agent", "card", "dom0", "gose"})
"""The extras of the distribution that are deployed."""
