"""How fast it is, and what a run will need: `python -m bench` and `bench.plan`."""
