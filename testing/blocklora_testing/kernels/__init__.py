"""Cases of the kernels and the process that runs them in Triton's interpreter or on a GPU."""
