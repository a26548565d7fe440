"""Which channels of a model go together, and how they are removed."""

from effdl.graph.channels.edit import mask, remove
from effdl.graph.channels.groups import Channels, Group, channels
from effdl.graph.channels.trace import ALONG, IN, OUT, Role

__all__ = ["ALONG", "IN", "OUT", "Channels", "Group", "Role", "channels", "mask", "remove"]
