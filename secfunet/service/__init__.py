"""What every daemon and command here has in common: settings, logs, life cycle, exit codes.

``settings`` reads a TOML file into a validated model, ``logs`` writes one JSON object a line, ``daemon`` runs an asyncio service until
SIGTERM, ``cli`` turns errors into sentences and exit codes, ``files`` writes state so that a crash leaves the old or the new content.
"""
