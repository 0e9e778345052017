"""What can go wrong with the testbed, as sentences."""


class TestbedError(Exception):
    """The testbed cannot do this; the message says why, and ends with the last lines of a log where there is one."""

    __test__ = False  # the name begins like a test's


class MissingTools(TestbedError):
    """Debian packages that the testbed needs are not installed here."""
