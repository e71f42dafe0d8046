"""One file for each entry; pyproject.toml names them to dFactory."""
