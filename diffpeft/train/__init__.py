"""Training an adapter on a few images: data, objective, loop, pictures, report."""
