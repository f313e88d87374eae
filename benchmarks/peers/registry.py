"""Every row of the accuracy table."""

from .methods import FullPrecision, Method, Ours, StraightThrough

METHODS: tuple[Method, ...] = (FullPrecision(), StraightThrough(), Ours())
