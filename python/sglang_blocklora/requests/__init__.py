"""What a request may hold: its values are checked before anything of it is kept or sent to a scheduler."""
