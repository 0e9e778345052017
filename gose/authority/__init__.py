"""The authority of a grid: who is who, who may do what, and whose word a container is.

``folder`` makes and reads the keys; ``certificate_authority`` issues certificates; ``token_authority`` issues VM-Auth-Tokens;
``enrolment`` personalises cards. What was issued and revoked is in ``gose.registry``.
"""

from gose.authority.certificate_authority import CertificateAuthority
from gose.authority.enrolment import CardAccess, EnrolmentOrder, enrol, sign_request
from gose.authority.folder import OPENID_PROVIDER, SERVICE_PROVIDER, AuthorityFolder, create_authority
from gose.authority.token_authority import TokenAuthority

__all__ = [
    "OPENID_PROVIDER",
    "SERVICE_PROVIDER",
    "AuthorityFolder",
    "CardAccess",
    "CertificateAuthority",
    "EnrolmentOrder",
    "TokenAuthority",
    "create_authority",
    "enrol",
    "sign_request",
]
