"""Which part of an adapter a TP rank needs, and where each matrix lies: pure functions of shapes."""
