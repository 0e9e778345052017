"""The service provider: what hypervisors reach.

``sessions_http`` is the HTTPS door, where a session is asked for and granted (``logins`` holds what is between the two, ``openid_client``
asks the provider); ``guard`` stands before every gRPC handler and decides who calls, ``operations`` are the handlers, ``execution`` leads
each operation to its VM's card and packs the results.
"""
