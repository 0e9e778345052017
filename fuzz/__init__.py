"""Coverage-guided fuzzing (atheris): one target for each kind of parser that meets bytes of a guest, a card, a peer or the network.

A target takes any bytes, and ends with a value or with the one error that its parser documents; whatever else it raises is a fault. A value
that comes out is encoded again where that can be done, and must be the same. ``corpus/`` has real messages of each kind to begin with
(``seeds`` makes them), and inputs of faults that were found. ``make fuzz`` runs them all; ``tests/fuzz`` replays the corpus alone.
"""
