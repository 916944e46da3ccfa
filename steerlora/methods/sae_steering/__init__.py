"""Steering by features of an SAE, or by a vector: the stream of one site is pushed."""
