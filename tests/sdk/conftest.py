"""The servers under test, from the environment."""

import os

import pytest

from server import Server


@pytest.fixture(scope="session")
def server() -> Server:
    """The server at `TIDEMILL_BASE_URL`. Without it every test fails: a suite that tests nothing must not pass."""
    base_url = os.environ.get("TIDEMILL_BASE_URL")
    if not base_url:
        pytest.fail("set TIDEMILL_BASE_URL to the server under test, such as http://127.0.0.1:8000/v1", pytrace=False)
    return Server(base_url, os.environ.get("TIDEMILL_API_KEY", "none"))


@pytest.fixture(scope="session")
def other_server() -> Server:
    """A second server that must give the same answers, at `TIDEMILL_COMPARE_URL`."""
    base_url = os.environ.get("TIDEMILL_COMPARE_URL")
    if not base_url:
        pytest.skip("TIDEMILL_COMPARE_URL names no second server")
    return Server(base_url, os.environ.get("TIDEMILL_API_KEY", "none"))
