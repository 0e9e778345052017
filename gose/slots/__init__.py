"""Cards in slots: one exclusive worker a card, first come first served, bounded queue, deadlines, a watchdog.

``queue`` holds the jobs that wait; ``slot`` is the worker of one card: it connects, serves, asks an idle card for a sign of life, takes
a dead card out of service and brings it back; ``pool`` puts several server cards behind one queue and lends them out; ``rack`` is all
the cards of a grid.
"""
