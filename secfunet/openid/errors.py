"""What can go wrong between a relying party and a provider."""

from __future__ import annotations

from secfunet.errors import SecFuNetError


class OpenIdError(SecFuNetError):
    """The root of this package's errors."""


class OpenIdFormatError(OpenIdError):
    """A message, document, URL, nonce or number that is not what the specification allows."""


class RealmError(OpenIdError):
    """A realm that must not be trusted, or a return_to outside of it (§9.2)."""


class FetchRefusedError(OpenIdError):
    """Discovery would lead to a place that this relying party was not configured to ask; ``url`` has it."""

    def __init__(self, url: str, reason: str) -> None:
        super().__init__(f"{url!r:.200} is not asked: {reason}")
        self.url = url


class HttpFailedError(OpenIdError):
    """An HTTP exchange failed below HTTP; the shell throws it into the generator."""


class DiscoveryError(OpenIdError):
    """No OpenID 2.0 provider was found for an identifier."""


class AssociationRefusedError(OpenIdError):
    """The provider made no association; the relying party can go on without one (§11.4.2)."""


class ProviderError(OpenIdError):
    """The provider answered a direct request with an error; ``untrusted_message`` is its text."""

    def __init__(self, untrusted_message: str) -> None:
        super().__init__(f"the provider refused the request: {untrusted_message!r:.200}")
        self.untrusted_message = untrusted_message


class CheckidError(OpenIdError):
    """An authentication request that cannot be granted.

    ``redirect`` is where the error may be reported to (§5.2.3), or None if the request names no place that can be trusted: then the
    provider answers its own user.
    """

    def __init__(self, message: str, *, redirect: str | None = None) -> None:
        super().__init__(message)
        self.redirect = redirect


class AssertionRefusedError(OpenIdError):
    """A positive assertion that does not hold (§11); ``step`` says which check refused it: "form", "return_to", "discovery", "nonce" or
    "signature"."""

    def __init__(self, step: str, message: str) -> None:
        super().__init__(f"the assertion is refused ({step}): {message}")
        self.step = step


class NegativeAssertion(OpenIdError):
    """The provider did not authenticate anybody."""


class AuthenticationCancelled(NegativeAssertion):
    """openid.mode=cancel (§10.2.2)."""

    def __init__(self) -> None:
        super().__init__("the provider reports that the login was cancelled")


class SetupNeeded(NegativeAssertion):
    """openid.mode=setup_needed (§10.2.1): checkid_immediate cannot be answered without the user."""

    def __init__(self) -> None:
        super().__init__("the provider must talk to the user first")


class ReportedError(NegativeAssertion):
    """openid.mode=error (§5.2.3); ``untrusted_message`` is the provider's text."""

    def __init__(self, untrusted_message: str) -> None:
        super().__init__(f"the provider reports an error: {untrusted_message!r:.200}")
        self.untrusted_message = untrusted_message
