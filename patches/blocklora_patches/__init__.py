"""The only place that imports SGLang. Rooms are by process and concern; a file's hooks are listed at its end."""
