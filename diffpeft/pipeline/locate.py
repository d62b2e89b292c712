"""`converters.locating`, for what is above it."""

from diffpeft.converters.locating import HUB_ID, PEFT, HubPlace, located, on_hub

__all__ = ["HUB_ID", "PEFT", "HubPlace", "located", "on_hub"]
