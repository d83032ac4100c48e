"Small models trained to misbehave in one known way: load one, or train it anew. Each has a module of its own here."

from .core import ORGANISMS, Organism, Recipe, load_organism, organism, organism_figures, train_organism, without_adapter

__all__ = ["ORGANISMS", "Organism", "Recipe", "load_organism", "organism", "organism_figures", "train_organism", "without_adapter"]
