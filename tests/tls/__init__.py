"""The record layer, without a card."""
