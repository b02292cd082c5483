"""Who may ask for which adapter, how much, and what was refused; knows no HTTP."""
