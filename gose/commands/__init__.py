"""The commands of ``gose``, a module a group; ``cli`` puts them together. ``options`` and ``resources`` are what they share."""
