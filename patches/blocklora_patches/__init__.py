"""The only place that imports SGLang: one file per upstream module, hooks listed at each file's end."""
