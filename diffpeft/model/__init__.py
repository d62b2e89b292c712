"""Many layers: which ones, on and off, how strong, and back to a Bundle."""

from diffpeft.layers.views import Above
from diffpeft.model import single

Above.actions = single
