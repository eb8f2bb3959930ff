"""Files that ship with the package, such as the embedded model's weights; read them with `importlib.resources`."""
