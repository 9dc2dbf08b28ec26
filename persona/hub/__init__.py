"""Where base models come from: the package itself, a folder, or a model hub."""
