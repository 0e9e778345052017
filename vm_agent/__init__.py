"""The agent: what runs inside a VM and lets its programs use a key that is not there.

The story, downhill: a program opens the agent's Unix socket (``local_socket`` learns from the kernel who it is), asks ``local_api`` for
an operation, which ``batching`` sends with others over one stream of ``middleware_client`` to the Secure Middleware in dom0. What comes
back is a container; ``results`` verifies its trailer before it decrypts anything, and only then is there an answer.

``enrolment`` turns the join secret that dom0 handed to this domain into a certificate for the agent's own key (``keys``),
``middleware_client`` keeps it fresh, ``identity`` is who the VM is, ``server`` puts the daemon together, ``client`` and ``cli`` are for
programs and persons in the VM.
"""

import secfunet  # noqa: F401 - before gRPC: see there
