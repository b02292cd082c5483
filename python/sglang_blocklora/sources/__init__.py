"""Adapters that lie elsewhere: a URL of any store that fsspec knows becomes a local folder."""
