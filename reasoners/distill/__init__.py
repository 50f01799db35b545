"""Distillation: from a Llama to a faster student, as a table of stages.

`load_recipe` reads the table, `distill` trains by it: MOHAWK for Llamba, a divergence from the teacher's
distribution for MambaInLlama, cross-entropy for fine-tuning and for teachers that start from nothing.
"""

from reasoners.distill.recipe import Recipe, Stage, Student, load_recipe
from reasoners.distill.train import distill

__all__ = ["Recipe", "Stage", "Student", "distill", "load_recipe"]
