"""Tests: unit and property tests beside the rooms they try, end-to-end tests in e2e."""
