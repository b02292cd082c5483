"""Which part of an adapter a TP rank needs: pure functions."""
