"""Hold the terms of the loss, each a part of its own (``common.parts``)."""
