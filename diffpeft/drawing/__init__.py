"""Drawing with a pipeline: many pictures at once, in grids, with what they were drawn with written into them."""
