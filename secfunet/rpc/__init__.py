"""How every program here uses gRPC, so that one idea has one spelling.

``reasons``: every reason for a refusal, one row each. ``facts``: what leaves a program of an error, as google.rpc.Status and as
OperationFailure, and back. ``correlation``: the id of a call. ``guard``: what stands in front of every handler of a server.
"""
