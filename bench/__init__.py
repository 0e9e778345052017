"""What all of this costs: one table, all rows from one run, medians, compared with the limits of the same machine in the same minute.

``python -m bench [--json FILE] [--quick] [--only GROUP]``. Groups: ``limits`` (private-key operations in process), ``tandem`` (handshakes
and bulk, against plain OpenSSL), ``chain`` (signatures through all processes, and the time of each hop), ``login`` (a hypervisor's way
through OpenID), ``load`` (up to 256 cards as slow as those of hardware, handshakes that wait for one, a VM beside one that floods),
``memory`` (what a VM's session adds). ``stage`` starts the real processes, ``load_grid`` a grid with model cards, ``rows`` is the table.
"""
