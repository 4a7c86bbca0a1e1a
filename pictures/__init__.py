"""What a network sees and how a run went, as pictures: `python -m pictures`."""
