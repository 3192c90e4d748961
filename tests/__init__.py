"""Tests assert what a user relies on. Real parts where they can be started; no torch in the login node's tests."""
