"""For development: real servers in child processes, tiny models, toys. Shared by tests, benchmarks and examples."""
