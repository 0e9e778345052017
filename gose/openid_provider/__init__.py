"""The OpenID provider: says which hypervisor somebody is, and knows nothing of VMs.

``endpoint`` is the ordinary HTTPS door (discovery, associations, authentication requests, check_authentication), ``login`` the door over
TLS-Tandem behind which a hypervisor's card has met a card of the grid; ``sign_on`` remembers a login for a while, ``store`` keeps
associations and nonces, ``pages`` is what a person sees.
"""
