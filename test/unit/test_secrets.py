"""What a client is told of the configuration holds no key."""

from __future__ import annotations

from sglang_blocklora.reporting.secrets import HIDDEN, without_secrets


def test_keys_are_hidden_wherever_they_stand() -> None:
    told = {
        "admin_api_key": "k1",
        "api_key": None,
        "port": 30000,
        "launch_command": "launch --admin-api-key k1 --ssl-keyfile-password=k2",
        "internal_states": [{"ssl_keyfile_password": "k2", "argv": ["--admin-api-key", "k1"]}],
    }
    assert without_secrets(told) == {
        "admin_api_key": HIDDEN,
        "api_key": None,
        "port": 30000,
        "launch_command": f"launch --admin-api-key {HIDDEN} --ssl-keyfile-password={HIDDEN}",
        "internal_states": [{"ssl_keyfile_password": HIDDEN, "argv": ["--admin-api-key", HIDDEN]}],
    }
    assert told["admin_api_key"] == "k1", "the server's own stays"
