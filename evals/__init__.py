"""How good frozen features are: `python -m evals.linear`, `evals.dense`; k-NN is eval_knn.py."""
