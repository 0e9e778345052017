"""The commands of ``secure-middleware``, a module a group; ``cli`` puts them together."""
