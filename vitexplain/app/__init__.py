"""The web app: upload a picture, choose methods and classes, see them side by side."""

from .serving import serve

__all__ = ["serve"]
