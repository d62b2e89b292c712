"""`import converters`, where diffpeft is installed: diffpeft.converters, which is the documented name."""

from diffpeft.converters import *  # noqa: F403
from diffpeft.converters.short_name import share

share()
