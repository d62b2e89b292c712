"""One layer: the only place that knows Linear from Conv."""
