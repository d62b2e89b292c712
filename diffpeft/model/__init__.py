"""Many layers: which ones, on and off, how strong, and back to a Bundle."""
