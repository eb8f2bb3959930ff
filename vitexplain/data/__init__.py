"""Data sets with classes, masks and boxes."""
