"""The measurements themselves: importing this package registers them all."""

from . import states, attention, outputs  # noqa: F401, I001 (the order of tables)
