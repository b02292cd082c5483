"""A bounded soak of a real server: everything at once, every answer compared with PEFT's (``make soak``)."""
