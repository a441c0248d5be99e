"""Loads a plan and runs it; knows no graphs and no passes."""
