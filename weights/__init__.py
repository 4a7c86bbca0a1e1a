"""Files of weights and state: save and resume, load, start from, export."""
