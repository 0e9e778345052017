"""The doors of the daemon: gRPC for agents (a pair of servers a domain) and for orchestrators.

``guard`` stands in front of every handler, unary and streaming alike; ``errors`` is the one table from errors to statuses.
"""
