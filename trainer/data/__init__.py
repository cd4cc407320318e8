"""From a beton file to batches of views: who sees what, and how each view is cut."""
