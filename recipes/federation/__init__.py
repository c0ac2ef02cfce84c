"""Agents that train on data of their own and exchange coefficients or outputs: their data, what they do, Flower."""
