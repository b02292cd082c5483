"""Where adapter weights lie: layout of rows, arenas, and which adapters are resident."""
