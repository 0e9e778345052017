"""What all of this costs: one table, all rows from one run, medians, compared with the limits of the same machine in the same minute.

``python -m bench [--json FILE] [--quick] [--only GROUP]``. Groups: ``limits`` (private-key operations in process), ``tandem`` (handshakes
and bulk, against plain OpenSSL), ``chain`` (signatures through all processes, and the time of each hop), ``login`` (a hypervisor's way
through OpenID), ``memory`` (what a VM's session adds). ``stage`` starts the real processes, ``rows`` is the table.
"""
