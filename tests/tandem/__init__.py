"""TLS-Tandem with real cards (``secure-element`` processes), against itself and against programs that nobody here wrote."""
