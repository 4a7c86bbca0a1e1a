"""Where images come from, and work on data sets: `python -m images` and `images.curate`."""
