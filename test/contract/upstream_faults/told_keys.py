"""GET /server_info tells the admin key to who may only generate: python told_keys.py http://localhost:30000

The server runs with --admin-api-key.
"""

from live import Call, main


def fault(call: Call, adapter: str) -> str | None:
    key = call("/server_info")[1].get("admin_api_key")
    return "admin_api_key is told" if key and set(key) != {"*"} else None


if __name__ == "__main__":
    main(fault)
