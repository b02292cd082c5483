"""Random and hostile input, against the checks by themselves and against a live server (``make fuzz``)."""
