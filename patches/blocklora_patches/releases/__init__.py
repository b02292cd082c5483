"""Runs in every process: what each SGLang release that we support must look like, as data, and the comparison."""
