"""One grammar for the id of a call, in every program."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from secfunet.rpc.correlation import clean_correlation, is_correlation, new_correlation


@given(st.one_of(st.text(), st.binary(), st.none()))
def test_correlation_ids_are_clean(untrusted: object) -> None:
    assert is_correlation(clean_correlation(untrusted))


@pytest.mark.parametrize("sent", ["deploy-42", "0123456789abcdef", "x" * 64])
def test_a_good_correlation_id_is_kept(sent: str) -> None:
    assert clean_correlation(sent) == sent


@pytest.mark.parametrize("sent", ["", "x" * 65, "deploy 42", "deploy_42", "a\nb", "ä", "deploy-42\n"])
def test_another_one_is_replaced(sent: str) -> None:
    assert clean_correlation(sent) != sent


def test_new_ids_differ() -> None:
    assert new_correlation() != new_correlation()
